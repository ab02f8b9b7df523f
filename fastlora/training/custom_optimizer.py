"""Optimizers that a user's function makes, such as torch.optim.NAdam: built, tried out, counted.

The state of such an optimizer may have any form, so it is learned from a step with zero gradients.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastlora.arguments import describe

Groups = list[dict[str, Any]]

# (torch's parameter groups, each with "params", "lr" and "weight_decay") -> the optimizer.
OptimizerFactory = Callable[[Groups], torch.optim.Optimizer]

# Attribute of an optimizer that a user's function made: the updates that were begun. Optimizers
# such as SGD count no steps, and a run must know whether an update was interrupted.
_UPDATES = "fastlora_updates"


def build(factory: OptimizerFactory, groups: Groups) -> torch.optim.Optimizer:
    """The optimizer that a function makes.

    Raises:
        TypeError: the function returned something else, or an optimizer of other tensors.
    """
    optimizer = factory(groups)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer(...) returned {describe(optimizer)}: expected a torch.optim.Optimizer"
        )
    given = [id(p) for group in groups for p in group["params"]]
    if sorted(given) != sorted(id(p) for g in optimizer.param_groups for p in g["params"]):
        raise TypeError("optimizer(groups) trains other tensors than groups has: pass groups on")
    setattr(optimizer, _UPDATES, 0)
    return optimizer


def trial_problems(factory: OptimizerFactory, leaves: Sequence[Tensor]) -> list[str]:
    """Why a user's optimizer cannot train these tensors, from one step on tensors of one element.

    They have the dtypes, devices and numbers of dimensions of the leaves.
    """
    kinds = {(leaf.dim(), leaf.dtype, leaf.device) for leaf in leaves}
    small = [torch.zeros((1,) * dim, dtype=dtype, device=at) for dim, dtype, at in kinds]
    groups: Groups = [{"params": small, "lr": 0.0, "weight_decay": 0.0}]
    try:
        optimizer = build(factory, groups)
        before = [_settings(group) for group in optimizer.param_groups]
        make_states(optimizer)
    # What torch's and other libraries' optimizers raise for groups that they cannot use.
    except (TypeError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        name = getattr(factory, "__name__", type(factory).__name__)
        return [f"optimizer={name} failed on a trial step: {type(error).__name__}: {error!s:.300}"]
    problems = []
    if before != [_settings(group) for group in optimizer.param_groups]:
        # Checkpoints hold the state of each tensor only.
        problems.append(
            f"optimizer: {type(optimizer).__name__} keeps state in its parameter groups, so a run"
            " could not be resumed with the same bits"
        )
    values = [value for state in optimizer.state.values() for value in state.values()]
    wrong = {describe(v) for v in values if not isinstance(v, Tensor | int | float | None)}
    if wrong:
        problems.append(
            f"optimizer: {type(optimizer).__name__} keeps {sorted(wrong)} in its state; expected"
            " tensors and numbers, which checkpoints can hold"
        )
    return problems


def _settings(group: dict[str, Any]) -> dict[str, str]:
    return {name: repr(value) for name, value in group.items() if name != "params"}


def optimizer_identity(factory: OptimizerFactory) -> str:
    """The class of a user's optimizer and its settings, by which two runs are compared."""
    # A matrix, as A and B are: Muon takes no vectors.
    param = torch.zeros(1, 1, dtype=torch.float32, device="cpu")
    optimizer = build(factory, [{"params": [param], "lr": 0.0, "weight_decay": 0.0}])
    # The rate and the decay are arguments of train, which are compared themselves.
    given = {k: v for k, v in optimizer.defaults.items() if k not in ("lr", "weight_decay")}
    shown = ", ".join(f"{name}={value!r}" for name, value in sorted(given.items()))
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}({shown})"


def is_custom(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a user's function made the optimizer."""
    return hasattr(optimizer, _UPDATES)


def updates_begun(optimizer: torch.optim.Optimizer) -> int:
    """The updates of a user's optimizer that were begun, finished or not."""
    return getattr(optimizer, _UPDATES)


def count_update(optimizer: torch.optim.Optimizer, change: int = 1) -> None:
    """Add to `updates_begun`; does nothing to other optimizers."""
    if is_custom(optimizer):
        setattr(optimizer, _UPDATES, updates_begun(optimizer) + change)


@torch.no_grad()
def make_states(optimizer: torch.optim.Optimizer) -> None:
    """Create the state of every tensor of a user's optimizer by a step; the tensors keep their
    values."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in params]
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    for param, value in zip(params, before, strict=True):
        param.copy_(value)
        param.grad = None
