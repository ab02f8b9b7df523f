"""Low-rank factors of a matrix: A [r, d_in] and B [d_out, r] with scaling * B A close to it.

Every function computes in its input's dtype.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from fastlora.models.params import LoRA


def factors_from_svd(
    u: Float[Tensor, "d_out r"],
    s: Float[Tensor, "r"],
    vh: Float[Tensor, "r d_in"],
    scaling: float,
) -> LoRA:
    """A and B with scaling * B A = U S V'; each gets the square root of S / scaling."""
    root = (s / scaling).sqrt()
    return LoRA(root[:, None] * vh, u * root)


def low_rank_factors(matrix: Float[Tensor, "d_out d_in"], r: int, scaling: float) -> LoRA:
    """A and B for which scaling * B A is the best approximation of rank r of a matrix."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return factors_from_svd(u[:, :r], s[:r], vh[:r], scaling)


def randomised_svd(
    matrix: Float[Tensor, "rows columns"], rank: int, iterations: int, generator: torch.Generator
) -> tuple[Float[Tensor, "rows rank"], Float[Tensor, "rank"], Float[Tensor, "rank columns"]]:
    """U, S and V' of about the largest singular directions (Halko et al. 2011, arXiv:0909.4061,
    algorithms 4.4 and 5.1), without oversampling, as in torch.svd_lowrank.

    torch.svd_lowrank draws from the global generator; this draws from `generator`, on the CPU.
    """
    # QR after every product: without it all columns would turn towards the largest direction, and
    # rounding would remove the others (algorithm 4.4).
    shape, dtype = (matrix.shape[1], rank), matrix.dtype
    noise = torch.randn(shape, generator=generator, dtype=dtype, device="cpu")
    q, _ = torch.linalg.qr(matrix @ noise.to(matrix.device))
    for _ in range(iterations):
        q, _ = torch.linalg.qr(matrix.mT @ q)
        q, _ = torch.linalg.qr(matrix @ q)
    u, s, vh = torch.linalg.svd(q.mT @ matrix, full_matrices=False)
    return q @ u, s, vh
