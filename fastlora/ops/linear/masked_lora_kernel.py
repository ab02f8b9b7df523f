"""Triton kernels of `masked_x_a`: the product of x, under one mask per A, with each A', and its
gradients.

A mask is a pure function of (key, row, column), so each tile recomputes its part of the mask,
forward and backward. No masked copy of x is written, read or kept. The hash is that of dropout.py,
line by line, in wrapping int32 arithmetic. It takes most of the time, not memory traffic: about
nine integer operations for two elements and a mask. A tile therefore consists of two halves, in
columns that share their hashes.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from fastlora.ops.dispatch import precision, rank_tile
from fastlora.ops.dropout import HALF, limit_of
from fastlora.ops.launch import launch

# ── kernels ───────────────────────────────────────────────────────────────────────────────


# The kernels use no helper functions; swiglu_kernel.py says why. As int32, -1640531535 is
# 0x9E3779B1. A segment without a mask has the limit -2147483648, so every element is kept.
@triton.jit
def _masked_x_a_kernel(
    x_ptr, a_ptr, keys_ptr, x_a_ptr, n, d, columns, stride_x, threshold, scale,
    RANKS: tl.constexpr, SLOTS: tl.constexpr, R: tl.constexpr, BM: tl.constexpr,
    HALF: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    segment = tl.program_id(0)
    first, rank, slot = 0, 0, 0
    for i in tl.static_range(len(RANKS)):  # pyright: ignore
        first += tl.where(i < segment, RANKS[i], 0)
        rank += tl.where(i == segment, RANKS[i], 0)
        slot += tl.where(i == segment, SLOTS[i], 0)
    limit = tl.where(slot >= 0, threshold, -2147483648)
    row = (tl.program_id(1) * BM + tl.arange(0, BM))[:, None]
    far, k = row.to(tl.int64), tl.arange(0, R)[None, :]  # n * d may exceed 2**31
    key = tl.load(keys_ptr + slot, mask=slot >= 0, other=0)
    # The low 32 bits are the key, the high ones the first row (dropout.from_row).
    of_row = (row + (key >> 32).to(tl.int32)) ^ key.to(tl.int32)
    of_row = (of_row ^ ((of_row >> 16) & 0xFFFF)) * 0x21F0AAAD
    of_row = (of_row ^ ((of_row >> 15) & 0x1FFFF)) * 0x735A2D97
    of_row = of_row ^ ((of_row >> 15) & 0x1FFFF)
    x_a = tl.zeros((BM, R), tl.float32)
    lane = tl.arange(0, HALF)
    for start in range(0, d, 2 * HALF):  # pyright: ignore
        bits = of_row + (start // 2 + lane[None, :]) * -1640531535
        bits = (bits ^ ((bits >> 16) & 0xFFFF)) * 0x21F0AAAD
        bits = (bits ^ ((bits >> 15) & 0x1FFFF)) * 0x735A2D97
        bits = bits ^ ((bits >> 15) & 0x1FFFF)
        for half in tl.static_range(2):  # pyright: ignore
            number = start + half * HALF + lane
            column, column_t = number[None, :], number[:, None]
            x = tl.load(x_ptr + far * stride_x + column, mask=(row < n) & (column < d), other=0.0)
            taken = (k < rank) & (column_t < d)
            a = tl.load(a_ptr + (first + k) * d + column_t, mask=taken, other=0.0)
            x = tl.where((bits if half else bits << 16) >= limit, x, 0.0)
            x_a += tl.dot(x, a, input_precision=PRECISION)
    x_a *= tl.where(slot >= 0, scale, 1.0)
    at, inside = far * columns + first + k, (row < n) & (k < rank)
    tl.store(x_a_ptr + at, x_a.to(x_a_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _masked_x_a_backward_kernel(  # noqa: C901, PLR0912, PLR0915  (no helpers, see above)
    dx_ptr, x_ptr, dx_a_ptr, a_ptr, keys_ptr, sums_ptr,
    n, d, columns, stride_x, stride_dx_a, threshold, scale, chunk,
    RANKS: tl.constexpr, SLOTS: tl.constexpr, NEEDS_X: tl.constexpr, NEEDS_A: tl.constexpr,
    R: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, HALF: tl.constexpr,
    PAIR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # With PAIR, a program has the columns of BN hashes in both halves of a block, "low" and "high".
    # Without, "low" are those in one of the halves, and BN is HALF.
    if PAIR:
        number, shift = tl.program_id(0) * BN, 16
        begin = tl.multiple_of(number // HALF * 2 * HALF + number % HALF, BN)
    else:
        number, shift = tl.program_id(0) // 2 * BN, 16 - tl.program_id(0) % 2 * 16
        begin = tl.program_id(0) * BN
    lane = tl.arange(0, BN)[None, :]
    low, high = begin + lane, begin + HALF + lane
    k, k_t = tl.arange(0, R)[None, :], tl.arange(0, R)[:, None]
    of_column = (number + lane) * -1640531535
    low_a, high_a, low_sums, high_sums, first = (), (), (), (), 0
    for i in tl.static_range(len(RANKS)):  # pyright: ignore
        at, taken = a_ptr + (first + k_t) * d, k_t < RANKS[i]
        low_a += (tl.load(at + low, mask=taken & (low < d), other=0.0),)
        low_sums += (tl.zeros((R, BN), tl.float32),)
        if PAIR:
            high_a += (tl.load(at + high, mask=taken & (high < d), other=0.0),)
            high_sums += (tl.zeros((R, BN), tl.float32),)
        first += RANKS[i]
    for start in range(0, chunk, BM):
        row = (tl.program_id(1) * chunk + start + tl.arange(0, BM))[:, None]
        far = row.to(tl.int64)
        low_in, high_in = (row < n) & (low < d), (row < n) & (high < d)
        if NEEDS_A:
            low_x = tl.load(x_ptr + far * stride_x + low, mask=low_in, other=0.0)
            if PAIR:
                high_x = tl.load(x_ptr + far * stride_x + high, mask=high_in, other=0.0)
        if NEEDS_X:
            low_dx = tl.load(dx_ptr + far * d + low, mask=low_in, other=0.0).to(tl.float32)
            if PAIR:
                high_dx = tl.load(dx_ptr + far * d + high, mask=high_in, other=0.0).to(tl.float32)
        new_low, new_high, offset = (), (), 0
        for i in tl.static_range(len(RANKS)):  # pyright: ignore
            inside = (row < n) & (k < RANKS[i])
            dx_a = tl.load(dx_a_ptr + far * stride_dx_a + offset + k, mask=inside, other=0.0)
            limit, factor, of_row = -2147483648, 1.0, row
            if SLOTS[i] >= 0:
                limit, factor = threshold, scale
                key = tl.load(keys_ptr + SLOTS[i])
                of_row = (row + (key >> 32).to(tl.int32)) ^ key.to(tl.int32)
            of_row = (of_row ^ ((of_row >> 16) & 0xFFFF)) * 0x21F0AAAD
            of_row = (of_row ^ ((of_row >> 15) & 0x1FFFF)) * 0x735A2D97
            of_row = of_row ^ ((of_row >> 15) & 0x1FFFF)
            bits = of_row + of_column
            bits = (bits ^ ((bits >> 16) & 0xFFFF)) * 0x21F0AAAD
            bits = (bits ^ ((bits >> 15) & 0x1FFFF)) * 0x735A2D97
            bits = bits ^ ((bits >> 15) & 0x1FFFF)
            low_keep, high_keep = (bits << shift) >= limit, bits >= limit
            if NEEDS_X:
                low_product = tl.dot(dx_a, low_a[i], input_precision=PRECISION)
                low_dx += tl.where(low_keep, low_product * factor, 0.0)
                if PAIR:
                    high_product = tl.dot(dx_a, high_a[i], input_precision=PRECISION)
                    high_dx += tl.where(high_keep, high_product * factor, 0.0)
            if NEEDS_A:
                across = tl.trans(dx_a)
                low_seen = tl.where(low_keep, low_x, 0.0)
                low_da = tl.dot(across, low_seen, input_precision=PRECISION)
                new_low += (low_sums[i] + low_da * factor,)
                if PAIR:
                    high_seen = tl.where(high_keep, high_x, 0.0)
                    high_da = tl.dot(across, high_seen, input_precision=PRECISION)
                    new_high += (high_sums[i] + high_da * factor,)
            offset += RANKS[i]
        if NEEDS_X:  # no other program reads these elements of dx
            tl.store(dx_ptr + far * d + low, low_dx.to(dx_ptr.dtype.element_ty), mask=low_in)
            if PAIR:
                tl.store(dx_ptr + far * d + high, high_dx.to(dx_ptr.dtype.element_ty), mask=high_in)
        if NEEDS_A:
            low_sums, high_sums = new_low, new_high
    if NEEDS_A:
        offset = 0
        for i in tl.static_range(len(RANKS)):  # pyright: ignore
            place = (tl.program_id(1).to(tl.int64) * columns + offset + k_t) * d
            taken = k_t < RANKS[i]
            tl.store(sums_ptr + place + low, low_sums[i], mask=taken & (low < d))
            if PAIR:
                tl.store(sums_ptr + place + high, high_sums[i], mask=taken & (high < d))
            offset += RANKS[i]


# ── launchers ─────────────────────────────────────────────────────────────────────────────
# Programs for the same rows of x and different A are adjacent in the grid, so that all but the
# first read x from the L2 cache. (rows, warps) of a forward tile; (rows, hashes, pairs, warps) of
# a backward tile for one A and for several; and the number of row chunks over which the backward
# kernel sums. With one A, reading and writing take most of the time, and tiles of 64 columns in one
# piece are faster than pairs of 32. On an H200 the four inputs of a 1B layer take 144 us forward
# and 441 us backward; with a hash for each element they took 171 and 468 us. The backward
# times of o and down were measured with a hash for each element (h200-masked-lora-2026-11-30 in
# scripts/bench/results.jsonl).
_FORWARD = (32, 4)

_BACKWARD = {"one": (32, 64, False, 4), "several": (32, 32, True, 4)}

_CHUNKS = 32


def _static(
    dtype: torch.dtype, ranks: list[int], slots: list[int], p: float
) -> tuple[int, float, dict]:
    """(threshold that dropout.py compares hashes with, 1 / (1 - p), compile-time arguments)."""
    how = dict(RANKS=tuple(ranks), SLOTS=tuple(slots), R=rank_tile(*ranks))
    return limit_of(p), 1.0 / (1.0 - p), how | dict(PRECISION=precision(dtype))


def masked_x_a_fused(
    x: Float[Tensor, "n d"],
    a: Float[Tensor, "r d"],
    keys: Int[Tensor, "k"],
    ranks: list[int],
    slots: list[int],
    p: float,
) -> Float[Tensor, "n r"]:
    """All x A_i' side by side in x.dtype, summed in float32.

    For A_i, x is masked with keys[slots[i]], whose high word is the first row of the mask; if
    slots[i] is -1, x is not masked.
    """
    (n, d), (bm, warps) = x.shape, _FORWARD
    x = x if x.stride(1) == 1 else x.contiguous()
    x_a = x.new_empty(n, a.shape[0])
    threshold, scale, static = _static(x.dtype, ranks, slots, p)
    launch(
        _masked_x_a_kernel, (len(ranks), triton.cdiv(n, bm)),
        x, a.contiguous(), keys, x_a, n, d, a.shape[0], x.stride(0), threshold, scale,
        **static, BM=bm, HALF=HALF, num_warps=warps,  # pyright: ignore
    )  # fmt: skip
    return x_a


def masked_x_a_backward_(
    dx: Float[Tensor, "n d"] | None,
    x: Float[Tensor, "n d"],
    dx_a: Float[Tensor, "n r"],
    a: Float[Tensor, "r d"],
    keys: Int[Tensor, "k"],
    ranks: list[int],
    slots: list[int],
    p: float,
    needs_a: bool,
) -> Float[Tensor, "_ d"]:
    """dA in a.dtype, summed in float32; no rows if `needs_a` is False.

    Adds x's gradient to dx, which must be contiguous, unless dx is None.
    """
    n, d = x.shape
    bm, bn, pair, warps = _BACKWARD["one" if len(ranks) == 1 else "several"]
    x = x if x.stride(1) == 1 else x.contiguous()
    dx_a = dx_a if dx_a.stride(1) == 1 else dx_a.contiguous()
    assert dx is None or dx.is_contiguous()
    chunk = triton.cdiv(triton.cdiv(n, _CHUNKS), bm) * bm
    chunks, columns = triton.cdiv(n, chunk), a.shape[0] if needs_a else 0
    sums = torch.empty((chunks, columns, d), dtype=torch.float32, device=x.device)
    threshold, scale, static = _static(x.dtype, ranks, slots, p)
    blocks = triton.cdiv(d, 2 * HALF) * (HALF // bn) if pair else triton.cdiv(d, bn)
    launch(
        _masked_x_a_backward_kernel, (blocks, chunks),
        x if dx is None else dx, x, dx_a, a.contiguous(), keys, sums,
        n, d, columns, x.stride(0), dx_a.stride(0), threshold, scale, chunk,
        **static, NEEDS_X=dx is not None, NEEDS_A=needs_a,  # pyright: ignore
        BM=bm, BN=bn, HALF=HALF, PAIR=pair, num_warps=warps,  # pyright: ignore
    )  # fmt: skip
    return sums.sum(0).to(a.dtype)
