"""A stack of n adapters over one base: which row of a batch uses which, and the layers' records.

A stack is an adapter tree whose leaves are [n, ...]. Of all that a decoder computes, only the
low-rank products depend on a row's adapter. So the rows are sorted by adapter, all layers run over
all rows as for one adapter, and `stacked_project` computes the low-rank products group by group
(ops/linear/stacked_lora.py). No transform is active: compiled layers, recomputation, attention
kernels and the chunked loss run as they do for one adapter.

B is multiplied by the adapter's scaling before it is cast. Scalings that differ between adapters
are in `Spec.stack_factors`. They are not leaves of the tree, so they are not trained.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastlora.models.init_offset import has_offset
from fastlora.models.params import (
    Adapter,
    AdapterRecord,
    Base,
    ExpertLoRA,
    LayerAdapter,
    Linear,
    LoRA,
    StackedLoRA,
)
from fastlora.models.spec import Spec
from fastlora.models.state import ModelState
from fastlora.ops.dropout import fold, key_and_row, row_dropout
from fastlora.ops.linear.group_products import Groups
from fastlora.ops.linear.stacked_lora import StackedBranch, stacked_linears


class StackRows(NamedTuple):
    """Which adapter of a stack each row of a batch uses. The decoder runs the rows sorted."""

    groups: Groups  # of the batch's tokens, in sorted rows
    order: Int[Tensor, "b"] | None  # sorted row -> row of the batch; None: they are sorted
    # Of each sorted row: its adapter, its number in the batch, and its number among the rows of its
    # adapter. None if tokens of one row use different adapters.
    adapter: Int[Tensor, "b"] | None
    number: Int[Tensor, "b"]
    number_in_group: Int[Tensor, "b"] | None
    # Tokens in a row of each adapter's own batch, if rows are padded to those of other adapters;
    # None: the rows have the length that they have there.
    widths: Int[Tensor, "n"] | None = None

    def sort(self, x: Tensor) -> Tensor:
        """Rows of the batch in sorted order. A tensor of one row is shared by all of them."""
        return x if self.order is None or x.shape[0] == 1 else x[self.order]

    def unsort(self, y: Tensor) -> Tensor:
        """The inverse of `sort`."""
        if self.order is None:
            return y
        index = torch.arange(y.shape[0], device=y.device)
        return y[torch.zeros_like(index).scatter(0, self.order, index)]


def stack_size(adapter: Adapter | None) -> int | None:
    """How many adapters a stack holds; None: the tree is one adapter, or there is none."""
    if adapter is None:
        return None
    records = [x for layer in adapter["layers"] for x in layer.values()]
    outside: Any = adapter
    records += [outside[key] for key in ("embed_tokens", "lm_head") if key in adapter]
    if records:
        one, a = 3 if isinstance(records[0], ExpertLoRA) else 2, records[0].a
        return a.shape[0] if a.dim() == one + 1 else None
    rows = [*adapter.get("tokens", {}).values()]
    if rows:
        return rows[0].shape[0] if rows[0].dim() == 3 else None
    # An adapter of trained copies alone: a copy of a norm, a bias or a matrix.
    for name, copy in adapter.get("replaced", {}).items():
        matrix = name.endswith(("_proj.weight", "embed_tokens.weight", "lm_head.weight"))
        one = 2 if matrix or name.endswith("mlp.gate.weight") else 1
        return copy.shape[0] if copy.dim() == one + 1 else None
    leaves = tree_leaves(adapter)
    assert not leaves, "an adapter without records, rows and copies has no tensors"
    return None


def one_adapter_problems(model: ModelState) -> list[str]:
    """Why a function of one adapter cannot use this model: it has a stack."""
    if (n := stack_size(model.adapter)) is None:
        return []
    return [
        f"model.adapter is a stack of {n} adapters, where one is needed; take it apart with"
        " functional.unstack(model.adapter, models), and pass a model with one adapter"
    ]


def check_one_adapter(model: ModelState) -> None:
    """Refuse a stack of adapters.

    Raises:
        ValueError: the model's adapter is a stack.
    """
    if problems := one_adapter_problems(model):
        raise ValueError(f"{problems[0]}.")


def runs_in_groups(stack: Adapter, base: Base, spec: Spec) -> bool:
    """Whether the layers can run a stack group by group: LoRA in the layers and nothing else."""
    if spec.qat_scheme is not None or stack.keys() != {"layers"} or has_offset(base):
        return False
    return all(
        isinstance(x, LoRA | ExpertLoRA) for layer in stack["layers"] for x in layer.values()
    )


# ── rows ──────────────────────────────────────────────────────────────────────────────────


def stack_rows(
    adapter_ids: Int[Tensor, "b"] | Int[Tensor, "b t"] | None,
    n: int,
    input_ids: Int[Tensor, "b t"],
) -> StackRows:
    """The rows of a batch under a stack of n adapters.

    Ids on the CPU are read: if every adapter has the same number of rows, the low-rank products are
    batched products. Ids on a GPU are not read, which would wait for it; an id outside of [0, n)
    then gives the results of some adapter.

    Args:
        adapter_ids: the adapter of each row, or of each token; None: b / n rows for each adapter,
            those of adapter 0 first.
        n: number of adapters.
        input_ids: the batch.
    """
    (b, t), device = input_ids.shape, input_ids.device
    number = torch.arange(b, device=device)
    if adapter_ids is None:
        adapter = number // (b // n)
        return StackRows(Groups(), None, adapter, number, number % (b // n))
    if adapter_ids.dim() == 2:
        flat = adapter_ids.to(device).flatten()
        order = flat.argsort(stable=True)
        groups = Groups(group_ends(flat[order], n), order)
        return StackRows(groups, None, None, number, None)
    readable = adapter_ids.device.type == "cpu" and not torch.compiler.is_compiling()
    ids = sorted(adapter_ids.tolist()) if readable else []
    equal = b % n == 0 and ids == [i // (b // n) for i in range(b)]
    adapter_ids = adapter_ids.to(device)
    order = adapter_ids.argsort(stable=True)
    adapter = adapter_ids[order]
    ends = group_ends(adapter, n)
    first = torch.cat([ends.new_zeros(1), ends[:-1]]).long()[adapter.clamp(0, n - 1)]
    groups = Groups() if equal else Groups(ends * t)
    is_sorted = readable and adapter_ids.tolist() == ids
    return StackRows(groups, None if is_sorted else order, adapter, order, number - first)


def group_ends(ids: Int[Tensor, "m"], n: int) -> Tensor:
    """The end of each group of sorted ids, int32. The last is m, so that no row is left out."""
    ends = (ids[:, None] <= torch.arange(n, device=ids.device)).sum(0).to(torch.int32)
    return torch.cat([ends[:-1], ends.new_full((1,), ids.shape[0])])


def row_keys(
    key: Int[Tensor, "*n"], rows: StackRows, t: int
) -> tuple[Int[Tensor, "b"], Int[Tensor, "b"]]:
    """(dropout key, first row of the masks) of each sorted row.

    One seed for all: a row has the masks that it has in this batch under a single adapter. A seed
    for each adapter: it has the masks that it has in a batch of its adapter's rows alone.

    Args:
        key: the result of `decoder.dropout_key`, without dimensions or [n].
        rows: of the batch.
        t: tokens in a row.
    """
    if key.dim() == 0:
        return key.expand(rows.number.shape), rows.number * t
    assert rows.adapter is not None and rows.number_in_group is not None
    width = t if rows.widths is None else rows.widths[rows.adapter]
    return key[rows.adapter], rows.number_in_group * width


# ── layers ────────────────────────────────────────────────────────────────────────────────


def factor_tensors(
    spec: Spec, device: torch.device
) -> Sequence[dict[str, Float[Tensor, "n"]]] | None:
    """For each layer the factors of `Spec.stack_factors`; None: the adapters' scalings are equal.

    Equal factors are one tensor. Layers mostly have the same ones, so there are few.
    """
    if not spec.stack_factors:
        return None
    made: dict[tuple[float, ...], Tensor] = {}
    full = lambda x: torch.full((), x, dtype=torch.float64, device=device)
    for layer in spec.stack_factors:
        for _, factors in layer:
            # torch.tensor would copy from pageable host memory, which waits for the GPU.
            if factors not in made:
                made[factors] = torch.stack([full(x) for x in factors])
    return [{name: made[factors] for name, factors in layer} for layer in spec.stack_factors]


def scaled_layer(
    adapter: LayerAdapter, factors: Mapping[str, float | Float[Tensor, "n"]]
) -> LayerAdapter:
    """One layer of a stack with every B times its factors; the same object if all are 1."""

    def scaled(record: AdapterRecord, factor: float | Tensor) -> AdapterRecord:
        if not isinstance(factor, Tensor):
            return record._replace(b=record.b * factor)
        wide = torch.promote_types(record.b.dtype, torch.float32)
        column = factor.to(wide).view(-1, *[1] * (record.b.dim() - 1))
        return record._replace(b=(record.b * column).to(record.b.dtype))

    new = {
        name: scaled(adapter[name], x)
        for name, x in factors.items()
        if name in adapter and (isinstance(x, Tensor) or x != 1.0)
    }
    return adapter | new if new else adapter


def scaled_stack(stack: Adapter, spec: Spec) -> Adapter:
    """A stack with its factors in every B, for code that reads `Spec.lora`'s scalings alone."""
    factors = factor_tensors(spec, tree_leaves(stack)[0].device)
    if factors is None:
        return stack
    layers = tuple(scaled_layer(x, f) for x, f in zip(stack["layers"], factors, strict=True))
    return Adapter(**stack | {"layers": layers})


def grouped_records(adapter: LayerAdapter, groups: Groups) -> LayerAdapter:
    """One layer's records, scaled and cast, with the groups that `stacked_project` needs."""
    return {name: StackedLoRA(x.a, x.b, groups) for name, x in adapter.items()}


def stacked_project(
    x: Float[Tensor, "b t d_in"],
    linears: Sequence[Linear],
    records: Sequence[AdapterRecord | None],
    salts: Sequence[int],
    dropout: float,
    key: Int[Tensor, "b"] | None,
    fused_weight: Float[Tensor, "d_out d_in"] | None,
) -> list[Float[Tensor, "b t d_out"]]:
    """Projections of x, of which at least one has a StackedLoRA, and each has one or None.

    Args:
        x: the projections' common input.
        linears: the frozen layers.
        records: their adapters, with the scalings in B.
        salts: number of each projection in the layer's dropout keys.
        dropout: share of x that the low-rank terms do not see.
        key: of the layer's dropout masks, for each row; None: without dropout.
        fused_weight: the weights as one matrix, if there is one.
    """
    stacks = [record for record in records if isinstance(record, StackedLoRA)]
    branches = [
        StackedBranch(linear["weight"], linear.get("bias"), *(record or (None, None))[:2])
        for linear, record in zip(linears, records, strict=True)
    ]
    masked = None
    if key is not None:
        keys, first_rows = key_and_row(key)
        masked = [
            row_dropout(x, dropout, fold(keys, salt), first_rows) if record is not None else x
            for record, salt in zip(records, salts, strict=True)
        ]
    return stacked_linears(x, branches, stacks[0].groups, masked, fused_weight)
