"""Per-example gradients in the layers: which token belongs to which example, and the records.

The forward pass is that of one adapter. Each matrix of LoRA has a sink
(ops/linear/group_gradients.py), which gets the matrix's gradients by example in the backward pass.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fastlora.models.params import Adapter, AdapterRecord, ExampleLoRA, LayerAdapter, Linear
from fastlora.models.stacks import group_ends
from fastlora.ops.dropout import dropout, fold, key_and_row
from fastlora.ops.linear.frozen import frozen_linear
from fastlora.ops.linear.group_gradients import with_group_gradients
from fastlora.ops.linear.group_products import Groups
from fastlora.ops.linear.lora import lora_linear
from fastlora.runtime.per_example import PerExample


class ExampleRows(NamedTuple):
    """The examples of a batch, as the layers use them."""

    groups: Groups  # of the batch's tokens, by example
    sinks: Adapter  # like the adapter, with a Sink in place of each tensor


def example_rows(
    examples: PerExample,
    adapter_ids: Int[Tensor, "b"] | Int[Tensor, "b t"] | None,
    input_ids: Int[Tensor, "b t"],
) -> ExampleRows:
    """The examples of a batch, after `examples.begin`.

    Args:
        examples: the adapter, and what to compute from its gradients.
        adapter_ids: the example of each row or of each token; None: row i is example i.
        input_ids: the batch.
    """
    assert examples.n is not None
    groups = Groups()
    if adapter_ids is not None:
        wide = adapter_ids.view(len(adapter_ids), -1).expand_as(input_ids)
        groups = _groups_of(wide.flatten(), examples.n, input_ids.device)
    return ExampleRows(groups, examples.sinks())


def _groups_of(ids: Int[Tensor, "m"], n: int, device: torch.device) -> Groups:
    """The groups of tokens by their ids. Ids on the CPU are read: equal groups are faster."""
    readable = ids.device.type == "cpu" and not torch.compiler.is_compiling()
    equal = readable and len({*ids.bincount(minlength=n).tolist()}) == 1
    is_sorted = readable and bool((ids[1:] >= ids[:-1]).all())
    ids = ids.to(device)
    order = ids.argsort(stable=True)
    ends = None if equal else group_ends(ids[order], n)
    return Groups(ends, None if is_sorted else order)


def number_of_examples(
    examples: PerExample, adapter_ids: Any, input_ids: Int[Tensor, "b t"]
) -> int:
    """How many examples a batch has: its rows, or the largest of adapter_ids, plus one.

    The number of an earlier call in fn counts too: there may be examples without a row here.
    """
    if not isinstance(adapter_ids, Tensor) or adapter_ids.is_floating_point():
        return len(input_ids)
    if not adapter_ids.numel():  # of a wrong shape
        return examples.n or 0
    # Of ids on a GPU, this waits for it.
    return max(int(adapter_ids.max()) + 1, examples.n or 0)


def example_records(adapter: LayerAdapter, rows: ExampleRows, layer: int) -> LayerAdapter:
    """One layer's records, cast, with their sinks and groups."""
    sinks: Any = rows.sinks["layers"][layer]
    return {
        name: ExampleLoRA(x.a, x.b, sinks[name].a, sinks[name].b, rows.groups)
        for name, x in adapter.items()
    }


def example_project(
    x: Float[Tensor, "b t d_in"],
    linears: Sequence[Linear],
    records: Sequence[AdapterRecord | None],
    scalings: Sequence[float],
    salts: Sequence[int],
    p: float,
    key: Int[Tensor, ""] | None,
) -> list[Float[Tensor, "b t _"]]:
    """Projections of x, of which at least one has an ExampleLoRA, and each has one or None.

    Args:
        x: the projections' common input.
        linears: the frozen layers.
        records: their adapters.
        scalings: factor of each low-rank term.
        salts: number of each projection in the layer's dropout keys.
        p: dropout probability of the low-rank terms' input.
        key: of the layer's dropout masks; None: without dropout.
    """
    adapted = {i: record for i, record in enumerate(records) if isinstance(record, ExampleLoRA)}
    if key is None:  # all A as one matrix, so that one product reads x once
        x_a = _x_a(x, [*adapted.values()])
        ranks = [record.a.shape[0] for record in adapted.values()]
        columns = dict(zip(adapted, x_a.split(ranks, -1), strict=True))
    else:
        layer_key, first_row = key_and_row(key)
        columns = {}
        for i, record in adapted.items():
            masked = dropout(x, p, fold(layer_key, salts[i]), first_row)
            columns[i] = _x_a(masked, [record])
    ys = []
    for i, (linear, scaling) in enumerate(zip(linears, scalings, strict=True)):
        weight, bias = linear["weight"], linear.get("bias")
        if i not in adapted:
            ys.append(frozen_linear(x, weight, bias))
            continue
        record, x_a = adapted[i], columns[i]
        y = lora_linear(x, x_a, weight, bias, record.b, scaling)
        sinks, sizes = [record.sink_b], [record.b.shape[0]]
        ys.append(with_group_gradients(y, x_a, sinks, sizes, record.groups, scaling))
    return ys


def _x_a(x: Float[Tensor, "b t d_in"], records: Sequence[ExampleLoRA]) -> Float[Tensor, "b t _"]:
    """x times the A' of all records, with the sinks of these matrices."""
    matrices = [record.a for record in records]
    x_a = F.linear(x, matrices[0] if len(matrices) == 1 else torch.cat(matrices))
    sinks, sizes = [record.sink_a for record in records], [a.shape[0] for a in matrices]
    return with_group_gradients(x_a, x, sinks, sizes, records[0].groups)
