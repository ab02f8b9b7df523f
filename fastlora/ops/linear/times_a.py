"""x A', the narrow product of LoRA (Hu et al. 2021, arXiv:2106.09685), as an op.

Recompute policies keep its result at every level (models/layer.py): it has r columns, and if it
were not kept, a recomputed MLP would run SwiGLU again only to multiply its result with A'.
"""

import torch
from jaxtyping import Float
from torch import Tensor

torch.library.define("fastlora::times_a", "(Tensor x, Tensor a) -> Tensor")


@torch.library.impl("fastlora::times_a", "CompositeExplicitAutograd")
def _times_a(x, a):
    return torch.mm(x, a.t())


@torch.library.register_fake("fastlora::times_a")
def _(x, a):
    return x.new_empty(x.shape[0], a.shape[0])


def times_a(x: Float[Tensor, "n d"], a: Float[Tensor, "r d"]) -> Float[Tensor, "n r"]:
    """x a', without a derivative: for the forward pass of ops that have their own."""
    return torch.ops.fastlora.times_a(x, a)
