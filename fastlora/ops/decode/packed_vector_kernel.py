"""Triton kernel of `decode_product` for one row and 4-bit weights (NF4, FP4).

It dequantises weights while it reads them: a weight is levels[index] * absmax of its block, rounded
to the record's dtype (ops/quant/dequantize.py). Otherwise it is vector_kernel of linear_kernel.py,
whose text explains low-rank terms and PDL.

A block of BLOCK values is a row of BLOCK / 2 bytes here, so that tiles are [rows, blocks, bytes]
and each block's absmax is computed once. The two values of a byte are multiplied with x at even and
at odd places.
"""

# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportPossiblyUnboundVariable=false
import triton
import triton.language as tl


@triton.jit
def packed_vector_kernel(  # noqa: C901, PLR0912, PLR0915  (no helpers, see linear_kernel.py)
    x_ptr, norm_ptr, w0_ptr, w1_ptr, w2_ptr, absmax0_ptr, absmax1_ptr, absmax2_ptr,
    scale0_ptr, scale1_ptr, scale2_ptr, offset0_ptr, offset1_ptr, offset2_ptr,
    levels_ptr, code_ptr, a_ptr, b_ptr, gain_ptr, bias_ptr, residual_ptr,
    out_ptr, low_ptr, clear_ptr, eps, scaling0, scaling1, scaling2,
    K: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, R: tl.constexpr,
    A_ROWS: tl.constexpr, CLEAR: tl.constexpr, EMPTY: tl.constexpr, NORM: tl.constexpr,
    GATED: tl.constexpr, GELU: tl.constexpr, GAIN: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr, NESTED: tl.constexpr, DOT8: tl.constexpr, LOAD8: tl.constexpr,
    TABLE: tl.constexpr,
    COPIES: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BA: tl.constexpr, KA: tl.constexpr, BC: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One row x [K], as `vector_kernel`. BK is a multiple of BLOCK."""
    program = tl.program_id(0)
    row, rank = tl.arange(0, BN), tl.arange(0, max(R, 1))
    A_PROGRAMS: tl.constexpr = (A_ROWS + BA - 1) // BA
    P0: tl.constexpr = (N0 + BN - 1) // BN
    P1: tl.constexpr = (N1 + BN - 1) // BN
    BLOCKS: tl.constexpr = K // BLOCK
    NB: tl.constexpr = BK // BLOCK
    WORDS: tl.constexpr = BLOCK // 8  # of 32 bits, eight values each
    if program < A_PROGRAMS:
        # Rows of A, which is dense.
        a_row, k = program * BA + tl.arange(0, BA), tl.arange(0, KA)
        a_here = (a_row < A_ROWS)[:, None]
        a_at = a_row[:, None] * K + k[None, :]
        a = tl.load(a_ptr + a_at, mask=a_here & (k < K)[None, :], other=0.0)
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()
        if CLEAR > 0:
            for start in range(program * BC, CLEAR, tl.num_programs(0) * BC):
                c = start + tl.arange(0, BC)
                tl.store(clear_ptr + c, tl.full((BC,), EMPTY, tl.int32), mask=c < CLEAR)
        sums = tl.zeros((BA, KA), tl.float32)
        a_squares = tl.zeros((KA,), tl.float32)
        for start in tl.static_range(0, K, KA):
            a_x = tl.load(x_ptr + start + k, mask=start + k < K, other=0.0).to(tl.float32)
            if NORM:
                a_squares += a_x * a_x
                a_x *= tl.load(norm_ptr + start + k, mask=start + k < K, other=0.0).to(tl.float32)
            now_a = a
            if start + KA < K:
                inside_a = (k < K - start - KA)[None, :]
                a = tl.load(a_ptr + a_at + (start + KA), mask=a_here & inside_a, other=0.0)
            sums += now_a.to(tl.float32) * a_x[None, :]
        low_sum = tl.sum(sums, 1)
        if NORM:
            low_sum *= 1 / tl.sqrt(tl.sum(a_squares, 0) / K + eps)
        copies = low_ptr + tl.arange(0, COPIES)[:, None] * A_ROWS + a_row[None, :]
        value = tl.broadcast_to(low_sum.to(tl.int32, bitcast=True)[None, :], (COPIES, BA))
        tl.store(copies, value, mask=(a_row < A_ROWS)[None, :])
    else:
        # 1. The rows of this program: [first, first + BN) of the matrix at w_ptr.
        tile = program - A_PROGRAMS
        segment, first, end, w_ptr = 0, tile * BN, N0, w0_ptr
        absmax_ptr, scale_ptr, offset_ptr = absmax0_ptr, scale0_ptr, offset0_ptr
        at = first
        if N1 > 0 and not GATED:
            if tile >= P0:
                segment, first, end, w_ptr = 1, (tile - P0) * BN, N1, w1_ptr
                absmax_ptr, scale_ptr, offset_ptr = absmax1_ptr, scale1_ptr, offset1_ptr
                at = first + N0
            if N2 > 0:
                if tile >= P0 + P1:
                    segment, first, end, w_ptr = 2, (tile - P0 - P1) * BN, N2, w2_ptr
                    absmax_ptr, scale_ptr, offset_ptr = absmax2_ptr, scale2_ptr, offset2_ptr
                    at = first + N0 + N1
        here = row < end - first
        nb, word = tl.arange(0, NB), tl.arange(0, WORDS)
        blocks = first.to(tl.int64) * BLOCKS + row[:, None] * BLOCKS + nb[None, :]  # [BN, NB]
        words_at = blocks[:, :, None] * WORDS + word[None, None, :]
        x_at = nb[:, None] * BLOCK + word[None, :] * 8  # of the first of a word's eight values
        # 2. What no kernel writes is read before the wait.
        if DOT8 is not None:  # level number (lane % 16) in each lane
            table = tl.inline_asm_elementwise(
                TABLE, "=r,l", [levels_ptr.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
            )
        known = here[:, None] & (nb < BLOCKS)[None, :]
        packed = tl.load(w_ptr + words_at, mask=known[:, :, None], other=0)
        numbers = tl.load(absmax_ptr + blocks, mask=known, other=0)
        if GATED:
            packed_u = tl.load(w1_ptr + words_at, mask=known[:, :, None], other=0)
            numbers_u = tl.load(absmax1_ptr + blocks, mask=known, other=0)
        if R > 0:
            b_at = (at + row)[:, None] * R + rank[None, :]
            b = tl.load(b_ptr + b_at, mask=here[:, None], other=0.0)
            low_at = low_ptr + (program % COPIES) * A_ROWS + segment * R + rank
            if GATED:
                b_u = tl.load(b_ptr + N0 * R + b_at, mask=here[:, None], other=0.0)
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()
        if DOT8 is not None:  # an address that exists only after the wait
            x_address = tl.inline_asm_elementwise(
                "mov.u64 $0, $1;", "=l,l", [x_ptr.to(tl.int64)],
                dtype=tl.int64, is_pure=False, pack=1,
            )  # fmt: skip
            norm_address = norm_ptr.to(tl.int64)
            SIZE: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth // 8  # bytes
        if CLEAR > 0:
            for start in range(program * BC, CLEAR, tl.num_programs(0) * BC):
                c = start + tl.arange(0, BC)
                tl.store(clear_ptr + c, tl.full((BC,), EMPTY, tl.int32), mask=c < CLEAR)
        if RESIDUAL:
            residual = tl.load(residual_ptr + at + row, mask=here, other=0.0).to(tl.float32)
        if R > 0:
            bits = tl.load(low_at, volatile=True)
            if GATED:
                bits_u = tl.load(low_at + R, volatile=True)
        # 3. W x over blocks of K. A block's absmax multiplies the sum of eight products.
        y = tl.zeros((BN, NB, WORDS), tl.float32)
        if GATED:
            z = tl.zeros((BN, NB, WORDS), tl.float32)
        if NORM:
            squares = tl.zeros((NB, WORDS), tl.float32)
        for start in tl.static_range(0, K, BK):
            in_x = (nb < BLOCKS - start // BLOCK)[:, None]
            if DOT8 is not None:
                here_at = tl.where(in_x, start + x_at, 0)
                x0, x1, x2, x3, x4, x5, x6, x7 = tl.inline_asm_elementwise(
                    LOAD8, "=f,=f,=f,=f,=f,=f,=f,=f,l", [x_address + here_at * SIZE],
                    dtype=(tl.float32,) * 8, is_pure=True, pack=1,
                )  # fmt: skip
            else:
                x0 = tl.load(x_ptr + start + x_at + 0, mask=in_x, other=0.0).to(tl.float32)
                x1 = tl.load(x_ptr + start + x_at + 1, mask=in_x, other=0.0).to(tl.float32)
                x2 = tl.load(x_ptr + start + x_at + 2, mask=in_x, other=0.0).to(tl.float32)
                x3 = tl.load(x_ptr + start + x_at + 3, mask=in_x, other=0.0).to(tl.float32)
                x4 = tl.load(x_ptr + start + x_at + 4, mask=in_x, other=0.0).to(tl.float32)
                x5 = tl.load(x_ptr + start + x_at + 5, mask=in_x, other=0.0).to(tl.float32)
                x6 = tl.load(x_ptr + start + x_at + 6, mask=in_x, other=0.0).to(tl.float32)
                x7 = tl.load(x_ptr + start + x_at + 7, mask=in_x, other=0.0).to(tl.float32)
            if NORM:
                square = x0 * x0 + x1 * x1 + x2 * x2 + x3 * x3
                square += x4 * x4 + x5 * x5 + x6 * x6 + x7 * x7
                squares += tl.where(in_x, square, 0.0)
                if DOT8 is not None:
                    g0, g1, g2, g3, g4, g5, g6, g7 = tl.inline_asm_elementwise(
                        LOAD8, "=f,=f,=f,=f,=f,=f,=f,=f,l", [norm_address + here_at * SIZE],
                        dtype=(tl.float32,) * 8, is_pure=True, pack=1,
                    )  # fmt: skip
                    x0 *= g0
                    x1 *= g1
                    x2 *= g2
                    x3 *= g3
                    x4 *= g4
                    x5 *= g5
                    x6 *= g6
                    x7 *= g7
                else:
                    norm_at = norm_ptr + start + x_at
                    x0 *= tl.load(norm_at + 0, mask=in_x, other=0.0).to(tl.float32)
                    x1 *= tl.load(norm_at + 1, mask=in_x, other=0.0).to(tl.float32)
                    x2 *= tl.load(norm_at + 2, mask=in_x, other=0.0).to(tl.float32)
                    x3 *= tl.load(norm_at + 3, mask=in_x, other=0.0).to(tl.float32)
                    x4 *= tl.load(norm_at + 4, mask=in_x, other=0.0).to(tl.float32)
                    x5 *= tl.load(norm_at + 5, mask=in_x, other=0.0).to(tl.float32)
                    x6 *= tl.load(norm_at + 6, mask=in_x, other=0.0).to(tl.float32)
                    x7 *= tl.load(norm_at + 7, mask=in_x, other=0.0).to(tl.float32)
            now, now_numbers, now_known = packed, numbers, known
            if GATED:
                now_u, now_numbers_u = packed_u, numbers_u
            if start + BK < K:
                known = here[:, None] & (nb < BLOCKS - start // BLOCK - NB)[None, :]
                next_at, next_block = words_at + (start // BLOCK + NB) * WORDS, blocks + NB
                next_block += start // BLOCK
                packed = tl.load(w_ptr + next_at, mask=known[:, :, None], other=0)
                numbers = tl.load(absmax_ptr + next_block, mask=known, other=0)
                if GATED:
                    packed_u = tl.load(w1_ptr + next_at, mask=known[:, :, None], other=0)
                    numbers_u = tl.load(absmax1_ptr + next_block, mask=known, other=0)
            group = (blocks + start // BLOCK) // 256
            if NESTED:
                scale = tl.load(scale_ptr + group, mask=now_known, other=0.0)
                absmax = tl.load(code_ptr + now_numbers.to(tl.int32)) * scale
                absmax += tl.load(offset_ptr)
            else:
                absmax = now_numbers
            absmax = tl.where(now_known, absmax, 0.0)
            if DOT8 is not None:
                part = tl.inline_asm_elementwise(
                    DOT8, "=f,r,r,f,f,f,f,f,f,f,f",
                    [now, table, x0[None, :, :], x1[None, :, :], x2[None, :, :], x3[None, :, :],
                     x4[None, :, :], x5[None, :, :], x6[None, :, :], x7[None, :, :]],
                    dtype=tl.float32, is_pure=True, pack=1,
                )  # fmt: skip
            else:
                part = tl.zeros((BN, NB, WORDS), tl.float32)
                part += tl.load(levels_ptr + ((now >> 4) & 15)) * x0[None, :, :]
                part += tl.load(levels_ptr + ((now >> 0) & 15)) * x1[None, :, :]
                part += tl.load(levels_ptr + ((now >> 12) & 15)) * x2[None, :, :]
                part += tl.load(levels_ptr + ((now >> 8) & 15)) * x3[None, :, :]
                part += tl.load(levels_ptr + ((now >> 20) & 15)) * x4[None, :, :]
                part += tl.load(levels_ptr + ((now >> 16) & 15)) * x5[None, :, :]
                part += tl.load(levels_ptr + ((now >> 28) & 15)) * x6[None, :, :]
                part += tl.load(levels_ptr + ((now >> 24) & 15)) * x7[None, :, :]
            y += part * absmax[:, :, None]
            if GATED:
                if NESTED:
                    scale = tl.load(scale1_ptr + group, mask=now_known, other=0.0)
                    absmax = tl.load(code_ptr + now_numbers_u.to(tl.int32)) * scale
                    absmax += tl.load(offset1_ptr)
                else:
                    absmax = now_numbers_u
                absmax = tl.where(now_known, absmax, 0.0)
                if DOT8 is not None:
                    part = tl.inline_asm_elementwise(
                        DOT8, "=f,r,r,f,f,f,f,f,f,f,f",
                        [now_u, table, x0[None, :, :], x1[None, :, :], x2[None, :, :],
                         x3[None, :, :], x4[None, :, :], x5[None, :, :], x6[None, :, :],
                         x7[None, :, :]],
                        dtype=tl.float32, is_pure=True, pack=1,
                    )  # fmt: skip
                else:
                    part = tl.zeros((BN, NB, WORDS), tl.float32)
                    part += tl.load(levels_ptr + ((now_u >> 4) & 15)) * x0[None, :, :]
                    part += tl.load(levels_ptr + ((now_u >> 0) & 15)) * x1[None, :, :]
                    part += tl.load(levels_ptr + ((now_u >> 12) & 15)) * x2[None, :, :]
                    part += tl.load(levels_ptr + ((now_u >> 8) & 15)) * x3[None, :, :]
                    part += tl.load(levels_ptr + ((now_u >> 20) & 15)) * x4[None, :, :]
                    part += tl.load(levels_ptr + ((now_u >> 16) & 15)) * x5[None, :, :]
                    part += tl.load(levels_ptr + ((now_u >> 28) & 15)) * x6[None, :, :]
                    part += tl.load(levels_ptr + ((now_u >> 24) & 15)) * x7[None, :, :]
                z += part * absmax[:, :, None]
        total = tl.sum(tl.sum(y, 2), 1)
        if GATED:
            total_u = tl.sum(tl.sum(z, 2), 1)
        if NORM:
            rstd = 1 / tl.sqrt(tl.sum(tl.sum(squares, 1), 0) / K + eps)
            total *= rstd
            if GATED:
                total_u *= rstd
        # 4. The results. The comments in vector_kernel explain the reads of `low`.
        if R > 0:
            missing = tl.max((bits == EMPTY).to(tl.int32), 0)
            if GATED:
                missing = tl.maximum(missing, tl.max((bits_u == EMPTY).to(tl.int32), 0))
            while missing > 0:
                bits = tl.load(low_at, volatile=True)
                missing = tl.max((bits == EMPTY).to(tl.int32), 0)
                if GATED:
                    bits_u = tl.load(low_at + R, volatile=True)
                    missing = tl.maximum(missing, tl.max((bits_u == EMPTY).to(tl.int32), 0))
            if R > 32:
                bits = tl.load(low_at, volatile=True)
            low = bits.to(tl.float32, bitcast=True)[None, :]
            scaling = scaling0
            if N1 > 0 and not GATED:
                if segment == 1:
                    scaling = scaling1
                if segment == 2:
                    scaling = scaling2
            total += scaling * tl.sum(b.to(tl.float32) * low, 1)
            if GATED:
                if R > 32:
                    bits_u = tl.load(low_at + R, volatile=True)
                low = bits_u.to(tl.float32, bitcast=True)[None, :]
                total_u += scaling1 * tl.sum(b_u.to(tl.float32) * low, 1)
        if GAIN:
            total *= tl.load(gain_ptr + at + row, mask=here, other=0.0)
            if GATED:
                total_u *= tl.load(gain_ptr + N0 + at + row, mask=here, other=0.0)
        if BIAS:
            total += tl.load(bias_ptr + at + row, mask=here, other=0.0)
            if GATED:
                total_u += tl.load(bias_ptr + N0 + at + row, mask=here, other=0.0)
        if GATED:
            gate = total
            if GELU:  # x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x**3)) is GELU's tanh form
                gate = 1.5957691216057308 * (total + 0.044715 * total * total * total)
            total *= tl.sigmoid(gate) * total_u
        if RESIDUAL:
            total += residual
        tl.store(out_ptr + at + row, total.to(out_ptr.dtype.element_ty), mask=here)
