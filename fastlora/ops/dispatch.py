"""Choosing an op's implementation: a fused kernel, or the reference that torch.func needs.

Also here: the two properties of tl.dot, its smallest tile and its precision, that several Triton
launchers share.
"""

import os
from functools import cache
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

Kernels = Literal["auto", "torch", "triton"]


def transforms_active() -> bool:
    """Whether a torch.func transform (grad, jvp, vmap, ...) is being applied right now.

    A level of torch.autograd.forward_ad counts as a transform; torch.func.linearize traces inside
    one. Under a transform, torch refuses a custom backward in eager mode and silently drops it in
    compiled code (pytorch#193279, torch 2.13), and our ops have no forward derivative. Ops must
    then run their reference to be correct. Only this function reads the private torch API for this;
    dynamo traces it.
    """
    # forward_ad counts its levels from 0; outside of any it says -1.
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def refuse_transforms(function: str) -> None:
    """Refuse a verb that works on models, files or data inside of a transformed function.

    Such verbs read values, draw random numbers or write in place. Under a transform they would give
    gradients of zero (`merge`), constants that change from call to call (`lora` under linearize),
    or errors of torch that name neither cause nor cure.

    Raises:
        RuntimeError: a torch.func transform is active.
    """
    if transforms_active():
        raise RuntimeError(
            f"{function} cannot run inside a torch.func transform (grad, vmap, jvp, linearize, ...)"
            " or a level of forward_ad; call it outside, and transform functions of"
            " fastlora.functional, fastlora.losses or fastlora.research."
        )


def needs_reference(*frozen: Tensor | None) -> bool:
    """Whether an op must run as its differentiable reference.

    True under torch.func, and when the caller asks for gradients of `frozen`, tensors to which the
    fused op gives none (scripts/make_demo/make_demo.py trains base weights, for example).
    """
    return transforms_active() or any(t is not None and t.requires_grad for t in frozen)


def rank_tile(*ranks: int) -> int:
    """Smallest power of two that holds the largest rank; at least 16, the minimum of tl.dot."""
    return max(16, 1 << (max(ranks) - 1).bit_length())


def precision(dtype: torch.dtype) -> str:
    """The `input_precision` that kernels pass to tl.dot for a dtype."""
    return "ieee" if dtype == torch.float32 else "tf32"  # "tf32" rounds no 16-bit input


@cache
def triton_installed() -> bool:
    """Whether triton is installed. Does not import it."""
    return find_spec("triton") is not None


def kernel_problem(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on this device, and the cure; None if they can."""
    if not triton_installed():
        return 'kernels="triton" needs triton, which is not installed; pip install triton'
    # Triton reads this variable when our kernels are imported. Set later, it would have no effect.
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not interpreted:
        return (
            f'kernels="triton" needs a CUDA GPU, and the tensors are on {device}; move them there, '
            "or set TRITON_INTERPRET=1 before Python starts to run kernels slowly on the CPU"
        )
    return None


def use_kernel(x: Tensor, kernels: Kernels) -> bool:
    """Whether an op should launch its Triton kernel for x; see `kernels_run`."""
    return kernels_run(x.device, kernels)


def kernels_run(device: torch.device, kernels: Kernels) -> bool:
    """Whether ops launch their Triton kernels on a device, or run plain torch code.

    "auto" means yes on CUDA; "triton" means yes on the CPU too (in Triton's interpreter). The
    answer is always no under a transform (see `transforms_active`) and inside the caller's own
    torch.compile, where Inductor generates the kernels.

    Raises:
        ValueError: if `kernels` is "triton" and no kernel can run on the device.
    """
    if kernels == "torch" or transforms_active() or torch.compiler.is_compiling():
        return False
    problem = kernel_problem(device)
    if kernels == "triton" and problem:
        raise ValueError(problem)
    return problem is None and (kernels == "triton" or device.type == "cuda")
