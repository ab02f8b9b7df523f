"""Triton kernel of `row_norms`: |W|^2, W A' and what follows from them, W read once.

Launched one by one (a sum of squares, three products, a handful of sums), a step of 112 matrices
gives the host more work than the GPU.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor


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
    own = (row < d_out)[:, None] & (k < r)[None, :]
    b = tl.load(b_ptr + far * r + k[None, :], mask=own, other=0.0).to(tl.float32)
    square = (k < r)[:, None] & (k < r)[None, :]
    gram = tl.load(gram_ptr + k[:, None] * r + k[None, :], mask=square, other=0.0)
    cross = tl.sum(product * b, 1)
    x_a = tl.sum(tl.dot(b, gram, input_precision="ieee") * b, 1)
    norm = tl.sqrt(squares + 2 * scaling * cross + scaling * scaling * x_a)
    tl.store(norm_ptr + row, norm, mask=row < d_out)


# ── launcher ──────────────────────────────────────────────────────────────────────────────
_ROWS, _COLUMNS, _WARPS = 16, 256, 4

_LARGEST_RANK = 64  # of a tile of columns of A in shared memory


def takes(weight: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether the kernel can run: one dtype of at most 32 bits, and a small rank."""
    kinds = {weight.dtype, a.dtype, b.dtype}
    narrow = kinds <= {torch.bfloat16} or kinds <= {torch.float16} or kinds <= {torch.float32}
    return narrow and a.shape[0] <= _LARGEST_RANK


def row_norms_fused(
    weight: Float[Tensor, "d_out d_in"],
    a: Float[Tensor, "r d_in"],
    b: Float[Tensor, "d_out r"],
    scaling: float,
) -> Float[Tensor, "d_out"]:
    """`row_norms_reference` of what `takes` takes, in float32: every sum is."""
    (d_out, d_in), r = weight.shape, a.shape[0]
    norms = torch.empty(d_out, dtype=torch.float32, device=weight.device)
    wide = a.float()
    _row_norms_kernel[(triton.cdiv(d_out, _ROWS),)](
        weight.contiguous(), a.contiguous(), b.contiguous(), wide @ wide.t(), norms,
        d_out, d_in, r, scaling,
        R=max(16, triton.next_power_of_2(r)), BM=_ROWS, BK=_COLUMNS,  # pyright: ignore
        PRECISION="ieee" if weight.dtype == torch.float32 else "tf32", num_warps=_WARPS,  # pyright: ignore
    )  # fmt: skip
    return norms
