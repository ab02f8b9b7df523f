"""DoRA: y = m / n * (W + s B A) x + bias, n the norm of each row of W + s B A
(Liu et al. 2024, arXiv:2402.09353; the gradient takes n as a constant, section 4.3).
"""

import torch
from jaxtyping import Float
from torch import Tensor


def row_norms(
    weight: Float[Tensor, "d_out d_in"],
    a: Float[Tensor, "r d_in"],
    b: Float[Tensor, "d_out r"],
    scaling: float,
) -> Float[Tensor, "d_out"]:
    """Norm of each row of W + s B A, in at least float32, without a gradient and without B A.

    |W + s B A|^2 = |W|^2 + 2 s <W A', B> + s^2 <B A A', B>, row by row: r columns in place of d_in.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    weight, a, b = (x.detach().to(wide) for x in (weight, a, b))
    cross = ((weight @ a.t()) * b).sum(-1)
    low = ((b @ (a @ a.t())) * b).sum(-1)
    return (weight.square().sum(-1) + 2 * scaling * cross + scaling**2 * low).sqrt()
