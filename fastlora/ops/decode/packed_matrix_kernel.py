"""Triton kernel of `decode_product` for 2 to 64 rows and 4-bit weights (NF4, FP4).

It dequantises weights while it reads them. packed_vector_kernel.py describes the tiles.
"""

# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportPossiblyUnboundVariable=false
import triton
import triton.language as tl


@triton.jit
def packed_matrix_kernel(  # noqa: C901, PLR0912, PLR0915
    x_ptr, norm_ptr, w0_ptr, w1_ptr, w2_ptr, absmax0_ptr, absmax1_ptr, absmax2_ptr,
    scale0_ptr, scale1_ptr, scale2_ptr, offset0_ptr, offset1_ptr, offset2_ptr,
    levels_ptr, code_ptr, a_ptr, b_ptr, gain_ptr, bias_ptr, residual_ptr,
    out_ptr, low_ptr, clear_ptr, batch, eps, scaling0, scaling1, scaling2,
    K: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, R: tl.constexpr,
    A_ROWS: tl.constexpr, CLEAR: tl.constexpr, EMPTY: tl.constexpr, NORM: tl.constexpr,
    GATED: tl.constexpr, GELU: tl.constexpr, GAIN: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr, NESTED: tl.constexpr, ROUND: tl.constexpr, SHUFFLE: tl.constexpr,
    TABLE: tl.constexpr,
    BATCH: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`packed_vector_kernel` for a batch of rows, by tl.dot."""
    program = tl.program_id(0)
    row, k, rank = tl.arange(0, BN), tl.arange(0, BK), tl.arange(0, max(R, 1))
    lane = tl.arange(0, BATCH)[None, :]
    A_PROGRAMS: tl.constexpr = (A_ROWS + BN - 1) // BN
    P0: tl.constexpr = (N0 + BN - 1) // BN
    P1: tl.constexpr = (N1 + BN - 1) // BN
    BLOCKS: tl.constexpr = K // BLOCK
    NB: tl.constexpr = BK // BLOCK
    HALF: tl.constexpr = BLOCK // 2
    kind = x_ptr.dtype.element_ty
    x_at = lane * K + k[:, None]
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if CLEAR > 0:
        for start in range(program * BC, CLEAR, tl.num_programs(0) * BC):
            c = start + tl.arange(0, BC)
            tl.store(clear_ptr + c, tl.full((BC,), EMPTY, tl.int32), mask=c < CLEAR)
    if NORM:
        squares = tl.zeros((BK, BATCH), tl.float32)
    y = tl.zeros((BN, BATCH), tl.float32)
    if program < A_PROGRAMS:
        a_row = program * BN + row
        a_here = (a_row < A_ROWS)[:, None]
        for start in tl.range(0, K, BK, num_stages=STAGES):
            inside = k < K - start
            x = tl.load(x_ptr + x_at + start, mask=(lane < batch) & inside[:, None], other=0.0)
            a_at = a_row[:, None] * K + (start + k)[None, :]
            a = tl.load(a_ptr + a_at, mask=a_here & inside[None, :], other=0.0)
            if NORM:
                weight = tl.load(norm_ptr + start + k, mask=inside, other=0.0).to(tl.float32)
                wide = x.to(tl.float32)
                squares += wide * wide
                x = (wide * weight[:, None]).to(kind)
            y = tl.dot(a, x, y, input_precision=PRECISION)
        if NORM:
            y *= (1 / tl.sqrt(tl.sum(squares, 0) / K + eps))[None, :]
        low_at = a_row[:, None] * BATCH + lane
        tl.store(low_ptr + low_at, y.to(tl.int32, bitcast=True), mask=a_here)
    else:
        tile = program - A_PROGRAMS
        segment, before, width = 0, 0, N0
        first, end, w_ptr = tile * BN, N0, w0_ptr
        absmax_ptr, scale_ptr, offset_ptr = absmax0_ptr, scale0_ptr, offset0_ptr
        if N1 > 0 and not GATED:
            if tile >= P0:
                segment, first, end, w_ptr = 1, (tile - P0) * BN, N1, w1_ptr
                absmax_ptr, scale_ptr, offset_ptr = absmax1_ptr, scale1_ptr, offset1_ptr
                before, width = N0, N1
            if N2 > 0:
                if tile >= P0 + P1:
                    segment, first, end, w_ptr = 2, (tile - P0 - P1) * BN, N2, w2_ptr
                    absmax_ptr, scale_ptr, offset_ptr = absmax2_ptr, scale2_ptr, offset2_ptr
                    before, width = N0 + N1, N2
        here = (row < end - first)[:, None]
        if SHUFFLE is not None:  # level number (lane % 16) in each lane
            table = tl.inline_asm_elementwise(
                TABLE, "=r,l", [levels_ptr.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
            )
        nb, byte = tl.arange(0, NB), tl.arange(0, HALF)
        blocks = first.to(tl.int64) * BLOCKS + row[:, None] * BLOCKS + nb[None, :]  # [BN, NB]
        bytes_at = blocks[:, :, None] * HALF + byte[None, None, :]
        if GATED:
            z = tl.zeros((BN, BATCH), tl.float32)
        for step in tl.range(0, (K + BK - 1) // BK, num_stages=STAGES):
            start = step * BK
            inside = k < K - start
            x = tl.load(x_ptr + x_at + start, mask=(lane < batch) & inside[:, None], other=0.0)
            if NORM:
                weight = tl.load(norm_ptr + start + k, mask=inside, other=0.0).to(tl.float32)
                wide = x.to(tl.float32)
                squares += wide * wide
                x = (wide * weight[:, None]).to(kind)
            known = here & (nb < BLOCKS - step * NB)[None, :]
            places = blocks + step * NB
            packed = tl.load(w_ptr + bytes_at + step * (BK // 2), mask=known[:, :, None], other=0)
            numbers = tl.load(absmax_ptr + places, mask=known, other=0)
            if NESTED:
                scale = tl.load(scale_ptr + places // 256, mask=known, other=0.0)
                absmax = tl.load(code_ptr + numbers.to(tl.int32)) * scale + tl.load(offset_ptr)
            else:
                absmax = numbers
            if SHUFFLE is not None:
                high, low_half = tl.inline_asm_elementwise(
                    SHUFFLE, "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r,r", [packed, table],
                    dtype=(tl.int32, tl.int32), is_pure=True, pack=4,
                )  # fmt: skip
                high = high.to(tl.float32, bitcast=True)
                low_half = low_half.to(tl.float32, bitcast=True)
            else:
                high = tl.load(levels_ptr + (packed >> 4).to(tl.int32))
                low_half = tl.load(levels_ptr + (packed & 15).to(tl.int32))
            high *= absmax[:, :, None]
            low_half *= absmax[:, :, None]
            w = tl.reshape(tl.join(high.to(ROUND), low_half.to(ROUND)), (BN, BK)).to(kind)
            y = tl.dot(w, x, y, input_precision=PRECISION)
            if GATED:
                packed = tl.load(
                    w1_ptr + bytes_at + step * (BK // 2), mask=known[:, :, None], other=0
                )
                numbers = tl.load(absmax1_ptr + places, mask=known, other=0)
                if NESTED:
                    scale = tl.load(scale1_ptr + places // 256, mask=known, other=0.0)
                    absmax = tl.load(code_ptr + numbers.to(tl.int32)) * scale
                    absmax += tl.load(offset1_ptr)
                else:
                    absmax = numbers
                if SHUFFLE is not None:
                    high, low_half = tl.inline_asm_elementwise(
                        SHUFFLE, "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r,r", [packed, table],
                        dtype=(tl.int32, tl.int32), is_pure=True, pack=4,
                    )  # fmt: skip
                    high = high.to(tl.float32, bitcast=True)
                    low_half = low_half.to(tl.float32, bitcast=True)
                else:
                    high = tl.load(levels_ptr + (packed >> 4).to(tl.int32))
                    low_half = tl.load(levels_ptr + (packed & 15).to(tl.int32))
                high *= absmax[:, :, None]
                low_half *= absmax[:, :, None]
                w = tl.reshape(tl.join(high.to(ROUND), low_half.to(ROUND)), (BN, BK)).to(kind)
                z = tl.dot(w, x, z, input_precision=PRECISION)
        if NORM:
            rstd = 1 / tl.sqrt(tl.sum(squares, 0) / K + eps)
            y *= rstd[None, :]
            if GATED:
                z *= rstd[None, :]
        at = before + first + row
        if R > 0:
            b_at = at[:, None] * R + rank[None, :]
            b = tl.load(b_ptr + b_at, mask=here, other=0.0)
            read_at = low_ptr + segment * R * BATCH + rank[:, None] * BATCH + lane
            missing = 1
            while missing > 0:  # a tensor from this loop crashes a pass of triton 3.6
                bits = tl.load(read_at, volatile=True)
                missing = tl.max(tl.max((bits == EMPTY).to(tl.int32), 1), 0)
            low = tl.load(read_at, volatile=True).to(tl.float32, bitcast=True).to(kind)
            scaling = scaling0
            if N1 > 0 and not GATED:
                if segment == 1:
                    scaling = scaling1
                if segment == 2:
                    scaling = scaling2
            y += scaling * tl.dot(b, low, input_precision=PRECISION)
            if GATED:
                b = tl.load(b_ptr + N0 * R + b_at, mask=here, other=0.0)
                missing = 1
                while missing > 0:
                    bits = tl.load(read_at + R * BATCH, volatile=True)
                    missing = tl.max(tl.max((bits == EMPTY).to(tl.int32), 1), 0)
                low = tl.load(read_at + R * BATCH, volatile=True)
                low = low.to(tl.float32, bitcast=True).to(kind)
                z += scaling1 * tl.dot(b, low, input_precision=PRECISION)
        if GAIN:
            y *= tl.load(gain_ptr + at, mask=row < end - first, other=0.0)[:, None]
            if GATED:
                z *= tl.load(gain_ptr + N0 + at, mask=row < end - first, other=0.0)[:, None]
        if BIAS:
            y += tl.load(bias_ptr + at, mask=row < end - first, other=0.0)[:, None]
            if GATED:
                z += tl.load(bias_ptr + N0 + at, mask=row < end - first, other=0.0)[:, None]
        if GATED:
            gate = y
            if GELU:  # x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x**3)) is GELU's tanh form
                gate = 1.5957691216057308 * (y + 0.044715 * y * y * y)
            y *= tl.sigmoid(gate) * z
        out_at = batch.to(tl.int64) * before + lane.to(tl.int64) * width + (first + row)[:, None]
        if RESIDUAL:
            residual = tl.load(residual_ptr + out_at, mask=here & (lane < batch), other=0.0)
            y += residual.to(tl.float32)
        tl.store(out_ptr + out_at, y.to(out_ptr.dtype.element_ty), mask=here & (lane < batch))
