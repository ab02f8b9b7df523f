"""Triton kernels of `flash_attention`: softmax(q k' / sqrt(hd)) v over each query's span of keys,
and its gradients (Dao 2023, arXiv:2307.08691).

Two kernels make up the backward pass, and no two programs write to the same element. A program of
the first sums dq of one block of queries; a program of the second sums dk and dv of one block of
keys over all query heads that share them. The scores are therefore computed twice. In exchange
there are no atomics, no transposed copies and no later sum over heads, and all runs give the same
bits.
"""

import math

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastlora.ops.dispatch import precision
from fastlora.ops.launch import launch

# ── kernels ───────────────────────────────────────────────────────────────────────────────


# The kernels use no helper functions; swiglu_kernel.py says why. Each kernel walks three stretches
# of blocks: blocks in which spans begin (only with SPANS), blocks that all rows of the tile see,
# and blocks in which spans end. Only the first and the last stretch need a mask. Indices beyond the
# last token are clamped to it; the mask hides such keys, and results of such queries are not
# stored. With PART the queries are a part of the row: they see keys up to `until`, and the query
# `since` is the first that sees a key (part_attention.py). If the tile divides the length (EVEN),
# we skip the clamping, which saves a tenth of the time; 32-bit offsets within a row save another
# tenth (attention-tiles-2026-11-27 in scripts/bench/results.jsonl). 1.4426950408 is log2(e). The
# running maximum starts at -3e38 and not at -inf: a row that sees no key in its first blocks would
# otherwise compute -inf - -inf = NaN. With CAPPED, a score s becomes cap * tanh(s / cap), and
# `scores` holds the tanh. With DESCRIBED, the loops of the backward kernels load by descriptors of
# tiles (`_described`) and not by pointers.
@triton.jit
def _forward_kernel(  # noqa: PLR0915  (no helpers, see above)
    q_ptr, k_ptr, v_ptr, first_ptr, until_ptr, out_ptr, lse_ptr, t, s, heads, scale, cap,
    q_token, k_token, v_token,
    GROUP: tl.constexpr, D: tl.constexpr, SPANS: tl.constexpr, PART: tl.constexpr,
    CAPPED: tl.constexpr,
    EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    top = (tl.num_programs(1) - 1 - tl.program_id(1)) * BM  # blocks that see most keys go first
    row, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    query, d, j = top + tl.arange(0, BM), tl.arange(0, D), tl.arange(0, BN)
    here = tl.minimum(query, t - 1)
    token = (row * t + here)[:, None]
    q = tl.load(q_ptr + token * q_token + (head * D + d)[None, :])
    k_at = k_ptr + row * s * k_token + (head // GROUP) * D
    v_at = v_ptr + row * s * v_token + (head // GROUP) * D
    begin, unmasked, diagonal, end = 0, 0, top // BN * BN, tl.minimum(top + BM, t)
    first, until, bottom = tl.zeros((BM,), tl.int32), query, end - 1
    if PART:
        until = tl.load(until_ptr + row * t + here)
        diagonal = tl.load(until_ptr + row * t + top) // BN * BN
        end = tl.load(until_ptr + row * t + bottom) + 1
    if SPANS:
        first = tl.load(first_ptr + row * t + here)
        begin = tl.load(first_ptr + row * t + top) // BN * BN
        unmasked = tl.cdiv(tl.load(first_ptr + row * t + bottom), BN) * BN
        unmasked = tl.minimum(unmasked, diagonal)
    # Online softmax in base 2: `best` is each query's largest score so far, times log2(e), and
    # `total` the sum of 2**(score - best). A new maximum rescales `total` and `out`.
    best = tl.full((BM,), -3e38, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    out = tl.zeros((BM, D), tl.float32)
    factor = (cap if CAPPED else scale) * 1.4426950408889634
    for stretch in tl.static_range(0 if SPANS else 1, 3):  # pyright: ignore
        low = begin if stretch == 0 else unmasked if stretch == 1 else diagonal
        high = unmasked if stretch == 0 else diagonal if stretch == 1 else end
        for start in tl.range(low, high, BN, num_stages=STAGES):  # pyright: ignore
            key = start + j
            if stretch == 2 and not EVEN:
                key = tl.minimum(key, s - 1)
            k = tl.load(k_at + key[None, :] * k_token + d[:, None])
            scores = tl.dot(q, k, input_precision=PRECISION)
            if CAPPED:  # tanh(scale * score / cap)
                scores = 1 - 2 / (1 + tl.exp2(scores * (2.8853900817779268 * scale / cap)))
            if stretch != 1:
                number = (start + j)[None, :]
                seen = (number <= until[:, None]) & (number >= first[:, None])
                scores = tl.where(seen, scores, -float("inf"))
            better = tl.maximum(best, tl.max(scores, 1) * factor)
            weights = tl.exp2(scores * factor - better[:, None])
            shrink = tl.exp2(best - better)
            total = total * shrink + tl.sum(weights, 1)
            v = tl.load(v_at + key[:, None] * v_token + d[None, :])
            out = out * shrink[:, None]
            out = tl.dot(weights.to(v.dtype), v, out, input_precision=PRECISION)
            best = better
    there = query < t
    lse = best + tl.log2(total)
    tl.store(lse_ptr + (row * heads + head) * t + query, lse, mask=there)
    out = (out / total[:, None]).to(out_ptr.dtype.element_ty)
    at = (row * t + query)[:, None] * (heads * D) + (head * D + d)[None, :]
    tl.store(out_ptr + at, out, mask=there[:, None])


@triton.jit
def _query_gradient_kernel(  # noqa: C901, PLR0912, PLR0915  (no helpers, see above)
    q_ptr, k_ptr, v_ptr, out_ptr, dout_ptr, lse_ptr, first_ptr, until_ptr, cos_ptr, sin_ptr,
    delta_ptr, dq_ptr,
    t, s, heads, scale, cap, q_token, k_token, v_token, out_token, dout_token, dq_token, table_row,
    GROUP: tl.constexpr, D: tl.constexpr, SPANS: tl.constexpr, PART: tl.constexpr,
    CAPPED: tl.constexpr,
    ROPE: tl.constexpr, EVEN: tl.constexpr, DESCRIBED: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    top = (tl.num_programs(1) - 1 - tl.program_id(1)) * BM
    row, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    query, d, j = top + tl.arange(0, BM), tl.arange(0, D), tl.arange(0, BN)
    here = tl.minimum(query, t - 1)
    token, column = (row * t + here)[:, None], (head * D + d)[None, :]
    q = tl.load(q_ptr + token * q_token + column)
    out = tl.load(out_ptr + token * out_token + column)
    dout = tl.load(dout_ptr + token * dout_token + column)
    if not DESCRIBED:
        k_at = k_ptr + row * s * k_token + (head // GROUP) * D
        v_at = v_ptr + row * s * v_token + (head // GROUP) * D
    begin, unmasked, diagonal, end = 0, 0, top // BN * BN, tl.minimum(top + BM, t)
    first, until, bottom = tl.zeros((BM,), tl.int32), query, end - 1
    if PART:
        until = tl.load(until_ptr + row * t + here)
        diagonal = tl.load(until_ptr + row * t + top) // BN * BN
        end = tl.load(until_ptr + row * t + bottom) + 1
    if SPANS:
        first = tl.load(first_ptr + row * t + here)
        begin = tl.load(first_ptr + row * t + top) // BN * BN
        unmasked = tl.cdiv(tl.load(first_ptr + row * t + bottom), BN) * BN
        unmasked = tl.minimum(unmasked, diagonal)
    # The softmax's gradient is weights * (dweights - delta), with delta = sum(weights * dweights).
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    at = (row * heads + head) * t + here
    tl.store(delta_ptr + at, delta, mask=query < t)
    lse = tl.load(lse_ptr + at)
    factor = (cap if CAPPED else scale) * 1.4426950408889634
    dq = tl.zeros((BM, D), tl.float32)
    for stretch in tl.static_range(0 if SPANS else 1, 3):  # pyright: ignore
        low = begin if stretch == 0 else unmasked if stretch == 1 else diagonal
        high = unmasked if stretch == 0 else diagonal if stretch == 1 else end
        for start in tl.range(low, high, BN, num_stages=STAGES):  # pyright: ignore
            key = start + j
            if stretch == 2 and not EVEN:
                key = tl.minimum(key, s - 1)
            if DESCRIBED:
                at_tile = [(row * s + start).to(tl.int32), (head // GROUP) * D]
                k, v = k_ptr.load(at_tile), v_ptr.load(at_tile)
            else:
                k = tl.load(k_at + key[:, None] * k_token + d[None, :])
                v = tl.load(v_at + key[:, None] * v_token + d[None, :])
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            if CAPPED:  # tanh(scale * score / cap)
                scores = 1 - 2 / (1 + tl.exp2(scores * (2.8853900817779268 * scale / cap)))
            dweights = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
            # At most 1: scores of 1e9 round by more than 100, and 2**128 is infinite in float32.
            exponent = tl.minimum(scores * factor - lse[:, None], 0.0, tl.PropagateNan.ALL)
            weights = tl.exp2(exponent)  # pyright: ignore
            if stretch != 1:
                number = (start + j)[None, :]
                seen = (number <= until[:, None]) & (number >= first[:, None])
                weights = tl.where(seen, weights, 0.0)
            dscores = weights * (dweights - delta[:, None])  # pyright: ignore
            if CAPPED:
                dscores *= 1 - scores * scores
            dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision=PRECISION)
    dq *= scale  # dscores is the gradient of scale * q k'
    there = (query < t)[:, None]
    kind = dq_ptr.dtype.element_ty
    dq_at = dq_ptr + (row * t + query)[:, None] * dq_token + head * D
    if ROPE:
        one, two = tl.split(tl.permute(tl.reshape(dq, (BM, 2, D // 2)), (0, 2, 1)))
        half = tl.arange(0, D // 2)[None, :]
        table = row * table_row + here.to(tl.int64)[:, None] * D + half
        cos_1, cos_2 = tl.load(cos_ptr + table), tl.load(cos_ptr + table + D // 2)
        sin_1, sin_2 = tl.load(sin_ptr + table), tl.load(sin_ptr + table + D // 2)
        tl.store(dq_at + half, (one * cos_1 + two * sin_2).to(kind), mask=there)
        tl.store(dq_at + D // 2 + half, (two * cos_2 - one * sin_1).to(kind), mask=there)
    else:
        tl.store(dq_at + d[None, :], dq.to(kind), mask=there)


@triton.jit
def _key_value_gradient_kernel(  # noqa: C901, PLR0912, PLR0915  (no helpers, see above)
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, last_ptr, since_ptr, cos_ptr, sin_ptr,
    dk_ptr, dv_ptr,
    t, s, heads, scale, cap, q_token, k_token, v_token, dout_token, dkv_token, table_row,
    GROUP: tl.constexpr, D: tl.constexpr, SPANS: tl.constexpr, PART: tl.constexpr,
    CAPPED: tl.constexpr,
    ROPE: tl.constexpr, EVEN: tl.constexpr, DESCRIBED: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # All GROUP query heads of a key head add to the same dk and dv, in this program alone.
    kv_heads = heads // GROUP
    top = tl.program_id(1) * BN
    row, kv_head = (tl.program_id(0) // kv_heads).to(tl.int64), tl.program_id(0) % kv_heads
    key, d, i = top + tl.arange(0, BN), tl.arange(0, D), tl.arange(0, BM)
    here = tl.minimum(key, s - 1)
    token, column = (row * s + here)[:, None], (kv_head * D + d)[None, :]
    k, v = tl.load(k_ptr + token * k_token + column), tl.load(v_ptr + token * v_token + column)
    # The stretches of queries are [diagonal, unmasked), [unmasked, rest) and [rest, end).
    diagonal, unmasked = top // BM * BM, tl.cdiv(top + BN, BM) * BM
    since, last, bottom = key, tl.full((BN,), t - 1, tl.int32), tl.minimum(top + BN, s) - 1
    rest, end = t // BM * BM, t
    if PART:
        since = tl.load(since_ptr + row * s + here)
        diagonal = tl.load(since_ptr + row * s + top) // BM * BM
        unmasked = tl.cdiv(tl.load(since_ptr + row * s + bottom), BM) * BM
    if SPANS:
        last = tl.load(last_ptr + row * s + here)
        rest = (tl.load(last_ptr + row * s + top) + 1) // BM * BM
        end = tl.load(last_ptr + row * s + bottom) + 1
    rest = tl.maximum(rest, unmasked)
    factor = (cap if CAPPED else scale) * 1.4426950408889634
    dk = tl.zeros((BN, D), tl.float32)
    dv = tl.zeros((BN, D), tl.float32)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        if not DESCRIBED:
            q_at = q_ptr + row * t * q_token + head * D
            dout_at = dout_ptr + row * t * dout_token + head * D
        at = (row * heads + head) * t
        for stretch in tl.static_range(0, 2 if EVEN and not SPANS else 3):  # pyright: ignore
            low = diagonal if stretch == 0 else unmasked if stretch == 1 else rest
            high = tl.minimum(unmasked, end) if stretch == 0 else rest if stretch == 1 else end
            for start in tl.range(low, high, BM, num_stages=STAGES):  # pyright: ignore
                query = start + i
                if stretch != 1 and not EVEN:
                    query = tl.minimum(query, t - 1)
                query_t = query[:, None]
                if DESCRIBED:
                    at_tile = [(row * t + start).to(tl.int32), head * D]
                    q, dout = q_ptr.load(at_tile), dout_ptr.load(at_tile)
                else:
                    q = tl.load(q_at + query_t * q_token + d[None, :])
                    dout = tl.load(dout_at + query_t * dout_token + d[None, :])
                lse = tl.load(lse_ptr + at + query)
                delta = tl.load(delta_ptr + at + query)
                scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
                if CAPPED:  # tanh(scale * score / cap)
                    scores = 1 - 2 / (1 + tl.exp2(scores * (2.8853900817779268 * scale / cap)))
                dweights = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
                exponent = tl.minimum(scores * factor - lse[None, :], 0.0, tl.PropagateNan.ALL)
                weights = tl.exp2(exponent)
                if stretch != 1:
                    number = (start + i)[None, :]
                    seen = (number >= since[:, None]) & (number <= last[:, None])
                    weights = tl.where(seen, weights, 0.0)
                dv = tl.dot(weights.to(dout.dtype), dout, dv, input_precision=PRECISION)
                dscores = weights * (dweights - delta[None, :])
                if CAPPED:
                    dscores *= 1 - scores * scores
                dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision=PRECISION)
    dk *= scale  # dscores is the gradient of scale * q k'
    there = (key < s)[:, None]
    kind = dk_ptr.dtype.element_ty
    number = (row * s + key)[:, None]
    tl.store(dv_ptr + number * dkv_token + kv_head * D + d[None, :], dv.to(kind), mask=there)
    dk_at = dk_ptr + number * dkv_token + kv_head * D
    if ROPE:
        one, two = tl.split(tl.permute(tl.reshape(dk, (BN, 2, D // 2)), (0, 2, 1)))
        half = tl.arange(0, D // 2)[None, :]
        table = row * table_row + here.to(tl.int64)[:, None] * D + half
        cos_1, cos_2 = tl.load(cos_ptr + table), tl.load(cos_ptr + table + D // 2)
        sin_1, sin_2 = tl.load(sin_ptr + table), tl.load(sin_ptr + table + D // 2)
        tl.store(dk_at + half, (one * cos_1 + two * sin_2).to(kind), mask=there)
        tl.store(dk_at + D // 2 + half, (two * cos_2 - one * sin_1).to(kind), mask=there)
    else:
        tl.store(dk_at + d[None, :], dk.to(kind), mask=there)


# ── launchers ─────────────────────────────────────────────────────────────────────────────
# head_dim -> (queries, keys, warps, pipeline stages, register limit per thread) of each kernel's
# tile: the fastest on an H100, and for 256 on an H200, where another tile of dq takes 1 % less
# (attention-tiles-256-2026-11-30). On cards with less than 160 KB of shared memory per block,
# `_SMALL_CARD_TILES` replaces tiles: the fastest that fit in 99 KB; those of 256 are not measured.
_TILES = {
    64: {
        "forward": (64, 64, 4, 3, 128),
        "queries": (64, 64, 4, 3, None),
        "keys": (32, 128, 4, 3, None),
    },
    128: {
        "forward": (64, 64, 4, 3, None),
        "queries": (128, 32, 8, 3, 128),
        "keys": (32, 64, 4, 3, None),
    },
    256: {
        "forward": (128, 64, 8, 2, None),
        "queries": (128, 32, 8, 2, None),
        "keys": (32, 64, 8, 3, None),
    },
}

_SMALL_CARD_TILES = {
    64: {},
    128: {"forward": (64, 64, 4, 2, None), "queries": (64, 32, 4, 2, None)},
    256: {
        "forward": (32, 32, 4, 2, None),
        "queries": (32, 32, 4, 1, None),
        "keys": (32, 32, 4, 1, None),
    },
}


def tile(
    which: str, head_dim: int, t: int, shared: int, s: int | None = None
) -> tuple[int, int, dict]:
    """(queries per tile, keys per tile, compile-time arguments) of a kernel.

    Args:
        which: the kernel: "forward", "queries" (dq) or "keys" (dk and dv).
        head_dim: head size.
        t: row length, or the number of queries.
        shared: bytes of shared memory per block on the card.
        s: the number of keys; None: t.
    """
    wide = next(size for size in _TILES if size >= head_dim)
    chosen = _TILES[wide] | (_SMALL_CARD_TILES[wide] if shared < 160 * 1024 else {})
    bm, bn, warps, stages, registers = chosen[which]
    even = all(n % size == 0 for n in (t, s or t) for size in (bm, bn))
    how = dict(BM=bm, BN=bn, EVEN=even, STAGES=stages, num_warps=warps)
    return bm, bn, how if registers is None else how | dict(maxnreg=registers)


def _tile(which: str, q: Float[Tensor, "b h t hd"], s: int) -> tuple[int, int, dict]:
    shared = 0
    if q.is_cuda:
        shared = torch.cuda.get_device_properties(q.device).shared_memory_per_block_optin
    return tile(which, q.shape[3], q.shape[2], shared, s)


def _by_token(x: Float[Tensor, "b h t hd"]) -> Float[Tensor, "b h t hd"]:
    """x as a transposed view of [b, t, h, hd] whose heads of a token are adjacent; copies x if its
    layout differs."""
    t, hd = x.shape[2:]
    laid = x.stride(3) == 1 and x.stride(1) == hd and x.stride(0) == t * x.stride(2)
    return x if laid else x.transpose(1, 2).contiguous().transpose(1, 2)


def _takes_descriptors(loaded: tuple[Tensor, Tensor], how: dict) -> bool:
    """Whether the loop of a backward kernel loads these tensors by descriptors.

    Hopper's copy engine then computes the addresses, which saves registers: for heads of 128 dq
    takes 407 us in place of 418, and dk and dv 527 in place of 559 (4 x 2048 tokens; H200,
    attention-descriptors-2026-11-30 in scripts/bench/results.jsonl). A descriptor's tile must lie
    within a row, and an empty tensor has no descriptor.
    """
    x = loaded[0]
    if not (x.is_cuda and x.shape[3] == 128 and how["EVEN"] and x.element_size() == 2):
        return False
    if any(y.numel() == 0 for y in loaded):
        return False
    # Not data_ptr, which FakeTensors lack (ops/launch.py); torch aligns the memory itself.
    aligned = all(y.storage_offset() % 8 == 0 and y.stride(2) % 8 == 0 for y in loaded)
    return aligned and torch.cuda.get_device_capability(x.device)[0] == 9


def _described(
    loaded: tuple[Float[Tensor, "b h t hd"], Float[Tensor, "b h t hd"]], tokens: int
) -> tuple[TensorDescriptor, TensorDescriptor]:
    """Descriptors of tiles of one head's values for so many tokens; both are `_by_token`."""
    one, two = (
        TensorDescriptor(x, [b * t, h * hd], [x.stride(2), 1], [tokens, hd])
        for x in loaded
        for b, h, t, hd in [x.shape]
    )
    return one, two


def _by_cudnn(
    q: Float[Tensor, "b h t hd"],
    k: Float[Tensor, "b kv t hd"],
    v: Float[Tensor, "b kv t hd"],
    scale: float | None,
) -> tuple[Float[Tensor, "b h t hd"], Float[Tensor, "b h t"]] | None:
    """The result of `flash_forward` from cuDNN's kernel, or None if cuDNN does not support it."""
    shared = q.shape[1] != k.shape[1]
    params = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, True, shared)
    if not torch.backends.cuda.can_use_cudnn_attention(params):
        return None
    op = torch.ops.aten._scaled_dot_product_cudnn_attention
    out, lse, *_ = op(q, k, v, None, True, 0.0, True, scale=scale)
    return _by_token(out), lse.view(q.shape[:3]) * 1.4426950408889634


def _scale_and_cap(head_dim: int, scale: float | None, cap: float | None) -> tuple[float, float]:
    """The numbers that the kernels get; they do not read the second if there is no cap."""
    return 1 / math.sqrt(head_dim) if scale is None else scale, 1.0 if cap is None else cap


def flash_forward(
    q: Float[Tensor, "b h t hd"],
    k: Float[Tensor, "b kv s hd"],
    v: Float[Tensor, "b kv s hd"],
    first: Int[Tensor, "b t"] | None,
    scale: float | None = None,
    cap: float | None = None,
    until: Int[Tensor, "b t"] | None = None,
) -> tuple[Float[Tensor, "b h t hd"], Float[Tensor, "b h t"]]:
    """(attention, lse): the result in q.dtype, and the log2 of each query's sum of exponentials.

    The result is a view of [b, t, h, hd]; lse is float32. `first` (int32) holds the first key that
    each query sees; None means all keys up to its own position. `scale` and `cap` are those of
    `flash_attention`. `until` (int32) holds the last key; None: the query's own position, and s is
    t. `until` needs `first`.
    """
    (b, h, t, hd), (kv, s) = q.shape, k.shape[1:3]
    q, k, v = _by_token(q), _by_token(k), _by_token(v)
    # cuDNN takes 258 us and our kernel 321 us for the shapes of 8B (4 x 2048 tokens); for the
    # shapes of 1B, 190 and 174 us (H100, attention-lengths-2026-11-27 in
    # scripts/bench/results.jsonl).
    cudnn = hd == 128 and first is None and cap is None and q.is_cuda
    if cudnn and (result := _by_cudnn(q, k, v, scale)) is not None:
        return result
    out, lse = q.new_empty(b, t, h, hd), q.new_empty(b, h, t, dtype=torch.float32)
    bm, _, how = _tile("forward", q, s)
    launch(
        _forward_kernel, (b * h, triton.cdiv(t, bm)),
        q, k, v, q if first is None else first, q if until is None else until, out, lse, t, s, h,
        *_scale_and_cap(hd, scale, cap), q.stride(2), k.stride(2), v.stride(2),
        GROUP=h // kv, D=hd, SPANS=first is not None, PART=until is not None,  # pyright: ignore
        CAPPED=cap is not None,  # pyright: ignore
        PRECISION=precision(q.dtype), **how,  # pyright: ignore
    )  # fmt: skip
    return out.transpose(1, 2), lse


def flash_backward(
    dout: Float[Tensor, "b h t hd"],
    q: Float[Tensor, "b h t hd"],
    k: Float[Tensor, "b kv t hd"],
    v: Float[Tensor, "b kv t hd"],
    out: Float[Tensor, "b h t hd"],
    lse: Float[Tensor, "b h t"],
    first: Int[Tensor, "b t"] | None,
    last: Int[Tensor, "b t"] | None,
    cos: Float[Tensor, "#b t hd"] | None,
    sin: Float[Tensor, "#b t hd"] | None,
    scale: float | None = None,
    cap: float | None = None,
) -> Float[Tensor, "b t w"]:
    """The gradients of all heads of q, then of k, then of v, side by side, in q.dtype.

    If cos and sin are given, q and k are already rotated, and the result holds the gradients of the
    unrotated q and k. `last` (int32) holds the last query that sees each key; it is required if
    `first` is given. `scale` and `cap` are those of the forward pass.
    """
    (b, h, t, hd), kv = q.shape, k.shape[1]
    grads = q.new_empty(b, t, (h + 2 * kv) * hd)
    parts = grads.split([h * hd, kv * hd, kv * hd], 2)
    spans = None if first is None else (first, last)
    _write_gradients(parts, dout, (q, k, v, out), lse, spans, None, (cos, sin), (scale, cap))
    return grads


def part_backward(
    dout: Float[Tensor, "b h t hd"],
    q: Float[Tensor, "b h t hd"],
    k: Float[Tensor, "b kv s hd"],
    v: Float[Tensor, "b kv s hd"],
    out: Float[Tensor, "b h t hd"],
    lse: Float[Tensor, "b h t"],
    first: Int[Tensor, "b t"],
    until: Int[Tensor, "b t"],
    since: Int[Tensor, "b s"],
    last: Int[Tensor, "b s"],
    scale: float | None = None,
    cap: float | None = None,
) -> tuple[Float[Tensor, "b t w"], Float[Tensor, "b s u"]]:
    """(gradients of all heads of q, those of k and then of v side by side), in q.dtype.

    All spans are int32: the first and the last key of each query, the first and the last query of
    each key. `scale` and `cap` are those of the forward pass.
    """
    (b, h, t, hd), (kv, s) = q.shape, k.shape[1:3]
    dq, dkv = q.new_empty(b, t, h * hd), q.new_empty(b, s, 2 * kv * hd)
    parts = (dq, *dkv.split(kv * hd, 2))
    spans, part = (first, last), (until, since)
    _write_gradients(parts, dout, (q, k, v, out), lse, spans, part, (None, None), (scale, cap))
    return dq, dkv


def _write_gradients(
    grads: tuple[Tensor, ...],
    dout: Tensor,
    kept: tuple[Tensor, ...],
    lse: Tensor,
    spans: tuple[Tensor | None, Tensor | None] | None,
    part: tuple[Tensor, Tensor] | None,
    rope: tuple[Tensor | None, Tensor | None],
    scale_and_cap: tuple[float | None, float | None],
) -> None:
    """Write dq [b, t, h hd], and dk and dv [b, s, kv hd], which have one stride of tokens."""
    q, k, v, out, dout = (_by_token(x) for x in (*kept, dout))
    (b, h, t, hd), (kv, s), (dq, dk, dv), (cos, sin) = q.shape, k.shape[1:3], grads, rope
    cap = scale_and_cap[1]
    delta = torch.empty_like(lse)
    # The kernel does not read pointers of features that are off, so q stands in for them.
    tables = (q if cos is None else cos.contiguous(), q if sin is None else sin.contiguous())
    table_row = t * hd if cos is not None and cos.shape[0] > 1 else 0
    (first, last), (until, since) = spans or (q, q), part or (q, q)
    static = dict(GROUP=h // kv, D=hd, SPANS=spans is not None, PART=part is not None)
    static |= dict(CAPPED=cap is not None, ROPE=cos is not None, PRECISION=precision(q.dtype))
    sizes = (t, s, h, *_scale_and_cap(hd, *scale_and_cap), q.stride(2), k.stride(2), v.stride(2))
    bm, bn, how = _tile("queries", q, s)
    how |= dict(DESCRIBED=_takes_descriptors((k, v), how))
    k_loaded, v_loaded = _described((k, v), bn) if how["DESCRIBED"] else (k, v)
    launch(
        _query_gradient_kernel, (b * h, triton.cdiv(t, bm)),
        q, k_loaded, v_loaded, out, dout, lse, first, until, *tables, delta, dq,
        *sizes, out.stride(2), dout.stride(2), dq.stride(1), table_row,
        **static, **how,
    )  # fmt: skip
    bm, bn, how = _tile("keys", q, s)
    how |= dict(DESCRIBED=_takes_descriptors((q, dout), how))
    q_loaded, dout_loaded = _described((q, dout), bm) if how["DESCRIBED"] else (q, dout)
    launch(
        _key_value_gradient_kernel, (b * kv, triton.cdiv(s, bn)),
        q_loaded, k, v, dout_loaded, lse, delta, last, since, *tables, dk, dv,
        *sizes, dout.stride(2), dk.stride(1), table_row,
        **static, **how,
    )  # fmt: skip
