"""RMSNorm: y = weight * x / sqrt(mean(x**2) + eps)   (Zhang & Sennrich 2019, arXiv:1910.07467)."""

import torch
from jaxtyping import Float
from torch import Tensor


def rms_norm(
    x: Float[Tensor, "*n d"], weight: Float[Tensor, "d"], eps: float
) -> Float[Tensor, "*n d"]:
    """RMS-normalise the last axis. Statistics in at least float32, result in x.dtype.

    The normalised value is rounded to x.dtype before it is multiplied with the weight, as in
    Hugging Face's Llama; the other order gives different bits in bf16. This is plain torch, because
    Inductor then fuses it with the residual add before it and the casts after it.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * (wide * rstd).to(x.dtype)
