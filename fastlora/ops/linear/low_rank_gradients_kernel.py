"""Triton kernels of `low_rank_gradients`: s dy_i B_i and s dy_i' xA_i in one pass over dy.

Each of the two is a product with 16 columns, so reading dy takes nearly all of its time. A program
of the first kernel reads one block of columns of one chunk of rows. It sums dB of its columns in
registers, and writes its part of each row's dxA. The second kernel adds the parts in a fixed
order, so all runs give the same bits.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from fastlora.ops.dispatch import precision, rank_tile
from fastlora.ops.launch import launch

# ── kernels ───────────────────────────────────────────────────────────────────────────────


# The kernels use no helper functions; swiglu_kernel.py says why. WIDTHS, STARTS and RANKS have one
# entry per branch: the columns of its dy, the first of them in the rows of dy_ptr, and its rank.
@triton.jit
def _parts_kernel(
    dy_ptr, b_0_ptr, b_1_ptr, b_2_ptr, x_a_ptr, dx_a_parts_ptr, db_parts_ptr,
    n, stride_dy, stride_x_a, chunk,
    WIDTHS: tl.constexpr, STARTS: tl.constexpr, RANKS: tl.constexpr, R: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    width, start, rank, first_block, first_row, first_rank = 0, 0, 0, 0, 0, 0
    b_ptr, blocks, rows, ranks = b_0_ptr, 0, 0, 0
    for i in tl.static_range(len(WIDTHS)):  # pyright: ignore
        if block >= blocks:
            width, start, rank = WIDTHS[i], STARTS[i], RANKS[i]
            first_block, first_row, first_rank = blocks, rows, ranks
            b_ptr = b_0_ptr if i == 0 else b_1_ptr if i == 1 else b_2_ptr
        blocks += tl.cdiv(WIDTHS[i], BN)
        rows += WIDTHS[i]
        ranks += RANKS[i]
    column = (block - first_block) * BN + tl.arange(0, BN)
    k = tl.arange(0, R)[None, :]
    of_b = (column[:, None] < width) & (k < rank)
    b = tl.load(b_ptr + column[:, None] * rank + k, mask=of_b, other=0.0)
    db = tl.zeros((BN, R), tl.float32)
    for step in tl.range(0, chunk, BM, num_stages=STAGES):  # pyright: ignore
        row = (tl.program_id(1) * chunk + step + tl.arange(0, BM))[:, None]
        far = row.to(tl.int64)
        here = (row < n) & (column[None, :] < width)
        dy = tl.load(dy_ptr + far * stride_dy + start + column[None, :], mask=here, other=0.0)
        of_x_a = (row < n) & (k < rank)
        x_a = tl.load(x_a_ptr + far * stride_x_a + first_rank + k, mask=of_x_a, other=0.0)
        dx_a = tl.dot(dy, b, input_precision=PRECISION)
        tl.store(dx_a_parts_ptr + (block.to(tl.int64) * n + far) * R + k, dx_a, mask=row < n)
        db += tl.dot(tl.trans(dy), x_a, input_precision=PRECISION)
    at = (tl.program_id(1) * rows + first_row + column[:, None]) * R + k
    tl.store(db_parts_ptr + at, db, mask=column[:, None] < width)


@triton.jit
def _sums_kernel(
    dx_a_parts_ptr, db_parts_ptr, dx_a_ptr, db_ptr, n, s_0, s_1, s_2,
    WIDTHS: tl.constexpr, RANKS: tl.constexpr, R: tl.constexpr, BN: tl.constexpr,
    CHUNKS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    # The first programs add dxA's parts, one block of rows each; the others add dB's.
    k, lane = tl.arange(0, R)[None, :], tl.arange(0, ROWS)[:, None]
    kind = dx_a_ptr.dtype.element_ty
    of_dx_a = tl.cdiv(n, ROWS)
    columns, width = 0, 0
    for i in tl.static_range(len(WIDTHS)):  # pyright: ignore
        columns += RANKS[i]
        width += WIDTHS[i]
    if tl.program_id(0) < of_dx_a:
        row = tl.program_id(0).to(tl.int64) * ROWS + lane
        block, first = 0, 0
        for i in tl.static_range(len(WIDTHS)):  # pyright: ignore
            total = tl.zeros((ROWS, R), tl.float32)
            for _ in tl.static_range((WIDTHS[i] + BN - 1) // BN):  # pyright: ignore
                at = (block * tl.cast(n, tl.int64) + row) * R + k
                total += tl.load(dx_a_parts_ptr + at, mask=row < n, other=0.0)
                block += 1
            total *= s_0 if i == 0 else s_1 if i == 1 else s_2
            inside = (row < n) & (k < RANKS[i])
            tl.store(dx_a_ptr + row * columns + first + k, total.to(kind), mask=inside)
            first += RANKS[i]
    else:
        number = (tl.program_id(0) - of_dx_a) * ROWS + lane
        db = tl.zeros((ROWS, R), tl.float32)
        for chunk in tl.static_range(CHUNKS):  # pyright: ignore
            part = (chunk * width + number) * R + k
            db += tl.load(db_parts_ptr + part, mask=number < width, other=0.0)
        # Each dB follows the one before it, with as many columns as its rank.
        begin, factor, rank, to, of_first = 0, 0.0, 0, 0, 0
        for i in tl.static_range(len(WIDTHS)):  # pyright: ignore
            of_branch = number >= of_first
            factor = tl.where(of_branch, s_0 if i == 0 else s_1 if i == 1 else s_2, factor)
            rank = tl.where(of_branch, RANKS[i], rank)
            to = tl.where(of_branch, begin + (number - of_first) * RANKS[i], to)
            begin += WIDTHS[i] * RANKS[i]
            of_first += WIDTHS[i]
        tl.store(db_ptr + to + k, (db * factor).to(kind), mask=(number < width) & (k < rank))


# ── launcher ──────────────────────────────────────────────────────────────────────────────
# (rows, columns, warps, pipeline stages) of a tile, and about how many programs there are. With
# 8,192 rows and r = 16 on an H200, o or down of 1B take 17 us (as two products 25), q, k and v 25
# (57); those of 8B 32 (43) and 47 (84). (64, 256, 8, 3) with 132 programs is 5 us faster for q, k
# and v of 8B, but needs 117 KB of shared memory (h200-low-rank-gradients-2026-11-30 in
# scripts/bench/results.jsonl).
_TILE, _PROGRAMS = (64, 128, 4, 3), 264


def low_rank_gradients_fused(
    dy: Float[Tensor, "n _"],
    bs: list[Float[Tensor, "_ _"]],
    x_a: Float[Tensor, "n _"],
    starts: list[int],
    scalings: list[float],
) -> tuple[Float[Tensor, "n r"], Float[Tensor, "_"]]:
    """(s_i dy_i B_i side by side, the elements of all s_i dy_i' xA_i), in dy.dtype.

    dy_i are the columns of dy from starts[i] on, as many as B_i has rows; xA_i are the next columns
    of x_a. Both are summed in float32. At most three branches.
    """
    assert 1 <= len(bs) <= 3, len(bs)
    n, (bm, bn, warps, stages) = dy.shape[0], _TILE
    dy = dy if dy.stride(1) == 1 else dy.contiguous()
    x_a = x_a if x_a.stride(1) == 1 else x_a.contiguous()
    bs = [b.contiguous() for b in bs]
    widths, ranks = tuple(b.shape[0] for b in bs), tuple(b.shape[1] for b in bs)
    r, blocks = rank_tile(*ranks), sum(triton.cdiv(w, bn) for w in widths)
    chunk = triton.cdiv(triton.cdiv(n, max(1, _PROGRAMS // blocks)), bm) * bm
    chunks = triton.cdiv(n, chunk)
    dx_a_parts = torch.empty((blocks, n, r), dtype=torch.float32, device=dy.device)
    db_parts = torch.empty((chunks, sum(widths), r), dtype=torch.float32, device=dy.device)
    dx_a = dy.new_empty(n, sum(ranks))
    db = dy.new_empty(sum(b.numel() for b in bs))
    static = dict(WIDTHS=widths, RANKS=ranks, R=r, BN=bn)
    three = lambda xs: [*xs, *[xs[0]] * (3 - len(xs))]  # no branch reads the repeated ones
    (b_0, b_1, b_2), (s_0, s_1, s_2) = three(bs), three(scalings)
    launch(
        _parts_kernel, (blocks, chunks),
        dy, b_0, b_1, b_2, x_a, dx_a_parts, db_parts, n, dy.stride(0), x_a.stride(0), chunk,
        **static, STARTS=tuple(starts), BM=bm, STAGES=stages,  # pyright: ignore
        PRECISION=precision(dy.dtype), num_warps=warps,  # pyright: ignore
    )  # fmt: skip
    rows = 32
    launch(
        _sums_kernel, (triton.cdiv(n, rows) + triton.cdiv(sum(widths), rows),),
        dx_a_parts, db_parts, dx_a, db, n, s_0, s_1, s_2,
        **static, CHUNKS=chunks, ROWS=rows, num_warps=2,  # pyright: ignore
    )  # fmt: skip
    return dx_a, db
