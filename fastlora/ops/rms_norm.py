"""RMSNorm: y = weight * x / sqrt(mean(x**2) + eps)   (Zhang & Sennrich 2019, arXiv:1910.07467)."""

import torch
from jaxtyping import Float
from torch import Tensor


def rms_norm(
    x: Float[Tensor, "*n d"], weight: Float[Tensor, "d"], eps: float
) -> Float[Tensor, "*n d"]:
    """RMS-normalise the last axis. Statistics in at least float32, result in x.dtype.

    Rounds to x.dtype before the weight is applied, as Llama does: the other order differs in bf16.
    Plain torch on purpose: Inductor fuses it with the residual add before and the casts after.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * (wide * rstd).to(x.dtype)
