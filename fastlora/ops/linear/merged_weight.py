"""The merged matrix W + s B A; with DoRA, m / n times that, where n holds the norm of each row.

Computed in at least float32 from the trained A and B, and rounded once to W's dtype. Merging writes
this matrix (adapters/edits/merging.py), and quantisation-aware training multiplies with it
(qat.py): both get the same bits.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def low_rank_sum(
    weight: Float[Tensor, "d_out d_in"],
    a: Float[Tensor, "r d_in"],
    b: Float[Tensor, "d_out r"],
    scaling: float,
) -> Float[Tensor, "d_out d_in"]:
    """W + scaling * B A, in the widest of W's dtype, A's dtype and float32."""
    wide = torch.promote_types(torch.promote_types(weight.dtype, a.dtype), torch.float32)
    return torch.addmm(weight.to(wide), b.to(wide), a.to(wide), alpha=scaling)


def adapted_weight(
    weight: Float[Tensor, "d_out d_in"],
    a: Float[Tensor, "r d_in"],
    b: Float[Tensor, "d_out r"],
    magnitude: Float[Tensor, "d_out"] | None,
    scaling: float,
) -> Float[Tensor, "d_out d_in"]:
    """The merged matrix, in weight.dtype. `magnitude` is None without DoRA.

    Differentiable in every tensor; gradients treat DoRA's norm as a constant.
    """
    total = low_rank_sum(weight, a, b, scaling)
    if magnitude is not None:
        total = total * (magnitude.to(total.dtype) / total.detach().norm(dim=-1)).unsqueeze(-1)
    return total.to(weight.dtype)
