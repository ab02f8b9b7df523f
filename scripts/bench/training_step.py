"""The training step of the benchmarks: a gradient of adapters, and fused AdamW."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from fastlora.training.optimizers import step_together

Gradient = Callable[..., tuple[torch.Tensor, list[torch.Tensor]]]


def training_step(
    adapter: Any,
    value_and_grad: Callable[..., tuple[torch.Tensor, Any]],
    learning_rate: float,
    *,
    stacked: bool = False,
) -> tuple[Gradient, Callable[..., torch.Tensor]]:
    """(the gradient, the whole step), of a copy of an adapter, or of a stack of adapters.

    The first returns the value and the gradient of each leaf, the second the value. Both take the
    arguments of `value_and_grad` that follow the adapter.

    Args:
        adapter: a tree, which is not changed.
        value_and_grad: (adapter, *arguments) -> value and gradient.
        learning_rate: of AdamW.
        stacked: the adapter is a stack of several, which get an optimizer each.
    """
    leaves, structure = tree_flatten(adapter)
    leaves = [leaf.clone() for leaf in leaves]
    parts = [[*leaf] if stacked else [leaf] for leaf in leaves]  # the slices are views
    optimizers = [
        torch.optim.AdamW(own, lr=learning_rate, fused=leaves[0].is_cuda)
        for own in zip(*parts, strict=True)
    ]

    def gradient(*args: Any, **more: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
        value, grads = value_and_grad(tree_unflatten(leaves, structure), *args, **more)
        return value, tree_leaves(grads)

    def step(*args: Any, **more: Any) -> torch.Tensor:
        value, grads = gradient(*args, **more)
        for part, grad in zip(parts, grads, strict=True):
            for x, g in zip(part, grad if stacked else [grad], strict=True):
                x.grad = g
        step_together(optimizers)
        for optimizer in optimizers:
            optimizer.zero_grad()
        return value

    return gradient, step
