"""The optimisers that `train` knows: AdamW, its moments in float32 or (bitsandbytes) in 8 bits.

Each is an object of another library; here is what `train` asks of it: to be made, and to have its
state saved and restored, tensor by tensor, so that a resumed run has the bits of the other.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastlora.ops.quant.bitsandbytes import bitsandbytes

OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw_8bit")

_OF_8BIT = {"torch.float32", "torch.bfloat16", "torch.float16"}

_TABLES = ("qmap1", "qmap2")  # bitsandbytes' own, the same for every tensor


def optimizer_problems(name: str, leaves: Sequence[Tensor]) -> list[str]:
    """Why an optimiser cannot train these tensors.

    Raises:
        ModuleNotFoundError: if it is bitsandbytes' and that is not installed.
    """
    if name == "adamw":
        return []
    bitsandbytes("bitsandbytes.optim")
    problems = []
    if name.startswith("paged") and not all(leaf.is_cuda for leaf in leaves):
        problems.append(
            f"optimizer={name!r} keeps its state in memory that CUDA pages out, and the model is on"
            " the CPU; expected 'adamw' or 'adamw_8bit'"
        )
    if wrong := sorted({str(leaf.dtype) for leaf in leaves} - _OF_8BIT):
        problems.append(f"optimizer={name!r} steps {sorted(_OF_8BIT)}; the adapter has {wrong}")
    return problems


def make_optimizer(
    name: str, leaves: Sequence[Tensor], weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) with betas (0.9, 0.999) and eps 1e-8; the
    rate, 0, is to be set before every step.

    Args:
        name: "adamw": torch's, fused on CUDA. "adamw_8bit": both moments in blocks of 256 numbers
            of 8 bits (Dettmers et al. 2022, arXiv:2110.02861), of tensors of 4,096 elements and
            more. "paged_adamw_8bit": the same in memory that the driver moves to the host when the
            device is full.
        leaves: written to by every step.
        weight_decay: of all leaves.
    """
    if name == "adamw":
        fused = all(leaf.is_cuda for leaf in leaves)
        return torch.optim.AdamW(leaves, lr=0.0, weight_decay=weight_decay, fused=fused)
    make = bitsandbytes("bitsandbytes.optim").AdamW
    paged = name.startswith("paged")
    return make(leaves, lr=0.0, weight_decay=weight_decay, optim_bits=8, is_paged=paged)


def state_tensors(optimizer: torch.optim.Optimizer, leaf: Tensor) -> dict[str, Tensor]:
    """Name -> tensor, of one leaf's state after a step; bitsandbytes' count of steps as one too."""
    state = {k: v for k, v in optimizer.state[leaf].items() if k not in _TABLES}
    return {k: v if isinstance(v, Tensor) else torch.tensor(v) for k, v in state.items()}


def fresh_state(optimizer: torch.optim.Optimizer, leaf: Tensor) -> dict[str, Tensor]:
    """`state_tensors` of a leaf that has not been stepped yet, whose state this makes."""
    if isinstance(optimizer, torch.optim.AdamW):
        moments = {name: torch.zeros_like(leaf) for name in ("exp_avg", "exp_avg_sq")}
        # Where torch's fused kernel wants it.
        step = torch.zeros((), device=leaf.device if optimizer.defaults["fused"] else "cpu")
        optimizer.state[leaf] = {"step": step, **moments}
    else:
        group = optimizer.param_groups[0]
        index = next(i for i, p in enumerate(group["params"]) if p is leaf)
        of_bitsandbytes: Any = optimizer
        of_bitsandbytes.init_state(group, leaf, 0, index)
    return state_tensors(optimizer, leaf)


def restore_state(
    optimizer: torch.optim.Optimizer, leaf: Tensor, saved: Mapping[str, Tensor]
) -> None:
    """Put saved tensors, of `state_tensors`, where `fresh_state` made room."""
    state = optimizer.state[leaf]
    for name, value in saved.items():
        if isinstance(state[name], Tensor):
            state[name].copy_(value)
        else:
            state[name] = int(value)
