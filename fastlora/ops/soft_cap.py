"""Soft caps: y = cap * tanh(x / cap), between -cap and cap (Gemma 2, arXiv:2408.00118)."""

import torch
from jaxtyping import Float
from torch import Tensor


def soft_cap(x: Float[Tensor, "*n"], cap: float | None) -> Float[Tensor, "*n"]:
    """cap * tanh(x / cap), computed in at least float32, in x.dtype; None: x itself."""
    if cap is None:
        return x
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (cap * torch.tanh(wide / cap)).to(x.dtype)
