"""Which implementation an op runs: its fused one, or the plain reference that torch.func needs."""

import os
from functools import cache
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

Kernels = Literal["auto", "torch", "triton"]


def transforms_active() -> bool:
    """Whether a torch.func transform (grad, jvp, vmap, ...) is being applied right now.

    Under a transform an op's own backward is refused or, compiled, silently dropped
    (pytorch#193279, torch 2.13): there the reference is not a fallback but the only right answer.
    The one private torch call of the package that asks for this lives here; dynamo traces it.
    """
    return torch._C._are_functorch_transforms_active()


def plain(*frozen: Tensor | None) -> bool:
    """Whether an op that gives no gradient to `frozen` must run as its differentiable reference.

    True under torch.func, and when somebody differentiates what LoRA holds frozen (the base
    training of scripts/make_demo.py does).
    """
    return transforms_active() or any(t is not None and t.requires_grad for t in frozen)


def rank_tile(*ranks: int) -> int:
    """The power of two, at least 16, that a Triton kernel's tl.dot takes for ranks up to it."""
    return max(16, 1 << (max(ranks) - 1).bit_length())


@cache
def triton_installed() -> bool:
    """Whether kernels can be written at all; nothing is imported."""
    return find_spec("triton") is not None


def kernel_problem(device: torch.device) -> str | None:
    """Why a Triton kernel cannot run on a device, and the cure; None where it can."""
    if not triton_installed():
        return 'kernels="triton" needs triton, which is not installed; pip install triton'
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not interpreted:
        return (
            f'kernels="triton" needs a CUDA GPU, and the tensors are on {device}; move them there, '
            "or set TRITON_INTERPRET=1 before Python starts to run kernels slowly on the CPU"
        )
    return None


def use_kernel(x: Tensor, kernels: Kernels) -> bool:
    """Whether an op should launch its Triton kernel for x, or run its plain form.

    "auto" is yes on CUDA, "triton" on the CPU too (in Triton's interpreter). Never under torch.func
    (see `transforms_active`), nor inside somebody else's torch.compile, which writes its own.

    Raises:
        ValueError: "triton" where no kernel can run.
    """
    if kernels == "torch" or transforms_active() or torch.compiler.is_compiling():
        return False
    problem = kernel_problem(x.device)
    if kernels == "triton" and problem:
        raise ValueError(problem)
    return problem is None and (kernels == "triton" or x.is_cuda)
