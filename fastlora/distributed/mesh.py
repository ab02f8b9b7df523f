"""Groups of ranks, on a DeviceMesh; those that share a base, by `load`'s argument `shard`.

Ranks with consecutive numbers, which torchrun starts on one machine, are a group. A mesh of shards
has two dimensions, "replicate" and "shard": a group shares a base, and every group holds all of it.
"""

import os
from typing import Any

import torch
import torch.distributed as dist

from fastlora.arguments import Rule, describe
from fastlora.distributed.gathered_bytes import Gathers
from fastlora.distributed.host_shards import HostCopies
from fastlora.distributed.peer_copies import PeerCopies, ranks_read_peers
from fastlora.distributed.process_group import start_group
from fastlora.distributed.sharded_base import Shards

SHARD = Rule(
    lambda x: (
        x is None
        or (type(x) is str and x in ("auto", "node", "host"))
        or (type(x) is int and x >= 1)
        or _is_mesh(x)
    ),
    'None, "auto", "node", "host", a number of ranks, or a DeviceMesh of one dimension, or of two'
    " of which the last one shards",
)

# A group of the second dimension shares a base.
SHARD_DIMENSIONS = ("replicate", "shard")

# Of a card's memory, the share that "auto" gives to the base. Adapter, moments and activations need
# the rest; `plan` counts them.
_SHARE_OF_BASE = 0.6


def _is_mesh(x: Any) -> bool:
    # By name: importing the class takes 0.3 s.
    return type(x).__name__ == "DeviceMesh" and getattr(x, "ndim", 0) in (1, 2)


def world_size() -> int:
    """Ranks of the process group, or those that torchrun or another launcher has started."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def node_size() -> int:
    """Ranks of this machine."""
    return min(int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size()))), world_size())


def group_problem(argument: str, ranks: int) -> str | None:
    """Why the ranks that there are do not divide into groups of so many; None if they do.

    Args:
        argument: that asks for the groups, with its value: "shard=4".
        ranks: of a group.
    """
    world = world_size()
    if world == 1 and ranks != 1:
        return f"{argument}: this is the only rank; start several with torchrun"
    if world % ranks:
        return f"{argument}: the {world} ranks do not divide into groups of {ranks}"
    return None


def group_mesh(ranks: int, device: torch.device, names: tuple[str, str]) -> Any:
    """A DeviceMesh of groups of this many consecutive ranks, which are its last dimension.

    Starts the default process group if there is none.
    """
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415  0.3 s

    start_group(device)
    shape = (dist.get_world_size() // ranks, ranks)
    return init_device_mesh(device.type, shape, mesh_dim_names=names)


def shard_problem(shard: Any) -> str | None:
    """Why a valid value of `shard` does not fit the ranks that there are; None if it does."""
    if _is_mesh(shard) or shard in (None, "host", "auto"):
        return None
    return group_problem(f"shard={describe(shard)}", node_size() if shard == "node" else shard)


def fewest_ranks(base_bytes: int, memory: int) -> int:
    """The fewest ranks of a node, a divisor of their number, over which a base fits.

    Args:
        base_bytes: of the whole base.
        memory: of one card.
    """
    ranks = [n for n in range(1, node_size() + 1) if node_size() % n == 0]
    fitting = [n for n in ranks if base_bytes / n <= _SHARE_OF_BASE * memory]
    return (fitting or ranks[-1:])[0]


def keeps_whole(shard: Any, device: torch.device, base_bytes: int) -> bool:
    """Whether every rank keeps the whole base on its device, as with shard=None.

    The arguments are those of `shards_for`.
    """
    if _is_mesh(shard) or shard == "host":
        return False
    return shard is None or _ranks(shard, device, base_bytes) == 1


def shards_for(shard: Any, device: torch.device, base_bytes: int) -> Shards:
    """Where the parts of a base are kept.

    All ranks must call this with the same `shard`.

    Args:
        shard: a value of `load`'s argument, without a `shard_problem`, that does not `keeps_whole`.
        device: that computes.
        base_bytes: of the whole base, for "auto".
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)  # streams, NCCL and Triton use the current device
    if _is_mesh(shard):
        host, mesh = None, _last_dimension(shard)
    else:
        host = HostCopies(device) if shard == "host" else None
        ranks = _ranks(shard, device, base_bytes)
        if host is not None and ranks == 1:
            return Shards(host)
        mesh = group_mesh(ranks, device, SHARD_DIMENSIONS)["shard"]
    group = mesh.get_group()
    peers = host is None and ranks_read_peers(group, device)
    source = PeerCopies(group, device) if peers else Gathers(group, device, host)
    return Shards(source, source.rank, source.ranks, group)


def _last_dimension(mesh: Any) -> Any:
    return mesh if mesh.ndim == 1 else mesh[mesh.mesh_dim_names[-1]]


def _ranks(shard: Any, device: torch.device, base_bytes: int) -> int:
    if shard in ("node", "host"):
        return node_size()
    if shard == "auto":
        if device.type != "cuda":
            return node_size()
        memory = torch.cuda.get_device_properties(device).total_memory
        return fewest_ranks(base_bytes, memory)
    return shard
