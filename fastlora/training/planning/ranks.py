"""The part of plan() about several ranks: layouts of the base, and what travels in a step."""

from typing import Any, NamedTuple

from torch.utils._pytree import tree_leaves

from fastlora.arguments import argument_problems, describe, one_of, whole_number
from fastlora.distributed.cost import LINKS, NETWORKS, Bytes, Cluster, shard_choices, step_cost
from fastlora.models.state import ModelState, require_adapter
from fastlora.training.planning.memory import BaseBytes
from fastlora.training.planning.time import forward_seconds, head_seconds, product_share


class Layout(NamedTuple):
    """How a base is kept."""

    shard: int  # ranks that share it
    host: bool  # whether its parts are in host memory


def cluster_problems(devices: Any, nodes: Any, link: Any, network: Any, shard: Any) -> list[str]:
    """Problems with `plan`'s arguments about ranks."""
    problems = argument_problems(
        {
            "devices": (devices, whole_number(1)),
            "nodes": (nodes, whole_number(1)),
            "link": (link, one_of(*LINKS)),
            "network": (network, one_of(*NETWORKS)),
        }
    )
    if problems or (isinstance(shard, str) and shard in ("auto", "host")):
        return problems
    ranks = devices * nodes
    if type(shard) is not int or shard < 1 or ranks % shard:
        problems.append(
            f'shard={describe(shard)}: expected "auto", "host" or a divisor of the {ranks} ranks'
        )
    return problems


def layouts_of(shard: int | str, cluster: Cluster) -> list[Layout]:
    """The layouts to choose from."""
    if shard == "host":
        return [Layout(cluster.devices, True)]
    if isinstance(shard, int):
        return [Layout(shard, False)]
    return [Layout(n, False) for n in shard_choices(cluster)]


def transfers(
    model: ModelState,
    batch_size: int,
    seq_length: int,
    seconds: float | None,
    layout: Layout,
    cluster: Cluster,
    base: BaseBytes,
) -> dict[str, Any]:
    """The figures of an `Option` that depend on the ranks.

    Args:
        model: the model.
        batch_size: sequences of a rank's micro-batch.
        seq_length: tokens of each.
        seconds: of the step's computation; None if the card's rates are not known.
        layout: of the base.
        cluster: the machines.
        base: sizes of its tensors.
    """
    _, adapter = require_adapter(model)
    tied = base.ends == base.head  # one matrix, which is fetched as embedding and as head
    sizes = Bytes(
        layers=model.spec.config.num_hidden_layers,
        layer=base.layer,
        all_layers=base.layers,
        ends=base.ends + (base.head if tied else 0),
        adapter=4 * sum(x.numel() for x in tree_leaves(adapter)),
    )
    forward = forward_seconds(model, batch_size, seq_length)
    compute = forward if seconds is None else seconds
    backward = compute - forward - head_seconds(model, batch_size, seq_length)
    share = product_share(model, batch_size, seq_length)
    cost = step_cost(sizes, cluster, *layout, forward, max(0.0, backward), share)
    known = seconds is not None
    return dict(
        shard=layout.shard,
        replicate=cluster.ranks // layout.shard,
        host=layout.host,
        gathered_bytes=cost.gathered_bytes,
        copied_bytes=cost.copied_bytes,
        summed_bytes=cost.summed_bytes,
        exposed_seconds=cost.exposed_seconds if known else None,
        step_seconds=seconds + cost.exposed_seconds if known else None,
    )
