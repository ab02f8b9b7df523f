"""Triton kernel of `decode_product` for 2 to 64 rows and dense weights: matrix_kernel with split K.

matrix_kernel has one program for each tile of rows: 64 for the o and down products of 8B, on 132
multiprocessors. Here SPLITS programs share a tile, each with a part of the columns. They store
their sums, and the last one adds all of them up in a fixed order, so that results do not depend on
which program is last. Rows of A are split too: `low` has SPLITS parts, which a reader adds up.

`counts` is 0 before a launch and after it. Launches of one stream may share `counts` and `sums`:
they are touched only after gdc_wait(), when all earlier launches are complete.
"""

# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportPossiblyUnboundVariable=false
import triton
import triton.language as tl


@triton.jit
def split_kernel(  # noqa: C901, PLR0912, PLR0915  (no helpers, see linear_kernel.py)
    x_ptr, norm_ptr, w0_ptr, w1_ptr, w2_ptr, a_ptr, b_ptr, gain_ptr, bias_ptr, residual_ptr,
    out_ptr, low_ptr, clear_ptr, sums_ptr, counts_ptr, batch, eps, scaling0, scaling1, scaling2,
    K: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, R: tl.constexpr,
    A_ROWS: tl.constexpr, CLEAR: tl.constexpr, EMPTY: tl.constexpr, NORM: tl.constexpr,
    GATED: tl.constexpr, GELU: tl.constexpr, GAIN: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BATCH: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr,
    STAGES: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`matrix_kernel` without a gate: SPLITS programs share each tile. GELU is not read."""
    tl.static_assert(not GATED)
    program = tl.program_id(0)
    row, k, rank = tl.arange(0, BN), tl.arange(0, BK), tl.arange(0, max(R, 1))
    lane = tl.arange(0, BATCH)[None, :]
    A_PROGRAMS: tl.constexpr = (A_ROWS + BN - 1) // BN * SPLITS
    P0: tl.constexpr = (N0 + BN - 1) // BN
    P1: tl.constexpr = (N1 + BN - 1) // BN
    PER: tl.constexpr = ((K + BK - 1) // BK + SPLITS - 1) // SPLITS  # steps of one program
    kind = x_ptr.dtype.element_ty
    split = program % SPLITS
    # 1. The rows of this program: [first, first + BN) of the matrix at w_ptr.
    segment, before, width = 0, 0, N0
    tile = (program - A_PROGRAMS) // SPLITS
    if program < A_PROGRAMS:
        first, end, w_ptr = program // SPLITS * BN, A_ROWS, a_ptr
    else:
        first, end, w_ptr = tile * BN, N0, w0_ptr
        if N1 > 0:
            if tile >= P0:
                segment, first, end, w_ptr = 1, (tile - P0) * BN, N1, w1_ptr
                before, width = N0, N1
            if N2 > 0:
                if tile >= P0 + P1:
                    segment, first, end, w_ptr = 2, (tile - P0 - P1) * BN, N2, w2_ptr
                    before, width = N0 + N1, N2
    here = (row < end - first)[:, None]
    w_at = first.to(tl.int64) * K + row[:, None] * K + k[None, :]
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if CLEAR > 0:
        for start in range(program * BC, CLEAR, tl.num_programs(0) * BC):
            c = start + tl.arange(0, BC)
            tl.store(clear_ptr + c, tl.full((BC,), EMPTY, tl.int32), mask=c < CLEAR)
    # 2. W x over this program's columns.
    y = tl.zeros((BN, BATCH), tl.float32)
    if NORM:
        squares = tl.zeros((BK, BATCH), tl.float32)
    x_at = lane * K + k[:, None]
    for step in tl.range(0, PER, num_stages=STAGES):
        start = (split * PER + step) * BK
        inside = k < K - start
        x = tl.load(x_ptr + x_at + start, mask=(lane < batch) & inside[:, None], other=0.0)
        w = tl.load(w_ptr + w_at + start, mask=here & inside[None, :], other=0.0)
        if NORM:
            weight = tl.load(norm_ptr + start + k, mask=inside, other=0.0).to(tl.float32)
            wide = x.to(tl.float32)
            squares += wide * wide
            x = (wide * weight[:, None]).to(kind)
        y = tl.dot(w, x, y, input_precision=PRECISION)
    # 3. Parts of A x, which readers normalise, or of y.
    if program < A_PROGRAMS:
        low_at = (split * A_ROWS + first + row)[:, None] * BATCH + lane
        tl.store(low_ptr + low_at, y.to(tl.int32, bitcast=True), mask=here)
    else:
        PART: tl.constexpr = (BN + 1) * BATCH
        part_ptr = sums_ptr + tile * (SPLITS * PART)
        sum_at = row[:, None] * BATCH + lane
        tl.store(part_ptr + split * PART + sum_at, y)
        if NORM:
            square = tl.sum(squares, 0)
            tl.store(part_ptr + split * PART + BN * BATCH + tl.arange(0, BATCH), square)
        tl.debug_barrier()  # the count follows the stores of all threads
        if tl.atomic_add(counts_ptr + tile, 1) == SPLITS - 1:
            tl.store(counts_ptr + tile, 0)
            total = tl.zeros((BN, BATCH), tl.float32)
            for i in tl.static_range(SPLITS):
                total += tl.load(part_ptr + i * PART + sum_at, cache_modifier=".cg")
            if NORM:
                every = tl.zeros((BATCH,), tl.float32)
                for i in tl.static_range(SPLITS):
                    square_at = i * PART + BN * BATCH + tl.arange(0, BATCH)
                    every += tl.load(part_ptr + square_at, cache_modifier=".cg")
            # 4. The results.
            at = before + first + row
            if R > 0:
                b = tl.load(b_ptr + at[:, None] * R + rank[None, :], mask=here, other=0.0)
                read_at = low_ptr + (segment * R + rank[:, None]) * BATCH + lane
                low = tl.zeros((R, BATCH), tl.float32)
                for i in tl.static_range(SPLITS):
                    missing = 1
                    while missing > 0:  # a tensor from this loop crashes a pass of triton 3.6
                        bits = tl.load(read_at + i * A_ROWS * BATCH, volatile=True)
                        missing = tl.max(tl.max((bits == EMPTY).to(tl.int32), 1), 0)
                    bits = tl.load(read_at + i * A_ROWS * BATCH, volatile=True)
                    low += bits.to(tl.float32, bitcast=True)
                scaling = scaling0
                if N1 > 0:
                    if segment == 1:
                        scaling = scaling1
                    if segment == 2:
                        scaling = scaling2
                if NORM:  # before it is rounded: 16 bits do not hold every sum
                    low *= (1 / tl.sqrt(every / K + eps))[None, :]
            if NORM:
                total *= (1 / tl.sqrt(every / K + eps))[None, :]
            if R > 0:
                total += scaling * tl.dot(b, low.to(kind), input_precision=PRECISION)
            if GAIN:
                total *= tl.load(gain_ptr + at, mask=row < end - first, other=0.0)[:, None]
            if BIAS:
                total += tl.load(bias_ptr + at, mask=row < end - first, other=0.0)[:, None]
            out_at = batch.to(tl.int64) * before + lane.to(tl.int64) * width
            out_at += (first + row)[:, None]
            if RESIDUAL:
                residual = tl.load(residual_ptr + out_at, mask=here & (lane < batch), other=0.0)
                total += residual.to(tl.float32)
            made = total.to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + out_at, made, mask=here & (lane < batch))
