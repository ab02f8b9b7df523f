"""Run a function of (adapter, base, spec, inputs) over rows that use a stack of adapters."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils._pytree import tree_map

from fastlora.models.examples import example_rows, number_of_examples
from fastlora.models.params import Adapter, Base
from fastlora.models.spec import Spec
from fastlora.models.stacks import runs_in_groups, scaled_stack, stack_rows, stack_size
from fastlora.models.state import Seed
from fastlora.ops.dispatch import transforms_active
from fastlora.runtime.per_example import PerExample

Inputs = dict[str, Tensor | None]  # input_ids, and what else is given; of b rows or one row
AdapterIds = Int[Tensor, "b"] | Int[Tensor, "b t"] | None


def for_each_row(
    run: Callable[..., Any],
    adapter: Adapter | PerExample | None,
    base: Base,
    spec: Spec,
    inputs: Inputs,
    seed: Seed,
    adapter_ids: AdapterIds,
) -> Any:
    """run(adapter, base, spec, inputs, seed), in which each row has its adapter of a stack, or its
    example's gradient.

    `run` returns a tensor, or a tree of tensors, with a row for each row of the inputs.
    """
    if isinstance(adapter, PerExample):
        return _for_each_example(run, adapter, base, spec, inputs, seed, adapter_ids)
    n, input_ids = stack_size(adapter), inputs["input_ids"]
    if adapter is None or n is None:
        return run(adapter, base, spec, inputs, seed)
    assert input_ids is not None
    by_token = adapter_ids is not None and adapter_ids.dim() == 2
    if runs_in_groups(adapter, base, spec) and (by_token or not transforms_active()):
        rows = stack_rows(adapter_ids, n, input_ids)
        ordered = {name: None if x is None else rows.sort(x) for name, x in inputs.items()}
        return tree_map(rows.unsort, run(adapter, base, spec, ordered, seed, rows=rows))
    if adapter_ids is None:
        b, device = len(input_ids), input_ids.device
        adapter_ids = torch.arange(b, device=device) // (b // n)
    return _row_by_row(run, adapter, base, spec, inputs, seed, adapter_ids)


def _for_each_example(
    run: Callable[..., Any],
    examples: PerExample,
    base: Base,
    spec: Spec,
    inputs: Inputs,
    seed: Seed,
    adapter_ids: AdapterIds,
) -> Any:
    """run(adapter, base, spec, inputs, seed), whose derivative gives each example's gradient."""
    input_ids, adapter = inputs["input_ids"], examples.tree
    assert input_ids is not None
    if not torch.is_grad_enabled():
        return run(adapter, base, spec, inputs, seed)
    examples.begin(number_of_examples(examples, adapter_ids, input_ids))
    if runs_in_groups(adapter, base, spec) and not transforms_active():
        rows = example_rows(examples, adapter_ids, input_ids)
        return run(adapter, base, spec, inputs, seed, examples=rows)
    if adapter_ids is None:
        adapter_ids = torch.arange(len(input_ids), device=input_ids.device)
    ids = adapter_ids.to(input_ids.device)
    return _row_by_row(run, examples.stack(), base, spec, inputs, seed, ids)


def _row_by_row(
    run: Callable[..., Any],
    stack: Adapter,
    base: Base,
    spec: Spec,
    inputs: Inputs,
    seed: Seed,
    adapter_ids: Int[Tensor, "b"],
) -> Any:
    """The results of row i under its adapter, by torch.vmap."""
    # One adapter per row: 45 MB each in float32 for rank 16 on all projections of Llama 3.2 1B.
    adapters = tree_map(lambda x: x[adapter_ids], scaled_stack(stack, spec))
    input_ids = inputs["input_ids"]
    assert input_ids is not None
    b = len(input_ids)
    each = {name: x.expand(b, *x.shape[1:]) for name, x in inputs.items() if x is not None}
    # Dropout masks have one row per token of the batch.
    number = torch.arange(b, device=input_ids.device)
    seed_dim = None
    if isinstance(seed, Tensor) and seed.dim() == 1:
        seed_dim = 0
        number = (adapter_ids[:, None] == adapter_ids).tril(-1).sum(1)
        seed = seed[adapter_ids]

    def one(adapter: Adapter, row: dict[str, Tensor], first_row: Tensor, seed: Seed) -> Any:
        rows: Inputs = {name: x[None] for name, x in row.items()}
        return tree_map(lambda y: y[0], run(adapter, base, spec, rows, seed, first_row))

    return torch.vmap(one, (0, 0, 0, seed_dim))(adapters, each, number * input_ids.shape[1], seed)
