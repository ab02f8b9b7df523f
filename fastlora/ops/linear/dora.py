"""DoRA's row norms. DoRA: y = m / n * (W + s B A) x + bias, where n holds the norm of each row of
W + s B A (Liu et al. 2024, arXiv:2402.09353; gradients treat n as a constant, section 4.3).

The reference is the specification. The norms are one op, so that every recompute policy can keep
its d_out numbers. On CUDA one kernel computes them (dora_kernel.py), without a float32 copy of a
16-bit W.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from fastlora.ops.dispatch import transforms_active, triton_installed
from fastlora.ops.launch import implement
from fastlora.ops.quant.dequantize import dense
from fastlora.ops.quant.weights import Weight, from_parts, parts, shape_of


# ── 1. reference ──────────────────────────────────────────────────────────────────────────
def row_norms_reference(
    weight: Float[Tensor, "d_out d_in"],
    a: Float[Tensor, "r d_in"],
    b: Float[Tensor, "d_out r"],
    scaling: float,
) -> Float[Tensor, "d_out"]:
    """Norm of each row of W + s B A, in at least float32; no gradient flows.

    Does not form B A: row by row, |W + s B A|^2 = |W|^2 + 2 s <W A', B> + s^2 <B A A', B>, where
    the inner products run over r columns and not over d_in.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    weight, a, b = (x.detach().to(wide) for x in (weight, a, b))
    cross = ((weight @ a.t()) * b).sum(-1)
    quadratic = ((b @ (a @ a.t())) * b).sum(-1)
    return (weight.square().sum(-1) + 2 * scaling * cross + scaling**2 * quadratic).sqrt()


# ── 2. op ─────────────────────────────────────────────────────────────────────────────────
torch.library.define(
    "fastlora::row_norms", "(Tensor[] weight, Tensor a, Tensor b, float scaling) -> Tensor"
)


@implement("fastlora::row_norms")
def _row_norms(weight, a, b, scaling):
    matrix = dense(from_parts(weight), a.dtype)
    if matrix.is_cuda and triton_installed():
        from fastlora.ops.linear import dora_kernel  # noqa: PLC0415  imports triton

        if dora_kernel.kernel_supports(matrix, a, b):
            return dora_kernel.row_norms_fused(matrix, a, b, scaling)
    return row_norms_reference(matrix, a, b, scaling)


@torch.library.register_fake("fastlora::row_norms")
def _(weight, a, b, scaling):
    wide = torch.promote_types(a.dtype, torch.float32)
    return a.new_empty(shape_of(from_parts(weight))[0], dtype=wide)


# ── 3. public function ────────────────────────────────────────────────────────────────────
def row_norms(
    weight: Weight,
    a: Float[Tensor, "r d_in"],
    b: Float[Tensor, "d_out r"],
    scaling: float,
) -> Float[Tensor, "d_out"]:
    """Norm of each row of W + scaling * B A, in at least float32; no gradient flows.

    Args:
        weight: base matrix, dense in A's dtype or quantised.
        a: LoRA's A.
        b: LoRA's B.
        scaling: alpha / r.
    """
    if transforms_active():
        return row_norms_reference(dense(weight, a.dtype), a, b, scaling)
    # The raw op has no derivative; with detached inputs autograd does not record it.
    detached = [x.detach() for x in parts(weight)]
    return torch.ops.fastlora.row_norms(detached, a.detach(), b.detach(), scaling)
