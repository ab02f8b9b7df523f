"""StackUpdate: the update of all runs of a pass, from one gradient of their stack.

Eight adapters of a 1B model are 1,792 tensors. The host needs 7 ms to launch their AdamW, and a
pass over 8 rows of 128 tokens takes only 14 ms on an H200. For passes as small as this the whole
update is recorded in a CUDA graph: norms, clipping, AdamW and the new stack.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.linalg import vector_norm

from fastlora.runtime.cuda_graph import CUDAGraphed
from fastlora.training.many.stack import RunStack
from fastlora.training.optimizers import finish_updates, is_recordable, queue_updates
from fastlora.training.parameter_groups import update_differences


class Updated(NamedTuple):
    """The figures of an update."""

    losses: list[float]  # each run's mean loss
    norms: list[float]  # of each run's gradient, before clipping
    of_gradient: Float[Tensor, "leaves n"]  # norms of the runs' parts of each leaf
    of_change: Float[Tensor, "leaves n"]


class StackUpdate:
    """The update of one stack; a new stack needs a new one."""

    def __init__(self, stack: RunStack, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Nothing is run or allocated.

        Args:
            stack: of the runs. If its gradient is replayed from a CUDA graph, so is the update,
                unless an optimizer is not our fused AdamW: others wait for the device, or count
                updates on the host.
            optimizers: of the runs, over their own tensors.
        """
        self.stack, self.optimizers = stack, optimizers
        self.waits = not all(map(is_recordable, optimizers))
        self.graphed = stack.graphed and not self.waits
        run = partial(_queued if self.waits else _updated, stack, optimizers)
        self.run = CUDAGraphed(run) if self.graphed else run

    @torch.no_grad()
    def __call__(
        self,
        gradient: list[Tensor],
        sums: Float[Tensor, "n"],
        scales: Float[Tensor, "n"],
        tokens: Float[Tensor, "n"],
        limits: Float[Tensor, "n"],
        rates: Sequence[float],
    ) -> Updated:
        """Write to the runs' tensors, their optimizers and the stack.

        A run whose loss or gradient is NaN or infinite is not changed.

        Args:
            gradient: of each leaf of the stack, of the scaled sums of losses.
            sums: each run's sum of losses.
            scales: the factors on them.
            tokens: that each run's sum is over.
            limits: of the norm of each run's gradient; inf: none.
            rates: learning rates.
        """
        given: Sequence[float] | Tensor = rates
        if self.graphed:  # a recording would keep numbers as constants
            # Without waiting: the gradient is still being computed.
            given = torch.tensor(rates, dtype=torch.float32, device="cpu")
            given = given.to(sums.device, non_blocking=True)
        figures, of_gradient, *more = self.run(gradient, sums, scales, tokens, limits, given)
        if self.waits:
            values = finish_updates(self.optimizers, figures)
            of_change = _refreshed(self.stack, self.optimizers)
        else:
            values, (of_change,) = figures.tolist(), more
        losses, norms = [x for x, _ in values], [x for _, x in values]
        return Updated(losses, norms, of_gradient, of_change)


def _updated(
    stack: RunStack, optimizers: Sequence[torch.optim.Optimizer], *given: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """(losses and norms, norms of the gradient's leaves, norms of the leaves' changes), without
    waiting for the device. `given` are the other arguments of `_queued`."""
    return *_queued(stack, optimizers, *given), _refreshed(stack, optimizers)


def _queued(
    stack: RunStack,
    optimizers: Sequence[torch.optim.Optimizer],
    gradient: list[Tensor],
    sums: Float[Tensor, "n"],
    scales: Float[Tensor, "n"],
    tokens: Float[Tensor, "n"],
    limits: Float[Tensor, "n"],
    rates: Sequence[float] | Float[Tensor, "n"],
) -> tuple[Float[Tensor, "n 2"], Float[Tensor, "leaves n"]]:
    """(losses and norms, norms of the gradient's leaves). Optimizers that wait for the device have
    not written yet; `finish_updates` lets them."""
    inverse = 1 / (scales * tokens)
    of_gradient = leaf_norms(gradient) * inverse
    norms = vector_norm(of_gradient, dim=0)
    clipping = (limits / (norms + 1e-6)).clamp(max=1.0)  # as clip_grad_norm_
    _set_gradients(stack, [g * _column(inverse * clipping, g) for g in gradient])
    return queue_updates(optimizers, rates, sums / tokens, norms), of_gradient


def _refreshed(
    stack: RunStack, optimizers: Sequence[torch.optim.Optimizer]
) -> Float[Tensor, "leaves n"]:
    """Clear gradients and copy the runs' tensors into the stack; the norms of the changes."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    before = [leaf.clone() for leaf in stack.leaves]
    stack.refresh()
    return leaf_norms(update_differences(stack.leaves, before))


def leaf_norms(tensors: Sequence[Tensor]) -> Float[Tensor, "leaves n"]:
    """The norm of each run's part of each tensor; padding is zero."""
    return torch.stack([vector_norm(x.flatten(1), dim=1) for x in tensors])


def _column(values: Float[Tensor, "n"], like: Tensor) -> Tensor:
    """One value for each run, to multiply a leaf of the stack with."""
    return values.to(like.dtype).view(-1, *[1] * (like.dim() - 1))


def _set_gradients(stack: RunStack, scaled: Sequence[Tensor]) -> None:
    """The `.grad` of each run's tensors."""
    for parts, own in zip(stack.parts(scaled), stack.own, strict=True):
        for part, leaf in zip(parts, own, strict=True):
            if part is not None and leaf is not None:
                leaf.grad = part.to(leaf.dtype).contiguous()
