"""RMSNorm: y = weight * x / sqrt(mean(x**2) + eps)   (Zhang & Sennrich 2019, arXiv:1910.07467)."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

# How the normalised value is multiplied with the weight w:
#   narrow     after it is rounded to x.dtype (Llama)
#   wide       in at least float32; the product is rounded (OLMo 2)
#   one_plus   as in "wide", with 1 + w (Gemma)
NormKind = Literal["narrow", "wide", "one_plus"]


def rms_norm(
    x: Float[Tensor, "*n d"], weight: Float[Tensor, "d"], eps: float, kind: NormKind = "narrow"
) -> Float[Tensor, "*n d"]:
    """RMS-normalise the last axis. Statistics in at least float32, result in x.dtype.

    Each kind rounds where its family's model in Hugging Face's transformers rounds; another order
    gives different bits in bf16. This is plain torch, because Inductor then fuses it with the
    residual add before it and the casts after it.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if kind == "narrow":
        return weight * (wide * rstd).to(x.dtype)
    return (wide * rstd * norm_factor(weight, kind).to(wide.dtype)).to(x.dtype)


def norm_factor(weight: Float[Tensor, "d"], kind: NormKind) -> Float[Tensor, "d"]:
    """The factor of the normalised value: the weight, or 1 + weight in at least float32."""
    if kind != "one_plus":
        return weight
    return 1 + weight.to(torch.promote_types(weight.dtype, torch.float32))
