"""Which implementation an op runs: its fused one, or the plain reference that torch.func needs."""

import torch
from torch import Tensor


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
