"""The optimizers that `train` knows: AdamW with moments in float32, or in 8 bits (bitsandbytes).

Each is an object of another library. `train` creates it here, and saves and restores its state
tensor by tensor, so that a resumed run has the same bits as an uninterrupted one.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastlora.ops.quant.bitsandbytes import bitsandbytes

OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw_8bit")

_DTYPES_OF_BITSANDBYTES = {"torch.float32", "torch.bfloat16", "torch.float16"}

# Entries of bitsandbytes' state that are the same constant tables for every tensor: not saved.
_TABLES = ("qmap1", "qmap2")


def optimizer_problems(name: str, leaves: Sequence[Tensor]) -> list[str]:
    """Why an optimizer cannot train these tensors.

    Raises:
        ModuleNotFoundError: the optimizer belongs to bitsandbytes, which is not installed.
    """
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
    name: str, leaves: Sequence[Tensor], weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) with betas (0.9, 0.999) and eps 1e-8.

    Its learning rate is 0 until `update` sets it.

    Args:
        name: "adamw": torch's, fused on CUDA. "adamw_8bit": tensors of 4,096 elements or more have
            both moments in 8 bits, in blocks of 256 numbers (Dettmers et al. 2022,
            arXiv:2110.02861). "paged_adamw_8bit": the same in memory that the driver moves to the
            host when the device is full.
        leaves: the tensors that every step writes to.
        weight_decay: of matrices. Vectors (norms, biases and DoRA's magnitudes) have none: decay
            would pull them to 0, where a norm gives nothing at all.
    """
    groups = _parameter_groups(leaves, weight_decay)
    if name == "adamw":
        # One kernel for all leaves; torch has it for CUDA tensors.
        fused = all(leaf.is_cuda for leaf in leaves)
        return torch.optim.AdamW(groups, lr=0.0, weight_decay=weight_decay, fused=fused)
    make = bitsandbytes("bitsandbytes.optim").AdamW
    paged = name.startswith("paged")
    return make(groups, lr=0.0, weight_decay=weight_decay, optim_bits=8, is_paged=paged)


def _parameter_groups(leaves: Sequence[Tensor], weight_decay: float) -> list[dict[str, Any]]:
    """torch's groups: matrices with weight decay, then vectors without; none is empty."""
    matrices = [leaf for leaf in leaves if leaf.dim() > 1]
    vectors = [leaf for leaf in leaves if leaf.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def update(
    optimizer: torch.optim.Optimizer, learning_rate: float, loss: Tensor, norm: Tensor
) -> tuple[float, float]:
    """Apply the gradients in `.grad`, unless the loss or the gradient's norm is NaN or infinite.

    Waits for the device once. If the update is not applied, leaves and state keep their bits.

    Returns:
        The loss and the norm.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    figures = torch.stack([loss.double(), norm.double()])
    if optimizer.defaults.get("fused"):
        # The kernel reads `found_inf` on the device, so the host need not wait before the update.
        fused: Any = optimizer
        fused.grad_scale, fused.found_inf = None, (~figures.isfinite().all()).float()
        optimizer.step()
        values = figures.tolist()
    else:
        values = figures.tolist()
        if all(map(math.isfinite, values)):
            optimizer.step()
    optimizer.zero_grad()
    return values[0], values[1]


def steps_taken(optimizer: torch.optim.Optimizer, leaf: Tensor) -> int:
    """The number of updates that a leaf has had."""
    return int(optimizer.state[leaf].get("step", 0))


def state_tensors(optimizer: torch.optim.Optimizer, leaf: Tensor) -> dict[str, Tensor]:
    """The state of one leaf after a step: name -> tensor.

    bitsandbytes counts steps in an int, which becomes a tensor too.
    """
    state = {k: v for k, v in optimizer.state[leaf].items() if k not in _TABLES}
    return {k: v if isinstance(v, Tensor) else torch.tensor(v) for k, v in state.items()}


def fresh_state(optimizer: torch.optim.Optimizer, leaf: Tensor) -> dict[str, Tensor]:
    """Create the state of a leaf before its first step; returns its `state_tensors`."""
    if isinstance(optimizer, torch.optim.AdamW):
        moments = {name: torch.zeros_like(leaf) for name in ("exp_avg", "exp_avg_sq")}
        # torch's fused kernel needs the count on the leaf's device, the others on the CPU.
        step = torch.zeros((), device=leaf.device if optimizer.defaults["fused"] else "cpu")
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
            state[name] = int(value)
