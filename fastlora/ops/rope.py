"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), half-split as Llama stores it."""

import torch
from jaxtyping import Float
from torch import Tensor


def apply_rope(
    x: Float[Tensor, "b n t hd"], cos: Float[Tensor, "#b t hd"], sin: Float[Tensor, "#b t hd"]
) -> Float[Tensor, "b n t hd"]:
    """Rotate each pair (x[i], x[i + hd/2]) by its position's angle. All share x's dtype."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x * cos.unsqueeze(-3) + turned * sin.unsqueeze(-3)
