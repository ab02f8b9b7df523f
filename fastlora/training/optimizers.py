"""The optimizers of `train`: AdamW with moments in float32 or in 8 bits (bitsandbytes), and those
that a user's function makes (custom_optimizer.py).

Each is an object of another library. `train` creates it here, and saves and restores its state
tensor by tensor, so that a resumed run has the same bits as an uninterrupted one.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fastlora.ops.quant.bitsandbytes import bitsandbytes
from fastlora.training.custom_optimizer import (
    Groups,
    OptimizerFactory,
    build,
    count_update,
    is_custom,
    trial_problems,
    updates_begun,
)

OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw_8bit")

_DTYPES_OF_BITSANDBYTES = {"torch.float32", "torch.bfloat16", "torch.float16"}

# Entries of bitsandbytes' state that are the same constant tables for every tensor: not saved.
_TABLES = ("qmap1", "qmap2")

# Entry of a parameter group: its learning rate as a multiple of the step's.
_RATIO = "rate_ratio"


def optimizer_problems(name: str | OptimizerFactory, leaves: Sequence[Tensor]) -> list[str]:
    """Why an optimizer cannot train these tensors.

    Raises:
        ModuleNotFoundError: the optimizer belongs to bitsandbytes, which is not installed.
    """
    if not isinstance(name, str):
        return trial_problems(name, leaves)
    if name == "adamw":
        return []
    bitsandbytes("bitsandbytes.optim")  # raises now, not in the middle of train
    problems = []
    if name.startswith("paged") and not all(leaf.is_cuda for leaf in leaves):
        problems.append(
            f"optimizer={name!r} keeps its state in memory that CUDA pages out, and the model is on"
            " the CPU; expected 'adamw' or 'adamw_8bit'"
        )
    if wrong := sorted({str(leaf.dtype) for leaf in leaves} - _DTYPES_OF_BITSANDBYTES):
        problems.append(
            f"optimizer={name!r} trains {sorted(_DTYPES_OF_BITSANDBYTES)}; the adapter has {wrong}"
        )
    return problems


def make_optimizer(
    name: str | OptimizerFactory,
    leaves: Sequence[Tensor],
    weight_decay: float,
    ratios: Sequence[float] | None = None,
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) with betas (0.9, 0.999) and eps 1e-8.

    Its learning rate is 0 until `update` sets it.

    Args:
        name: "adamw": torch's, fused on CUDA. "adamw_8bit": tensors of 4,096 elements or more have
            both moments in 8 bits, in blocks of 256 numbers (Dettmers et al. 2022,
            arXiv:2110.02861). "paged_adamw_8bit": the same in memory that the driver moves to the
            host when the device is full. A function makes another optimizer of the groups.
        leaves: the tensors that every step writes to.
        weight_decay: of matrices. Vectors (norms, biases and DoRA's magnitudes) have none: decay
            would pull them to 0, where a norm gives nothing at all.
        ratios: for each leaf the factor on the step's learning rate; None: 1.

    Raises:
        TypeError: a function did not return an optimizer of the leaves.
    """
    groups = _parameter_groups(leaves, weight_decay, ratios or [1.0] * len(leaves))
    if not isinstance(name, str):
        return build(name, groups)
    if name == "adamw":
        # One kernel for all leaves; torch has it for CUDA tensors.
        fused = all(leaf.is_cuda for leaf in leaves)
        return torch.optim.AdamW(groups, lr=0.0, weight_decay=weight_decay, fused=fused)
    make = bitsandbytes("bitsandbytes.optim").AdamW
    paged = name.startswith("paged")
    return make(groups, lr=0.0, weight_decay=weight_decay, optim_bits=8, is_paged=paged)


def _parameter_groups(
    leaves: Sequence[Tensor], weight_decay: float, ratios: Sequence[float]
) -> Groups:
    """torch's groups: for each ratio, matrices with weight decay and vectors without; none is
    empty."""
    members: dict[tuple[float, bool], list[Tensor]] = {}
    for leaf, ratio in zip(leaves, ratios, strict=True):
        members.setdefault((ratio, leaf.dim() <= 1), []).append(leaf)
    # Matrices first: bitsandbytes and users' optimizers number the tensors in this order.
    return [
        {
            "params": members[key],
            "lr": 0.0,
            "weight_decay": 0.0 if key[1] else weight_decay,
            _RATIO: key[0],
        }
        for key in sorted(members, key=lambda key: key[1])
    ]


def update(
    optimizer: torch.optim.Optimizer, learning_rate: float, loss: Tensor, norm: Tensor
) -> tuple[float, float]:
    """Apply the gradients in `.grad`, unless the loss or the gradient's norm is NaN or infinite.

    Waits for the device once. If the update is not applied, leaves and state keep their bits.

    Returns:
        The loss and the norm.
    """
    figures = queue_updates([optimizer], [learning_rate], loss[None], norm[None])
    return finish_updates([optimizer], figures)[0]


def queue_updates(
    optimizers: Sequence[torch.optim.Optimizer],
    learning_rates: Sequence[float] | Float[Tensor, "n"],
    losses: Float[Tensor, "n"],
    norms: Float[Tensor, "n"],
) -> Float[Tensor, "n 2"]:
    """`update` for each of n optimizers, with its own loss and norm, until `finish_updates` waits
    for the device.

    If all optimizers are recordable, a CUDA graph may record it. Learning rates are then a float32
    tensor on the device, and the state of every leaf exists.

    Returns:
        Losses and norms in float64, for `finish_updates`.
    """
    figures = torch.stack([losses.double(), norms.double()], 1)
    skipped = (~figures.isfinite().all(1)).float().unbind()
    for optimizer, rate, skip in zip(optimizers, learning_rates, skipped, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get(_RATIO, 1.0)
        count_update(optimizer)
        # The kernel reads `found_inf` on the device, so the host need not wait before the update.
        if is_fused(optimizer):
            of_adamw: Any = optimizer
            of_adamw.grad_scale, of_adamw.found_inf = None, skip
    step_together([optimizer for optimizer in optimizers if is_fused(optimizer)])
    return figures


def step_together(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """A step of each. While a CUDA graph is recorded, each step is a branch of the graph.

    Most tensors of an adapter are smaller than the part of a tensor that a block of AdamW's kernel
    updates, and a launch has 30 tensors, so that one optimizer leaves most of a GPU idle.
    """
    if not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        for optimizer in optimizers:
            optimizer.step()
        return
    here = torch.cuda.current_stream()
    branches = [torch.cuda.Stream() for _ in optimizers]
    for optimizer, branch in zip(optimizers, branches, strict=True):
        branch.wait_stream(here)
        with torch.cuda.stream(branch), _capturable(optimizer):
            optimizer.step()
    for branch in branches:
        here.wait_stream(branch)


@contextmanager
def _capturable(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Set the groups' "capturable", which torch asks for while a CUDA graph is recorded.

    Not for longer, because torch warns of it in steps that are not recorded. Fused kernels are the
    same with it.
    """
    before = [group["capturable"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["capturable"] = True
    try:
        yield
    finally:
        for group, value in zip(optimizer.param_groups, before, strict=True):
            group["capturable"] = value


def finish_updates(
    optimizers: Sequence[torch.optim.Optimizer], figures: Float[Tensor, "n 2"]
) -> list[tuple[float, float]]:
    """Apply the gradients that no kernel has applied, if they are finite; clears all gradients.

    Waits for the device.

    Returns:
        Each optimizer's loss and norm.
    """
    values = [(loss, norm) for loss, norm in figures.tolist()]
    for optimizer, pair in zip(optimizers, values, strict=True):
        _finish_update(optimizer, all(map(math.isfinite, pair)))
    return values


def is_fused(optimizer: torch.optim.Optimizer) -> bool:
    """Whether one kernel updates all leaves and reads on the device whether it may."""
    return isinstance(optimizer, torch.optim.AdamW) and bool(optimizer.defaults.get("fused"))


def is_recordable(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a CUDA graph may record an update: fused, and not a user's.

    The host counts the updates of a user's optimizer, and may run hooks that the user has set.
    """
    return is_fused(optimizer) and not is_custom(optimizer)


def _finish_update(optimizer: torch.optim.Optimizer, finite: bool) -> None:
    """Apply the gradients if they are finite and no kernel has done so."""
    if not finite:
        count_update(optimizer, -1)
    elif not is_fused(optimizer):  # others may not read `found_inf`
        optimizer.step()
    optimizer.zero_grad()


def steps_taken(optimizer: torch.optim.Optimizer, leaf: Tensor) -> int:
    """The number of updates that a leaf has had; of a user's optimizer, the updates begun."""
    if is_custom(optimizer):
        return updates_begun(optimizer)
    return int(optimizer.state[leaf].get("step", 0))


def state_tensors(optimizer: torch.optim.Optimizer, leaf: Tensor) -> dict[str, Tensor]:
    """The state of one leaf after a step: name -> tensor.

    bitsandbytes counts steps in an int, which becomes a tensor too. Other numbers do so in float64.
    torch's AdamW counts them in float64 if that is torch's default dtype; this returns float32.
    """
    state = {k: v for k, v in optimizer.state[leaf].items() if k not in _TABLES and v is not None}
    dtype = lambda v: torch.float64 if isinstance(v, float) else None
    number = lambda v: torch.tensor(v, dtype=dtype(v), device="cpu")
    tensors = {k: v if isinstance(v, Tensor) else number(v) for k, v in state.items()}
    if isinstance(optimizer, torch.optim.AdamW) and not is_custom(optimizer):
        tensors |= {k: v.float() for k, v in tensors.items() if k == "step"}
    return tensors


def fresh_state(optimizer: torch.optim.Optimizer, leaf: Tensor) -> dict[str, Tensor]:
    """Create the state of a leaf before its first step; returns its `state_tensors`.

    The states of a user's optimizer are created all at once, by `custom_optimizer.make_states`.
    """
    if is_custom(optimizer):
        return state_tensors(optimizer, leaf)
    if isinstance(optimizer, torch.optim.AdamW):
        moments = {name: torch.zeros_like(leaf) for name in ("exp_avg", "exp_avg_sq")}
        # torch's fused kernel needs the count on the leaf's device, the others on the CPU.
        device = leaf.device if optimizer.defaults["fused"] else "cpu"
        step = torch.zeros((), dtype=torch.float32, device=device)
        optimizer.state[leaf] = {"step": step, **moments}
    else:
        group_index, group, index = next(
            (g, group, i)
            for g, group in enumerate(optimizer.param_groups)
            for i, p in enumerate(group["params"])
            if p is leaf
        )
        of_bitsandbytes: Any = optimizer  # its types do not declare init_state
        of_bitsandbytes.init_state(group, leaf, group_index, index)
    return state_tensors(optimizer, leaf)


def restore_state(
    optimizer: torch.optim.Optimizer, leaf: Tensor, saved: Mapping[str, Tensor]
) -> None:
    """Copy saved `state_tensors` into the state that `fresh_state` created."""
    state = optimizer.state[leaf]
    for name, value in saved.items():
        if isinstance(state[name], Tensor):
            state[name].copy_(value)
        else:
            state[name] = type(state[name])(value.item())
