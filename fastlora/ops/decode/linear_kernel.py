"""Triton kernels of `decode_product` for dense weights: one row, and 2 to 64 rows.

A decode step reads every weight once, so its time is that of the memory. Each program computes a
few rows of W x and reads its part of W in one go. RMSNorm, low-rank terms, gains, biases, SwiGLU
and the residual are in the same kernel: a launch costs about as much time as reading 8 MB.

Low-rank terms. The first programs of the grid compute A x and store it in `low`; all others add
B (A x) to their rows. `low` is filled with the bit pattern EMPTY before the launch, and a program
that needs A x reads `low` until no element is EMPTY. The GPU starts programs in the order of their
numbers, so those that wait never keep the first ones from running. Each launch fills the buffer of
the launch before it (`clear`) with EMPTY again.

Programmatic dependent launch (PDL, sm_90 and later): a kernel may start while the one before it
still runs. It reads weights, which no kernel writes, until gdc_wait() returns. All results of
earlier kernels are complete and visible then.
"""

# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportPossiblyUnboundVariable=false
import triton
import triton.language as tl


# The kernels use no helper functions: the tests' type-checking hook wraps every function, and
# Triton's interpreter then looks up the helpers' names in the hook's module.
@triton.jit
def vector_kernel(  # noqa: C901, PLR0912, PLR0915  (no helpers, see above)
    x_ptr, norm_ptr, w0_ptr, w1_ptr, w2_ptr, a_ptr, b_ptr, gain_ptr, bias_ptr, residual_ptr,
    out_ptr, low_ptr, clear_ptr, eps, scaling0, scaling1, scaling2,
    K: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, R: tl.constexpr,
    A_ROWS: tl.constexpr, CLEAR: tl.constexpr, EMPTY: tl.constexpr, NORM: tl.constexpr,
    GATED: tl.constexpr, GELU: tl.constexpr, GAIN: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    COPIES: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One row x [K]. GATED: silu(W0 x) * (W1 x), with GELU gelu(W0 x) * (W1 x). Else W0 x, W1 x and
    W2 x one after the other."""
    program = tl.program_id(0)
    row, k, rank = tl.arange(0, BN), tl.arange(0, BK), tl.arange(0, max(R, 1))
    STEP: tl.constexpr = 2 * BN if GATED else BN
    A_PROGRAMS: tl.constexpr = (A_ROWS + STEP - 1) // STEP
    P0: tl.constexpr = (N0 + BN - 1) // BN
    P1: tl.constexpr = (N1 + BN - 1) // BN
    # 1. The rows of this program: [first, first + BN) of the matrix at w_ptr.
    segment = 0
    if program < A_PROGRAMS:
        first, end, at = program * STEP, A_ROWS, program * STEP
        w_ptr = a_ptr
        if GATED:  # both halves of the program's rows are rows of A
            u_ptr, end_u = a_ptr + BN * K, A_ROWS - BN
    else:
        tile = program - A_PROGRAMS
        first, end, w_ptr = tile * BN, N0, w0_ptr
        at = first
        if GATED:
            u_ptr, end_u = w1_ptr, N0
        elif N1 > 0:
            if tile >= P0:
                segment, first, end, w_ptr = 1, (tile - P0) * BN, N1, w1_ptr
                at = first + N0
            if N2 > 0:
                if tile >= P0 + P1:
                    segment, first, end, w_ptr = 2, (tile - P0 - P1) * BN, N2, w2_ptr
                    at = first + N0 + N1
    here, rest = row < end - first, first.to(tl.int64) * K
    w_at = rest + row[:, None] * K + k[None, :]
    # 2. What no kernel writes is read before the wait.
    w = tl.load(w_ptr + w_at, mask=here[:, None] & (k < K)[None, :], other=0.0)
    if GATED:
        here_u = row < end_u - first
        u = tl.load(u_ptr + w_at, mask=here_u[:, None] & (k < K)[None, :], other=0.0)
    if R > 0:
        b_at = (at + row)[:, None] * R + rank[None, :]
        in_b = (row < tl.where(program < A_PROGRAMS, 0, end - first))[:, None]
        b = tl.load(b_ptr + b_at, mask=in_b, other=0.0)
        low_at = low_ptr + (program % COPIES) * A_ROWS + segment * R + rank
        if GATED:
            b_u = tl.load(b_ptr + N0 * R + b_at, mask=in_b, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if CLEAR > 0:
        for start in range(program * BC, CLEAR, tl.num_programs(0) * BC):
            c = start + tl.arange(0, BC)
            tl.store(clear_ptr + c, tl.full((BC,), EMPTY, tl.int32), mask=c < CLEAR)
    if RESIDUAL:
        residual = tl.load(residual_ptr + at + row, mask=here, other=0.0).to(tl.float32)
    if R > 0:  # most programs start late and find A x in their first try
        bits = tl.load(low_at, volatile=True)
        if GATED:
            bits_u = tl.load(low_at + R, volatile=True)
    # 3. W x over blocks of K. The next block is read before the current one is multiplied.
    y = tl.zeros((BN, BK), tl.float32)
    if GATED:
        z = tl.zeros((BN, BK), tl.float32)
    if NORM:
        squares = tl.zeros((BK,), tl.float32)
    for start in tl.static_range(0, K, BK):
        x = tl.load(x_ptr + start + k, mask=start + k < K, other=0.0).to(tl.float32)
        if NORM:
            squares += x * x
            x *= tl.load(norm_ptr + start + k, mask=start + k < K, other=0.0).to(tl.float32)
        now = w
        if GATED:
            now_u = u
        if start + BK < K:
            inside = (k < K - start - BK)[None, :]
            w = tl.load(w_ptr + w_at + (start + BK), mask=here[:, None] & inside, other=0.0)
            if GATED:
                u = tl.load(u_ptr + w_at + (start + BK), mask=here_u[:, None] & inside, other=0.0)
        y += now.to(tl.float32) * x[None, :]
        if GATED:
            z += now_u.to(tl.float32) * x[None, :]
    total = tl.sum(y, 1)
    if GATED:
        total_u = tl.sum(z, 1)
    if NORM:
        rstd = 1 / tl.sqrt(tl.sum(squares, 0) / K + eps)
        total *= rstd
        if GATED:
            total_u *= rstd
    # 4. The results: A x, or rows of y.
    if program < A_PROGRAMS:
        copies = low_ptr + tl.arange(0, COPIES)[:, None] * A_ROWS + (at + row)[None, :]
        value = total.to(tl.int32, bitcast=True)[None, :]
        tl.store(copies, tl.broadcast_to(value, (COPIES, BN)), mask=here[None, :])
        if GATED:
            value = total_u.to(tl.int32, bitcast=True)[None, :]
            tl.store(copies + BN, tl.broadcast_to(value, (COPIES, BN)), mask=here_u[None, :])
    else:
        if R > 0:
            # Each warp polls until its own copy is complete if that has up to 32 elements.
            missing = tl.max((bits == EMPTY).to(tl.int32), 0)
            if GATED:
                missing = tl.maximum(missing, tl.max((bits_u == EMPTY).to(tl.int32), 0))
            while missing > 0:
                bits = tl.load(low_at, volatile=True)
                missing = tl.max((bits == EMPTY).to(tl.int32), 0)
                if GATED:
                    bits_u = tl.load(low_at + R, volatile=True)
                    missing = tl.maximum(missing, tl.max((bits_u == EMPTY).to(tl.int32), 0))
            # Otherwise another warp's copy may have ended the loop. tl.max has a barrier then, so
            # a second read is complete.
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


@triton.jit
def matrix_kernel(  # noqa: C901, PLR0912, PLR0915
    x_ptr, norm_ptr, w0_ptr, w1_ptr, w2_ptr, a_ptr, b_ptr, gain_ptr, bias_ptr, residual_ptr,
    out_ptr, low_ptr, clear_ptr, batch, eps, scaling0, scaling1, scaling2,
    K: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, R: tl.constexpr,
    A_ROWS: tl.constexpr, CLEAR: tl.constexpr, EMPTY: tl.constexpr, NORM: tl.constexpr,
    GATED: tl.constexpr, GELU: tl.constexpr, GAIN: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BATCH: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`vector_kernel` for a batch of rows, by tl.dot. The results lie one after the other."""
    program = tl.program_id(0)
    row, k, rank = tl.arange(0, BN), tl.arange(0, BK), tl.arange(0, max(R, 1))
    lane = tl.arange(0, BATCH)[None, :]
    STEP: tl.constexpr = 2 * BN if GATED else BN
    A_PROGRAMS: tl.constexpr = (A_ROWS + STEP - 1) // STEP
    P0: tl.constexpr = (N0 + BN - 1) // BN
    P1: tl.constexpr = (N1 + BN - 1) // BN
    kind = x_ptr.dtype.element_ty
    # 1. The rows of this program: [first, first + BN) of the matrix at w_ptr.
    segment, before, width = 0, 0, N0
    if program < A_PROGRAMS:
        first, end, w_ptr = program * STEP, A_ROWS, a_ptr
        if GATED:
            u_ptr, end_u = a_ptr + BN * K, A_ROWS - BN
    else:
        tile = program - A_PROGRAMS
        first, end, w_ptr = tile * BN, N0, w0_ptr
        if GATED:
            u_ptr, end_u = w1_ptr, N0
        elif N1 > 0:
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
    # 2. W x.
    y = tl.zeros((BN, BATCH), tl.float32)
    if GATED:
        here_u = (row < end_u - first)[:, None]
        z = tl.zeros((BN, BATCH), tl.float32)
    if NORM:
        squares = tl.zeros((BK, BATCH), tl.float32)
    x_at = lane * K + k[:, None]
    for start in tl.range(0, K, BK, num_stages=STAGES):
        inside = k < K - start
        x = tl.load(x_ptr + x_at + start, mask=(lane < batch) & inside[:, None], other=0.0)
        w = tl.load(w_ptr + w_at + start, mask=here & inside[None, :], other=0.0)
        if NORM:
            weight = tl.load(norm_ptr + start + k, mask=inside, other=0.0).to(tl.float32)
            wide = x.to(tl.float32)
            squares += wide * wide
            x = (wide * weight[:, None]).to(kind)
        y = tl.dot(w, x, y, input_precision=PRECISION)
        if GATED:
            u = tl.load(u_ptr + w_at + start, mask=here_u & inside[None, :], other=0.0)
            z = tl.dot(u, x, z, input_precision=PRECISION)
    if NORM:
        rstd = 1 / tl.sqrt(tl.sum(squares, 0) / K + eps)
        y *= rstd[None, :]
        if GATED:
            z *= rstd[None, :]
    # 3. The results: A x, or rows of y.
    low_at = (first + row)[:, None] * BATCH + lane
    if program < A_PROGRAMS:
        tl.store(low_ptr + low_at, y.to(tl.int32, bitcast=True), mask=here)
        if GATED:
            tl.store(low_ptr + low_at + BN * BATCH, z.to(tl.int32, bitcast=True), mask=here_u)
    else:
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
