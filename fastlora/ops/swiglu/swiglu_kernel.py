"""Triton kernels of `lora_swiglu`: the low-rank terms of gate and up, and SwiGLU, in one pass.

In plain torch the low-rank term s xA B' is a tensor of the MLP's width, written and read once each
for gate and up. Here it is a dot product over the rank inside the tile. The backward kernel
recomputes h, so h need not be kept. While a tile is in registers it also sums the gradients of A, B
and DoRA's gains over the tile's rows. Each program writes the partial sums of one chunk of rows;
the launcher adds the chunks in a fixed order, so all runs give the same bits.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from fastlora.ops.dispatch import precision, rank_tile
from fastlora.ops.launch import launch

# ── kernels ───────────────────────────────────────────────────────────────────────────────


# The kernels use no helper functions: the tests' type-checking hook wraps every function, and
# Triton's interpreter then looks up the helpers' names in the hook's module.
@triton.jit
def _swiglu_kernel(
    g_ptr, u_ptr, gate_x_a_ptr, up_x_a_ptr, b_g_ptr, b_u_ptr, gains_ptr, h_ptr,
    n, f, r_g, r_u, stride_gate_x_a, stride_up_x_a, scaling_g, scaling_u,
    HAS_GAINS: tl.constexpr, GELU: tl.constexpr, R: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(1) * BM + tl.arange(0, BM))[:, None]
    column = (tl.program_id(0) * BN + tl.arange(0, BN))[None, :]
    far, wide = row.to(tl.int64), column.to(tl.int64)  # n * f may exceed 2**31
    k, k_t = tl.arange(0, R)[None, :], tl.arange(0, R)[:, None]
    here, at = (row < n) & (column < f), far * f + column
    # Tiles [R, BN] and [BM, R], filled with zeros beyond the rank.
    b_g = tl.load(b_g_ptr + wide * r_g + k_t, mask=(column < f) & (k_t < r_g), other=0.0)
    b_u = tl.load(b_u_ptr + wide * r_u + k_t, mask=(column < f) & (k_t < r_u), other=0.0)
    gate_x_a = tl.load(
        gate_x_a_ptr + far * stride_gate_x_a + k, mask=(row < n) & (k < r_g), other=0.0
    )
    up_x_a = tl.load(up_x_a_ptr + far * stride_up_x_a + k, mask=(row < n) & (k < r_u), other=0.0)
    g = tl.load(g_ptr + at, mask=here, other=0.0).to(tl.float32)
    g += scaling_g * tl.dot(gate_x_a, b_g, input_precision=PRECISION)
    u = tl.load(u_ptr + at, mask=here, other=0.0).to(tl.float32)
    u += scaling_u * tl.dot(up_x_a, b_u, input_precision=PRECISION)
    if HAS_GAINS:
        g *= tl.load(gains_ptr + column, mask=column < f, other=0.0)
        u *= tl.load(gains_ptr + f + column, mask=column < f, other=0.0)
    # h = g sigmoid(z) u: SiLU, or GELU's tanh form with z = 2 sqrt(2 / pi) (g + 0.044715 g**3)
    z = g
    if GELU:
        z = 1.5957691216057308 * (g + 0.044715 * g * g * g)
    h = g * tl.sigmoid(z) * u
    tl.store(h_ptr + at, h.to(h_ptr.dtype.element_ty), mask=here)


@triton.jit
def _swiglu_backward_kernel(  # noqa: C901, PLR0912, PLR0915  (no helpers, see above)
    dh_ptr, dh_a_ptr, a_ptr, g_ptr, u_ptr, gate_x_a_ptr, up_x_a_ptr, b_g_ptr, b_u_ptr, gains_ptr,
    du_ptr, sums_ptr, dgains_ptr,
    n, f, r_g, r_u, r_a, stride_dh_a, stride_gate_x_a, stride_up_x_a, scaling_g, scaling_u, chunk,
    HAS_A: tl.constexpr, HAS_GAINS: tl.constexpr, GELU: tl.constexpr, R: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0) * BN + tl.arange(0, BN)
    column, k, k_t = number[None, :], tl.arange(0, R)[None, :], tl.arange(0, R)[:, None]
    wide, first = column.to(tl.int64), tl.program_id(1) * chunk
    kind = dh_ptr.dtype.element_ty
    b_g = tl.load(b_g_ptr + wide * r_g + k_t, mask=(column < f) & (k_t < r_g), other=0.0)
    b_u = tl.load(b_u_ptr + wide * r_u + k_t, mask=(column < f) & (k_t < r_u), other=0.0)
    if HAS_A:
        a = tl.load(a_ptr + k_t * f + wide, mask=(column < f) & (k_t < r_a), other=0.0)
    if HAS_GAINS:
        gain_g = tl.load(gains_ptr + column, mask=column < f, other=0.0)
        gain_u = tl.load(gains_ptr + f + column, mask=column < f, other=0.0)
    dgain_g = tl.zeros((BN,), tl.float32)
    dgain_u = tl.zeros((BN,), tl.float32)
    db_g = tl.zeros((BN, R), tl.float32)
    db_u = tl.zeros((BN, R), tl.float32)
    da = tl.zeros((BN, R), tl.float32)
    for start in tl.range(0, chunk, BM, num_stages=STAGES):  # pyright: ignore
        row = (first + start + tl.arange(0, BM))[:, None]
        far = row.to(tl.int64)
        here, at = (row < n) & (column < f), far * f + column
        gate_x_a = tl.load(
            gate_x_a_ptr + far * stride_gate_x_a + k, mask=(row < n) & (k < r_g), other=0.0
        )
        up_x_a = tl.load(
            up_x_a_ptr + far * stride_up_x_a + k, mask=(row < n) & (k < r_u), other=0.0
        )
        dh = tl.load(dh_ptr + at, mask=here, other=0.0).to(tl.float32)
        if HAS_A:
            dh_a = tl.load(dh_a_ptr + far * stride_dh_a + k, mask=(row < n) & (k < r_a), other=0.0)
            dh += tl.dot(dh_a, a, input_precision=PRECISION)
        g = tl.load(g_ptr + at, mask=here, other=0.0).to(tl.float32)
        g += scaling_g * tl.dot(gate_x_a, b_g, input_precision=PRECISION)
        u = tl.load(u_ptr + at, mask=here, other=0.0).to(tl.float32)
        u += scaling_u * tl.dot(up_x_a, b_u, input_precision=PRECISION)
        if HAS_GAINS:  # the gains' gradients below need the sums without the gains
            sum_g, sum_u = g, u
            g, u = g * gain_g, u * gain_u
        if GELU:
            sigmoid = tl.sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))
            slope = 1.5957691216057308 * (1 + 0.134145 * g * g)  # dz / dg
            dg = dh * u * sigmoid * (1 + g * (1 - sigmoid) * slope)
        else:
            sigmoid = tl.sigmoid(g)
            dg = dh * u * sigmoid * (1 + g * (1 - sigmoid))
        du = dh * g * sigmoid
        if HAS_GAINS:
            dgain_g += tl.sum(dg * sum_g, 0)
            dgain_u += tl.sum(du * sum_u, 0)
            dg, du = dg * gain_g, du * gain_u
        dg, du = dg.to(kind), du.to(kind)
        tl.store(dh_ptr + at, dg, mask=here)  # no other program reads these elements of dh
        tl.store(du_ptr + at, du, mask=here)
        db_g += tl.dot(tl.trans(dg), gate_x_a, input_precision=PRECISION)
        db_u += tl.dot(tl.trans(du), up_x_a, input_precision=PRECISION)
        if HAS_A:
            h = (g * sigmoid * u).to(kind)
            da += tl.dot(tl.trans(h), dh_a, input_precision=PRECISION)
    size = f.to(tl.int64) * R
    sums = tl.program_id(1) * 3 * size + number[:, None].to(tl.int64) * R + k
    inside = number[:, None] < f
    tl.store(sums_ptr + sums, db_g * scaling_g, mask=inside)
    tl.store(sums_ptr + sums + size, db_u * scaling_u, mask=inside)
    tl.store(sums_ptr + sums + 2 * size, da, mask=inside)
    if HAS_GAINS:
        at = tl.program_id(1) * 2 * f + number
        tl.store(dgains_ptr + at, dgain_g, mask=number < f)
        tl.store(dgains_ptr + at + f, dgain_u, mask=number < f)


@triton.jit
def _swiglu_sums_kernel(
    sums_ptr, db_g_ptr, db_u_ptr, da_ptr, f, r_g, r_u, r_a,
    HAS_A: tl.constexpr, CHUNKS: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    # The sum over the chunks in a fixed order; da is written transposed.
    row, k = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None], tl.arange(0, R)[None, :]
    size, at, which = f.to(tl.int64) * R, row * R + k, tl.program_id(1)
    kind = db_g_ptr.dtype.element_ty
    total = tl.zeros((ROWS, R), tl.float32)
    for chunk in tl.static_range(CHUNKS):  # pyright: ignore
        total += tl.load(sums_ptr + (3 * chunk + which) * size + at, mask=row < f, other=0.0)
    if which == 0:
        tl.store(db_g_ptr + row * r_g + k, total.to(kind), mask=(row < f) & (k < r_g))
    elif which == 1:
        tl.store(db_u_ptr + row * r_u + k, total.to(kind), mask=(row < f) & (k < r_u))
    elif HAS_A:
        tl.store(da_ptr + k * f + row, total.to(kind), mask=(row < f) & (k < r_a))


# ── launchers ─────────────────────────────────────────────────────────────────────────────
# Tiles measured with 8192 rows and r = 16. Forward, (BM, BN, warps), f = 8192 on an H200: 130 µs;
# (64, 64, 4) takes 154, (64, 128, 8) 142, (128, 64, 8) 230 (h200-swiglu-2026-11-30). Backward,
# (BM, BN, warps, pipeline stages): 256 µs in a step of 1B on an H100; 331 µs without STAGES, which
# makes Triton prefetch only the operands of tl.dot; Inductor's kernel and the products take about
# 472 µs. (32, 128, 4, 3) takes 242 µs, but spills 6 KB of registers per thread on sm_80 and needs
# 150 KB of shared memory in float32 (swiglu-kernel-2026-11-26 and swiglu-stages-2026-11-27 in
# scripts/bench/results.jsonl). With DoRA's gains, and in float32, STAGES is not measured, so Triton
# chooses.
_FORWARD, _BACKWARD = (32, 128, 4), (32, 64, 4, 3)

_CHUNKS = 8


def swiglu(
    g: Float[Tensor, "n f"],
    u: Float[Tensor, "n f"],
    gate_x_a: Float[Tensor, "n r_g"],
    up_x_a: Float[Tensor, "n r_u"],
    b_g: Float[Tensor, "f r_g"],
    b_u: Float[Tensor, "f r_u"],
    gains: Float[Tensor, "2 f"] | None,
    scaling_g: float,
    scaling_u: float,
    gelu: bool = False,
) -> Float[Tensor, "n f"]:
    """silu(g + s_g xA_g B_g') * (u + s_u xA_u B_u') in g.dtype, computed in float32.

    If `gains` (float32) is given, each of the two sums is multiplied with its gain. With `gelu` the
    tanh form of GELU takes SiLU's place.
    """
    (n, f), (bm, bn, warps) = g.shape, _FORWARD
    h, r_g, r_u = torch.empty_like(g), gate_x_a.shape[1], up_x_a.shape[1]
    launch(
        _swiglu_kernel, (triton.cdiv(f, bn), triton.cdiv(n, bm)),
        g, u, gate_x_a, up_x_a, b_g.contiguous(), b_u.contiguous(),
        g if gains is None else gains, h,
        n, f, r_g, r_u, gate_x_a.stride(0), up_x_a.stride(0), scaling_g, scaling_u,
        HAS_GAINS=gains is not None, GELU=gelu, R=rank_tile(r_g, r_u), BM=bm, BN=bn,  # pyright: ignore
        PRECISION=precision(g.dtype), num_warps=warps,  # pyright: ignore
    )  # fmt: skip
    return h


def swiglu_backward_(
    dh: Float[Tensor, "n f"],
    dh_a: Float[Tensor, "n r_a"] | None,
    a: Float[Tensor, "r_a f"] | None,
    g: Float[Tensor, "n f"],
    u: Float[Tensor, "n f"],
    gate_x_a: Float[Tensor, "n r_g"],
    up_x_a: Float[Tensor, "n r_u"],
    b_g: Float[Tensor, "f r_g"],
    b_u: Float[Tensor, "f r_u"],
    gains: Float[Tensor, "2 f"] | None,
    scaling_g: float,
    scaling_u: float,
    gelu: bool = False,
) -> tuple[
    Float[Tensor, "n f"],
    Float[Tensor, "f r_g"],
    Float[Tensor, "f r_u"],
    Float[Tensor, "r_a f"],
    Float[Tensor, "2 f"],
]:
    """(du, dB_g, dB_u, dA, dgains); overwrites dh, which must be contiguous, with dg.

    The gradient of h is dh + dh_a A. All have the dtype of g but dgains, which is float32. dA has
    no rows without `a`; dgains are zeros without gains. Sums are in float32.
    """
    (n, f), (bm, bn, warps, stages) = g.shape, _BACKWARD
    if gains is not None or g.dtype == torch.float32:
        stages = None
    r_g, r_u, r_a = gate_x_a.shape[1], up_x_a.shape[1], 0 if a is None else a.shape[0]
    r = rank_tile(r_g, r_u, r_a)
    chunk = triton.cdiv(triton.cdiv(n, _CHUNKS), bm) * bm
    chunks = triton.cdiv(n, chunk)
    assert dh.is_contiguous(), dh.stride()
    du = torch.empty_like(u)
    sums = torch.empty((chunks, 3, f, r), dtype=torch.float32, device=g.device)
    given = gains is not None
    dgains = torch.empty((chunks if given else 0, 2, f), dtype=torch.float32, device=g.device)
    if dh_a is not None and dh_a.stride(1) != 1:
        dh_a = dh_a.contiguous()
    launch(
        _swiglu_backward_kernel, (triton.cdiv(f, bn), chunks),
        dh, g if dh_a is None else dh_a, g if a is None else a.contiguous(),
        g, u, gate_x_a, up_x_a, b_g.contiguous(), b_u.contiguous(), gains if given else g,
        du, sums, dgains,
        n, f, r_g, r_u, r_a, 0 if dh_a is None else dh_a.stride(0),
        gate_x_a.stride(0), up_x_a.stride(0), scaling_g, scaling_u, chunk,
        HAS_A=a is not None, HAS_GAINS=given, GELU=gelu, R=r, BM=bm, BN=bn, STAGES=stages,  # pyright: ignore
        PRECISION=precision(g.dtype), num_warps=warps,  # pyright: ignore
    )  # fmt: skip
    db_g, db_u = g.new_empty(f, r_g), g.new_empty(f, r_u)
    da, rows = g.new_empty(r_a, f), 64
    launch(
        _swiglu_sums_kernel, (triton.cdiv(f, rows), 3 if r_a else 2),
        sums, db_g, db_u, da, f, r_g, r_u, r_a,
        HAS_A=r_a > 0, CHUNKS=chunks, R=r, ROWS=rows, num_warps=2,  # pyright: ignore
    )  # fmt: skip
    return du, db_g, db_u, da, dgains.sum(0)
