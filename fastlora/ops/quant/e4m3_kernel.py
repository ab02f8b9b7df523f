"""Triton kernels that quantise rows to e4m3 and transpose matrices of bytes."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from jaxtyping import Float, UInt8
from torch import Tensor

from fastlora.ops.launch import launch
from fastlora.ops.quant.weights import CARRY, INFINITE, LEAST_POWER, NOT_A_NUMBER

# ── kernels ───────────────────────────────────────────────────────────────────────────────


# One program for each row, which it walks through twice. It reads the row from memory once: at the
# second time the row comes from the L2 cache.
@triton.jit
def _quantize_rows_kernel(
    ys, strides, widths, factors, out_ptr, scale_ptr, stride_out,
    HAS_FACTORS: tl.constexpr, CARRY: tl.constexpr, LEAST_POWER: tl.constexpr,
    INFINITE: tl.constexpr, NOT_A_NUMBER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(len(ys)):  # pyright: ignore
        for start in range(0, widths[i], BLOCK):
            column = start + tl.arange(0, BLOCK)
            here = column < widths[i]
            y = tl.load(
                ys[i] + row * strides[i] + column,
                mask=here,
                other=0.0,
                eviction_policy="evict_last",
            ).to(tl.float32)
            if HAS_FACTORS:
                y *= tl.load(factors[i] + column, mask=here, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.abs(y), propagate_nan=tl.PropagateNan.ALL)
    # The smallest power of two that is at least amax / 448, from amax's bits (e4m3.py). Bits of
    # magnitudes are ordered as they are, and tl.max of floats would ignore NaN.
    bits = tl.max(largest.to(tl.int32, bitcast=True), 0)  # pyright: ignore
    power = tl.maximum(((bits + CARRY) >> 23) - 8, LEAST_POWER)  # pyright: ignore
    scale = tl.where(bits >= INFINITE, NOT_A_NUMBER, power << 23)  # pyright: ignore
    tl.store(scale_ptr + row, scale.to(tl.float32, bitcast=True))
    inverse = ((254 - power) << 23).to(tl.float32, bitcast=True)
    first = 0
    for i in tl.static_range(len(ys)):  # pyright: ignore
        for start in range(0, widths[i], BLOCK):
            column = start + tl.arange(0, BLOCK)
            here = column < widths[i]
            y = tl.load(
                ys[i] + row * strides[i] + column,
                mask=here,
                other=0.0,
                eviction_policy="evict_first",
            ).to(tl.float32)
            if HAS_FACTORS:
                y *= tl.load(factors[i] + column, mask=here, other=0.0).to(tl.float32)
            at = out_ptr + row * stride_out + first + column
            tl.store(at, (y * inverse).to(out_ptr.dtype.element_ty), mask=here)
        first += widths[i]


@triton.jit
def _transpose_kernel(
    x_ptr, out_ptr, ones_ptr, rows, columns, stride_out, BM: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    row = tl.program_id(1) * BM + tl.arange(0, BM)
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    at = row[:, None].to(tl.int64) * columns + column[None, :]
    x = tl.load(x_ptr + at, mask=(row < rows)[:, None] & (column < columns)[None, :], other=0)
    at = column[:, None].to(tl.int64) * stride_out + row[None, :]
    here = (column < columns)[:, None] & (row < rows)[None, :]
    tl.store(out_ptr + at, tl.trans(x), mask=here)
    if tl.program_id(1) == 0:
        ones = tl.full((BN,), 1.0, tl.float32)
        tl.store(ones_ptr + column, ones, mask=column < columns)


# ── launchers ─────────────────────────────────────────────────────────────────────────────
# Rows, columns, warps.
_TRANSPOSE_TILE = (128, 128, 8)


def _rows_tile(widths: Sequence[int], has_factors: bool) -> tuple[int, int]:
    """(columns of an iteration at most, warps).

    Microseconds of 8,192 rows in bf16 on an H200 (fp8-rows-2026-11-30):

    | widths | 4,096 columns, 8 warps | 8,192 columns, 8 warps | 4,096 columns, 4 warps |
    |---|---|---|---|
    | 14,336 + 14,336, with factors | 256.5 | 211.8 | 268.8 |
    | 14,336 | 91.4 | 94.3 | 100.5 |
    | 4,096 + 1,024 + 1,024, with factors | 69.1 | 69.9 | 63.5 |
    | 2,048 | 18.0 | 17.7 | 14.3 |
    """
    long = has_factors and max(widths) > 8192
    return 8192 if long else 4096, 4 if sum(widths) <= 8192 else 8


def quantize_rows(
    ys: Sequence[Float[Tensor, "n _"]],
    factors: Sequence[Float[Tensor, "_"]] | None,
    dtype: torch.dtype = torch.float8_e4m3fn,
    tile: tuple[int, int] | None = None,
) -> tuple[Tensor, Float[Tensor, "n"]]:
    """(values [n, d], a scale for each row) of the ys side by side, each times its factors.

    The ys are [n, d_i]; of those whose columns are not adjacent a copy is made. The factors are
    powers of two. `dtype` and `tile` are for tests and benchmarks.
    """
    ys = [y if y.stride(1) == 1 else y.contiguous() for y in ys]
    n, widths = ys[0].shape[0], tuple(y.shape[1] for y in ys)
    out = torch.empty(n, sum(widths), dtype=dtype, device=ys[0].device)
    scales = torch.empty(n, dtype=torch.float32, device=ys[0].device)
    if n == 0:
        return out, scales
    columns, warps = tile or _rows_tile(widths, factors is not None)
    block = min(columns, triton.next_power_of_2(max(widths)))
    # Powers of two are exact in bf16 too, which takes half the bytes: 14,336 + 14,336 columns take
    # 264 us, and 352 us with factors in float32 (H200, 8,192 rows, fp8-layer-2026-11-30).
    factors = [x.to(torch.bfloat16) for x in factors or ()]
    launch(
        _quantize_rows_kernel, (n,),
        tuple(ys), tuple(y.stride(0) for y in ys), widths,
        tuple(factors), out, scales, out.stride(0),
        HAS_FACTORS=bool(factors), CARRY=CARRY, LEAST_POWER=LEAST_POWER,  # pyright: ignore
        INFINITE=INFINITE, NOT_A_NUMBER=NOT_A_NUMBER,  # pyright: ignore
        BLOCK=block, num_warps=warps,  # pyright: ignore
    )  # fmt: skip
    return out, scales


def side_by_side(
    matrices: Sequence[UInt8[Tensor, "_ d_in"]], tile: tuple[int, int, int] = _TRANSPOSE_TILE
) -> tuple[UInt8[Tensor, "d_in d_out"], Float[Tensor, "d_in"]]:
    """([M_1', M_2', ...] in one matrix, ones), of matrices of bytes."""
    (d_in,), (bm, bn, warps), first = {m.shape[1] for m in matrices}, tile, 0
    out = matrices[0].new_empty(d_in, sum(len(m) for m in matrices))
    ones = torch.empty(d_in, dtype=torch.float32, device=out.device)
    for m in matrices:
        launch(
            _transpose_kernel, (triton.cdiv(d_in, bn), triton.cdiv(len(m), bm)),
            m, out[:, first:], ones, len(m), d_in, out.stride(0), BM=bm, BN=bn, num_warps=warps,  # pyright: ignore
        )  # fmt: skip
        first += len(m)
    return out, ones
