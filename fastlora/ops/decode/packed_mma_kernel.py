"""Triton kernel of `decode_product` for one row and 4-bit weights, with tensor cores.

packed_vector_kernel spends one shuffle and three other instructions on each value. Here a table in
shared memory returns the two levels of a byte in one read, and a tensor core multiplies them:

- The table has an entry of two 16-bit levels for each byte, and 32 copies of each entry, one for
  each lane. A lane reads its own bank, so no two lanes wait for each other.
- mma.m16n8k16 multiplies 16 rows of levels with x. Only the first of its eight columns is used.
- A block's sum is multiplied by its absmax in float32. Levels are rounded to 16 bits.

Every tensor has one element for each thread, so that Triton needs no change of layout, and inline
PTX sees the lanes that mma expects: lane 4 g + t has rows g and g + 8, and 16 values of a block of
64 beginning at 16 t. The warps of a program share its rows. Warp i has every WARPS-th group of four
blocks. Triton's interpreter cannot run the kernel.
"""

# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportIndexIssue=false
# pyright: reportAssignmentType=false
import triton
import triton.language as tl


@triton.jit
def packed_mma_kernel(  # noqa: C901, PLR0912, PLR0915  (no helpers, see linear_kernel.py)
    x_ptr, norm_ptr, w0_ptr, w1_ptr, w2_ptr, absmax0_ptr, absmax1_ptr, absmax2_ptr,
    scale0_ptr, scale1_ptr, scale2_ptr, offset0_ptr, offset1_ptr, offset2_ptr,
    levels_ptr, code_ptr, a_ptr, b_ptr, gain_ptr, bias_ptr, residual_ptr,
    out_ptr, low_ptr, clear_ptr, eps, scaling0, scaling1, scaling2,
    K: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, R: tl.constexpr,
    A_ROWS: tl.constexpr, CLEAR: tl.constexpr, EMPTY: tl.constexpr, NORM: tl.constexpr,
    GATED: tl.constexpr, GELU: tl.constexpr, GAIN: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr, NESTED: tl.constexpr, COPIES: tl.constexpr,
    FILL: tl.constexpr, READ: tl.constexpr, READ_NUMBERS: tl.constexpr, READ_FLOATS: tl.constexpr,
    STEP: tl.constexpr, WARPS: tl.constexpr, AHEAD: tl.constexpr, TILES: tl.constexpr,
    PLACES: tl.constexpr,
    BA: tl.constexpr, KA: tl.constexpr, BC: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row x [K] in 16 bits, as `packed_vector_kernel`. A program has TILES times 16 rows.

    K is a multiple of 256, BLOCK is 64. AHEAD: groups of blocks that are read in advance, 1 or 2.
    """
    program = tl.program_id(0)
    row, rank = tl.arange(0, 16), tl.arange(0, max(R, 1))
    BN: tl.constexpr = 16 * TILES
    A_PROGRAMS: tl.constexpr = (A_ROWS + BA - 1) // BA
    P0: tl.constexpr = (N0 + BN - 1) // BN
    P1: tl.constexpr = (N1 + BN - 1) // BN
    BLOCKS: tl.constexpr = K // BLOCK
    STEPS: tl.constexpr = (BLOCKS // 4 + WARPS - 1) // WARPS  # of one warp, for each row
    EVEN: tl.constexpr = STEPS * WARPS * 4 == BLOCKS
    MATRICES: tl.constexpr = 1 + GATED
    ALL: tl.constexpr = STEPS * MATRICES * TILES
    if program < A_PROGRAMS:
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
        # 1. The rows of this program, and the rows and columns of each thread.
        tile = program - A_PROGRAMS
        segment, first, end, w_ptr = 0, tile * BN, N0, w0_ptr
        absmax_ptr, scale_ptr, offset_ptr = absmax0_ptr, scale0_ptr, offset0_ptr
        before = 0
        if N1 > 0 and not GATED:
            if tile >= P0:
                segment, first, end, w_ptr = 1, (tile - P0) * BN, N1, w1_ptr
                absmax_ptr, scale_ptr, offset_ptr = absmax1_ptr, scale1_ptr, offset1_ptr
                before = N0
            if N2 > 0:
                if tile >= P0 + P1:
                    segment, first, end, w_ptr = 2, (tile - P0 - P1) * BN, N2, w2_ptr
                    absmax_ptr, scale_ptr, offset_ptr = absmax2_ptr, scale2_ptr, offset2_ptr
                    before = N0 + N1
        thread = tl.arange(0, 32 * WARPS)
        g, t, group = thread % 32 // 4, thread % 4, thread // 32
        SIZE: tl.constexpr = BLOCK * BLOCKS // 2  # bytes of a row
        # 2. What no kernel writes is read before the wait. Rows and groups that do not exist
        # read the last ones.
        number_a = tl.zeros((32 * WARPS,), tl.int32)
        number_b = number_a
        for ahead in tl.static_range(AHEAD):
            if ahead < ALL:
                which = w_ptr
                values = absmax_ptr
                if GATED and ahead // STEPS % 2 == 1:
                    which = w1_ptr
                    values = absmax1_ptr
                here = ahead % STEPS * WARPS + group
                if not EVEN:
                    here = tl.minimum(here, BLOCKS // 4 - 1)
                below = first + ahead // (STEPS * MATRICES) * 16 + g
                top = tl.minimum(below, end - 1).to(tl.int64)
                down = tl.minimum(below + 8, end - 1).to(tl.int64)
                from_ = which.to(tl.int64) + here * 128 + t * 8
                packed = tl.inline_asm_elementwise(
                    READ, "=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,l,l",
                    [from_ + top * SIZE, from_ + down * SIZE],
                    dtype=(tl.int32,) * 16, is_pure=True, pack=1,
                )  # fmt: skip
                if NESTED:
                    from_ = values.to(tl.int64) + here * 4
                    number_a, number_b = tl.inline_asm_elementwise(
                        READ_NUMBERS, "=r,=r,l,l",
                        [from_ + top * BLOCKS, from_ + down * BLOCKS],
                        dtype=(tl.int32,) * 2, is_pure=True, pack=1,
                    )  # fmt: skip
                if ahead == 0:
                    packed_0, number_a_0, number_b_0 = packed, number_a, number_b
                else:
                    packed_1, number_a_1, number_b_1 = packed, number_a, number_b
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()
        table = tl.inline_asm_elementwise(
            FILL, "=r,l,l,r", [levels_ptr.to(tl.int64), code_ptr.to(tl.int64), thread],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
        offset = tl.zeros((32 * WARPS,), tl.float32)
        offset_u = offset
        if NESTED:
            offset += tl.load(offset_ptr)
            if GATED:
                offset_u += tl.load(offset1_ptr)
        if R > 0:
            low_at = low_ptr + (program % COPIES) * A_ROWS + segment * R + rank
        if PDL:
            tl.extra.cuda.gdc_wait()
        x_from = tl.inline_asm_elementwise(  # an address that exists only after the wait
            "mov.u64 $0, $1;", "=l,l", [x_ptr.to(tl.int64)],
            dtype=tl.int64, is_pure=False, pack=1,
        )  # fmt: skip
        norm_from = norm_ptr.to(tl.int64)
        if CLEAR > 0:
            for start in range(program * BC, CLEAR, tl.num_programs(0) * BC):
                c = start + tl.arange(0, BC)
                tl.store(clear_ptr + c, tl.full((BC,), EMPTY, tl.int32), mask=c < CLEAR)
        if R > 0:
            bits = tl.load(low_at, volatile=True)
            if GATED:
                bits_u = tl.load(low_at + R, volatile=True)
        if NORM:
            place = tl.arange(0, PLACES)
            every_x = tl.load(x_ptr + place, mask=place < K, other=0.0).to(tl.float32)
            rstd = 1 / tl.sqrt(tl.sum(every_x * every_x, 0) / K + eps)
        # 3. W x, one group of blocks after the other; the next groups are read before.
        for at in tl.static_range(ALL):
            now, this_a, this_b = packed_0, number_a_0, number_b_0
            if AHEAD > 1 and at + 1 < ALL:
                packed_0, number_a_0, number_b_0 = packed_1, number_a_1, number_b_1
            if at + AHEAD < ALL:
                which = w_ptr
                values = absmax_ptr
                if GATED and (at + AHEAD) // STEPS % 2 == 1:
                    which = w1_ptr
                    values = absmax1_ptr
                here = (at + AHEAD) % STEPS * WARPS + group
                if not EVEN:
                    here = tl.minimum(here, BLOCKS // 4 - 1)
                below = first + (at + AHEAD) // (STEPS * MATRICES) * 16 + g
                top = tl.minimum(below, end - 1).to(tl.int64)
                down = tl.minimum(below + 8, end - 1).to(tl.int64)
                from_ = which.to(tl.int64) + here * 128 + t * 8
                packed = tl.inline_asm_elementwise(
                    READ, "=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,l,l",
                    [from_ + top * SIZE, from_ + down * SIZE],
                    dtype=(tl.int32,) * 16, is_pure=True, pack=1,
                )  # fmt: skip
                if NESTED:
                    from_ = values.to(tl.int64) + here * 4
                    number_a, number_b = tl.inline_asm_elementwise(
                        READ_NUMBERS, "=r,=r,l,l",
                        [from_ + top * BLOCKS, from_ + down * BLOCKS],
                        dtype=(tl.int32,) * 2, is_pure=True, pack=1,
                    )  # fmt: skip
                if AHEAD == 1:
                    packed_0, number_a_0, number_b_0 = packed, number_a, number_b
                else:
                    packed_1, number_a_1, number_b_1 = packed, number_a, number_b
            # The absmax values of this group: numbers and their scales, or addresses.
            if at % STEPS == 0:
                sum_a = tl.zeros((32 * WARPS,), tl.float32)
                sum_b = sum_a
            values = absmax_ptr
            scales = scale_ptr
            plus = offset
            if GATED and at // STEPS % 2 == 1:
                values = absmax1_ptr
                scales = scale1_ptr
                plus = offset_u
            here = at % STEPS * WARPS + group
            exists = here < BLOCKS // 4
            here = tl.minimum(here, BLOCKS // 4 - 1)
            top = tl.minimum(first + at // (STEPS * MATRICES) * 16 + g, end - 1).to(tl.int64)
            down = tl.minimum(first + at // (STEPS * MATRICES) * 16 + g + 8, end - 1).to(tl.int64)
            if NESTED:
                scale_a, scale_b = tl.inline_asm_elementwise(
                    READ_FLOATS, "=f,=f,l,l",
                    [scales.to(tl.int64) + (top * BLOCKS + here * 4) // 256 * 4,
                     scales.to(tl.int64) + (down * BLOCKS + here * 4) // 256 * 4],
                    dtype=(tl.float32,) * 2, is_pure=True, pack=1,
                )  # fmt: skip
            else:
                this_a = values.to(tl.int64) + (top * BLOCKS + here * 4) * 4
                this_b = values.to(tl.int64) + (down * BLOCKS + here * 4) * 4
                scale_a, scale_b = plus, plus
            x_at = here.to(tl.int64) * 512 + t * 32
            new_a, new_b = tl.inline_asm_elementwise(
                STEP,
                "=f,=f,f,f,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,l,l,r,r,r,f,f,f" if NESTED else
                "=f,=f,f,f,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,l,l,r,l,l,f,f,f",
                [sum_a, sum_b, now[0], now[1], now[2], now[3], now[4], now[5], now[6], now[7],
                 now[8], now[9], now[10], now[11], now[12], now[13], now[14], now[15],
                 x_from + x_at, norm_from + x_at, table, this_a, this_b, scale_a, scale_b, plus],
                dtype=(tl.float32,) * 2, is_pure=True, pack=1,
            )  # fmt: skip
            if EVEN:
                sum_a, sum_b = new_a, new_b
            else:
                sum_a, sum_b = tl.where(exists, new_a, sum_a), tl.where(exists, new_b, sum_b)
            if at % STEPS == STEPS - 1:
                rows_a = tl.sum(tl.sum(tl.reshape(sum_a, (WARPS, 8, 4)), 2), 0)
                rows_b = tl.sum(tl.sum(tl.reshape(sum_b, (WARPS, 8, 4)), 2), 0)
                total_u = tl.reshape(tl.permute(tl.join(rows_a, rows_b), (1, 0)), (16,))
                if NORM:
                    total_u *= rstd
                if at % (STEPS * MATRICES) < STEPS:
                    total = total_u
                if at % (STEPS * MATRICES) == STEPS * MATRICES - 1:
                    # 4. The results. The comments in vector_kernel explain the reads of `low`.
                    low_row = first + at // (STEPS * MATRICES) * 16
                    out_row = before + low_row + row
                    inside = row < end - low_row
                    if R > 0:
                        b_at = out_row[:, None] * R + rank[None, :]
                        b = tl.load(b_ptr + b_at, mask=inside[:, None], other=0.0)
                        if GATED:
                            b_u = tl.load(b_ptr + N0 * R + b_at, mask=inside[:, None], other=0.0)
                        missing = tl.max((bits == EMPTY).to(tl.int32), 0)
                        if GATED:
                            missing_u = tl.max((bits_u == EMPTY).to(tl.int32), 0)
                            missing = tl.maximum(missing, missing_u)
                        while missing > 0:
                            bits = tl.load(low_at, volatile=True)
                            missing = tl.max((bits == EMPTY).to(tl.int32), 0)
                            if GATED:
                                bits_u = tl.load(low_at + R, volatile=True)
                                missing_u = tl.max((bits_u == EMPTY).to(tl.int32), 0)
                                missing = tl.maximum(missing, missing_u)
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
                        total *= tl.load(gain_ptr + out_row, mask=inside, other=0.0)
                        if GATED:
                            total_u *= tl.load(gain_ptr + N0 + out_row, mask=inside, other=0.0)
                    if BIAS:
                        total += tl.load(bias_ptr + out_row, mask=inside, other=0.0)
                        if GATED:
                            total_u += tl.load(bias_ptr + N0 + out_row, mask=inside, other=0.0)
                    if GATED:
                        gate = total
                        if (
                            GELU
                        ):  # x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x**3)) is GELU's tanh form
                            gate = 1.5957691216057308 * (total + 0.044715 * total * total * total)
                        total *= tl.sigmoid(gate) * total_u
                    if RESIDUAL:
                        kept = tl.load(residual_ptr + out_row, mask=inside, other=0.0)
                        total += kept.to(tl.float32)
                    tl.store(out_ptr + out_row, total.to(out_ptr.dtype.element_ty), mask=inside)
