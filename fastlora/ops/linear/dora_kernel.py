"""Triton kernel of `row_norms`. It reads W once for both |W|^2 and W A'.

In plain torch the norms take a sum of squares, three products and several small sums. For the 112
matrices of a step, launching these kernels takes the host longer than running them takes the GPU.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from fastlora.ops.dispatch import precision, rank_tile
from fastlora.ops.launch import launch


# ── kernel: one program for a few rows ────────────────────────────────────────────────────
@triton.jit
def _row_norms_kernel(
    weight_ptr, a_ptr, b_ptr, gram_ptr, norm_ptr, d_out, d_in, r, scaling,
    R: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, k = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, R)
    far = row.to(tl.int64)[:, None]
    squares = tl.zeros((BM,), tl.float32)
    product = tl.zeros((BM, R), tl.float32)
    for start in range(0, d_in, BK):
        column = start + tl.arange(0, BK)
        inside = (row < d_out)[:, None] & (column < d_in)[None, :]
        weight = tl.load(weight_ptr + far * d_in + column[None, :], mask=inside, other=0.0)
        taken = (k < r)[None, :] & (column < d_in)[:, None]
        a = tl.load(a_ptr + k[None, :] * d_in + column[:, None], mask=taken, other=0.0)
        wide = weight.to(tl.float32)
        squares += tl.sum(wide * wide, 1)
        product += tl.dot(weight, a, input_precision=PRECISION)
    in_b = (row < d_out)[:, None] & (k < r)[None, :]
    b = tl.load(b_ptr + far * r + k[None, :], mask=in_b, other=0.0).to(tl.float32)
    # |row of B A|^2 = b (A A') b'. The r x r matrix A A' comes from the launcher, because every
    # program needs all of it.
    square = (k < r)[:, None] & (k < r)[None, :]
    gram = tl.load(gram_ptr + k[:, None] * r + k[None, :], mask=square, other=0.0)
    cross = tl.sum(product * b, 1)
    quadratic = tl.sum(tl.dot(b, gram, input_precision="ieee") * b, 1)
    norm = tl.sqrt(squares + 2 * scaling * cross + scaling * scaling * quadratic)
    tl.store(norm_ptr + row, norm, mask=row < d_out)


# ── launcher ──────────────────────────────────────────────────────────────────────────────
# Rows of W per program; 16 is the smallest tile of tl.dot. Columns of W per iteration.
_ROWS, _COLUMNS, _WARPS = 16, 256, 4

_LARGEST_RANK = 64  # rows of A in the tile that the kernel holds in shared memory


def kernel_supports(weight: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether the kernel can run: all of one dtype of at most 32 bits, and a rank of at most 64."""
    kinds = {weight.dtype, a.dtype, b.dtype}
    narrow = kinds <= {torch.bfloat16} or kinds <= {torch.float16} or kinds <= {torch.float32}
    return narrow and a.shape[0] <= _LARGEST_RANK


def row_norms_fused(
    weight: Float[Tensor, "d_out d_in"],
    a: Float[Tensor, "r d_in"],
    b: Float[Tensor, "d_out r"],
    scaling: float,
) -> Float[Tensor, "d_out"]:
    """The values of `row_norms_reference`, in float32, for inputs that `kernel_supports` accepts.

    All sums are in float32.
    """
    (d_out, d_in), r = weight.shape, a.shape[0]
    norms = torch.empty(d_out, dtype=torch.float32, device=weight.device)
    wide = a.float()
    launch(
        _row_norms_kernel, (triton.cdiv(d_out, _ROWS),),
        weight.contiguous(), a.contiguous(), b.contiguous(), wide @ wide.t(), norms,
        d_out, d_in, r, scaling,
        R=rank_tile(r), BM=_ROWS, BK=_COLUMNS,  # pyright: ignore
        PRECISION=precision(weight.dtype), num_warps=_WARPS,  # pyright: ignore
    )  # fmt: skip
    return norms
