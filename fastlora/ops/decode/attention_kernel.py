"""Triton kernels of `decode_attention`: the keys of each row are split among several programs, and
a second kernel joins their results (flash-decoding, Dao et al. 2023).

The grid depends on the cache's size only. Each program finds its part of the keys from the row's
length on the device, in whole blocks, and returns at once if its part is empty.

We measured two other designs on an H200 (torch 2.11, triton 3.6; 1B's and 8B's heads, batch 1). If
the last program to finish joins the results (it learns that from an atomic counter), 128 keys take
0.8 us less, but 2,048 keys take 0.4 us more: the fence, the counter and reductions across warps
cost more than a second launch. If each warp attends to keys of its own, the loop needs no barrier,
but the sum over warps at the end costs 1.4 us.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from fastlora.ops.dispatch import precision
from fastlora.ops.launch import launch

# ── kernels ───────────────────────────────────────────────────────────────────────────────


# One program reads one part of a row's keys, each key once for all GROUP queries that share it.
# tl.dot needs at least 16 rows, so the queries are padded to M. The program of part 0 also writes
# the new key and value. It attends to them from registers; no program reads their index from the
# cache. We load the new q, k and v before the early return, so that they wait for memory together
# with the row's length. Key indices times HD fit in 32 bits (S * HD < 2**31); offsets of slots and
# heads are 64-bit.
#
# The running maximum is subtracted before the scores are multiplied with `factor`: the largest
# weight is then exactly 1. Multiplied first, a fused multiply-add rounds the product and the
# maximum differently, and scores of 1e9 gave NaN. The maximum starts at -3e38 and not at -inf,
# because -inf - -inf is NaN.
#
# PDL (programmatic dependent launch, compute capability 9.0 and later): a kernel starts while the
# one before it ends, and gdc_wait() waits until the results of that one are visible. Every program
# calls it before it reads or returns, so a later kernel may rely on all earlier ones. It saves
# 0.4 us per kernel (H200). gdc_launch_dependents() lets _join_kernel start early. Without a
# _join_kernel we do not call it: the next kernel would then take registers and shared memory from
# this one (8B, 32 x 2,048 tokens: 74 us instead of 68).
@triton.jit(do_not_specialize=["window"])
def _part_kernel(  # noqa: C901, PLR0912, PLR0915  (no helpers, as in swiglu_kernel.py)
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, k_cache_ptr, v_cache_ptr, lengths_ptr, parts_ptr,
    lse_ptr, out_ptr,
    S, window, scale, cap, q_row, q_head, k_row, k_head, v_row, v_head, cos_row, sin_row, cache_row,
    cache_head,
    KV: tl.constexpr, GROUP: tl.constexpr, HD: tl.constexpr, D: tl.constexpr, M: tl.constexpr,
    ROPE: tl.constexpr, CAPPED: tl.constexpr, PDL: tl.constexpr, SINGLE: tl.constexpr,
    BN: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_wait()  # pyright: ignore
        if not SINGLE:
            tl.extra.cuda.gdc_launch_dependents()  # pyright: ignore
    pair, part, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    row, head = (pair // KV).to(tl.int64), pair % KV
    n = tl.minimum(tl.load(lengths_ptr + row), S - 1).to(tl.int32)
    member, d, j = tl.arange(0, M), tl.arange(0, D), tl.arange(0, BN)
    real = d < HD
    shown = (member < GROUP)[:, None] & real[None, :]
    q_at = q_ptr + row * q_row + (head * GROUP + member)[:, None] * q_head
    k_at, v_at = k_ptr + row * k_row + head * k_head, v_ptr + row * v_row + head * v_head
    q = tl.load(q_at + d[None, :], mask=shown, other=0.0)
    k_new = tl.load(k_at + d, mask=real, other=0.0)
    v_new = tl.load(v_at + d, mask=real, other=0.0)
    if ROPE:
        partner = (d + HD // 2) % HD
        cos = tl.load(cos_ptr + row * cos_row + d, mask=real, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + row * sin_row + d, mask=real, other=0.0).to(tl.float32)
        sin = tl.where(d < HD // 2, -sin, sin)
        q_partner = tl.load(q_at + partner[None, :], mask=shown, other=0.0).to(tl.float32)
        k_partner = tl.load(k_at + partner, mask=real, other=0.0).to(tl.float32)
        q = (q.to(tl.float32) * cos[None, :] + q_partner * sin[None, :]).to(q.dtype)
        k_new = (k_new.to(tl.float32) * cos + k_partner * sin).to(k_new.dtype)
    begin = tl.maximum(n + 1 - window, 0)
    share = tl.maximum(tl.cdiv(tl.cdiv(n - begin, BN), splits), 1) * BN
    parts = tl.maximum(tl.cdiv(n - begin, share), 1)
    if part >= parts:
        return
    begin += part * share
    end = tl.minimum(begin + share, n)
    cache_at = row * cache_row + head * cache_head
    k_at, v_at = k_cache_ptr + cache_at + d[None, :], v_cache_ptr + cache_at + d[None, :]
    factor = (cap if CAPPED else scale) * 1.4426950408889634
    best = tl.full((M,), -3e38, tl.float32)
    total = tl.zeros((M,), tl.float32)
    out = tl.zeros((M, D), tl.float32)
    for start in tl.range(begin, end, BN, num_stages=STAGES):  # pyright: ignore
        key = start + j
        seen = key < end
        # Entries behind the last key may hold NaN, and 0 * NaN is NaN: masked loads give zeros.
        at, there = key[:, None] * HD, seen[:, None] & real[None, :]
        k = tl.load(k_at + at, mask=there, other=0.0)
        v = tl.load(v_at + at, mask=there, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if CAPPED:  # tanh(scale * score / cap)
            scores = 1 - 2 / (1 + tl.exp2(scores * (2.8853900817779268 * scale / cap)))
        scores = tl.where(seen[None, :], scores, -float("inf"))
        better = tl.maximum(best, tl.max(scores, 1))
        weights = tl.exp2((scores - better[:, None]) * factor)
        shrink = tl.exp2((best - better) * factor)
        total = total * shrink + tl.sum(weights, 1)
        out = out * shrink[:, None]
        out = tl.dot(weights.to(v.dtype), v, out, input_precision=PRECISION)
        best = better
    first = part == 0
    if first:
        new_at = cache_at + n * HD + d
        tl.store(k_cache_ptr + new_at, k_new, mask=real)
        tl.store(v_cache_ptr + new_at, v_new, mask=real)
    own = tl.sum(q.to(tl.float32) * k_new.to(tl.float32)[None, :], 1)
    if CAPPED:
        own = 1 - 2 / (1 + tl.exp2(own * (2.8853900817779268 * scale / cap)))
    own = tl.where(first, own, -float("inf"))
    better = tl.maximum(best, own)
    weight = tl.exp2((own - better) * factor)
    shrink = tl.exp2((best - better) * factor)
    total = total * shrink + weight
    out = out * shrink[:, None] + weight[:, None] * v_new.to(tl.float32)[None, :]
    out = out / total[:, None]
    if parts == 1:
        out_at = (pair.to(tl.int64) * GROUP + member)[:, None] * HD + d[None, :]
        tl.store(out_ptr + out_at, out.to(out_ptr.dtype.element_ty), mask=shown)
    else:
        slot = (pair.to(tl.int64) * splits + part) * GROUP + member
        tl.store(lse_ptr + slot, better * factor + tl.log2(total), mask=member < GROUP)
        tl.store(parts_ptr + slot[:, None] * HD + d[None, :], out, mask=shown)


# One program joins the parts of one query. It recomputes `parts` as above.
@triton.jit(do_not_specialize=["window", "splits"])
def _join_kernel(
    lengths_ptr, parts_ptr, lse_ptr, out_ptr, S, window, splits,
    KV: tl.constexpr, GROUP: tl.constexpr, HD: tl.constexpr, D: tl.constexpr, PDL: tl.constexpr,
    BN: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    query = tl.program_id(0)
    pair, member = query // GROUP, query % GROUP
    # Safe before gdc_wait(): the kernel above has waited for the writer of `lengths`.
    n = tl.minimum(tl.load(lengths_ptr + pair // KV), S - 1).to(tl.int32)
    begin = tl.maximum(n + 1 - window, 0)
    share = tl.maximum(tl.cdiv(tl.cdiv(n - begin, BN), splits), 1) * BN
    parts = tl.maximum(tl.cdiv(n - begin, share), 1)
    if PDL:
        tl.extra.cuda.gdc_wait()  # pyright: ignore
    if parts == 1:
        return
    i, d = tl.arange(0, CHUNK), tl.arange(0, D)
    real = d < HD
    best, total, out = -3e38, 0.0, tl.zeros((D,), tl.float32)
    for start in range(0, parts, CHUNK):
        there = start + i < parts
        slot = (pair.to(tl.int64) * splits + start + i) * GROUP + member
        lse = tl.load(lse_ptr + slot, mask=there, other=-float("inf"))
        at, mask = slot[:, None] * HD + d[None, :], there[:, None] & real[None, :]
        result = tl.load(parts_ptr + at, mask=mask, other=0.0)
        better = tl.maximum(best, tl.max(lse, 0))
        weights = tl.exp2(lse - better)
        shrink = tl.exp2(best - better)
        total = total * shrink + tl.sum(weights, 0)
        out = out * shrink + tl.sum(result * weights[:, None], 0)
        best = better
    out = (out / total).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + query.to(tl.int64) * HD + d, out, mask=real)


# ── launcher ──────────────────────────────────────────────────────────────────────────────
class Tile(NamedTuple):
    """How the kernels divide the work."""

    keys: int  # of a block; a part is one or more blocks
    splits: int  # programs for each row and key head
    warps: int = 4
    stages: int = 3
    pdl: bool = False


class Card(NamedTuple):
    """The properties of a device that decide about the tile."""

    multiprocessors: int
    shared: int  # bytes of shared memory per block
    pdl: bool  # supports programmatic dependent launch


def tile(pairs: int, seen: int, head_dim: int, itemsize: int, card: Card) -> Tile:
    """The tile for `pairs` (rows times key heads) that see up to `seen` keys each.

    Chosen from measurements on an H200, heads of 1B and 8B, 1 to 128 rows, 128 to 32,768 tokens
    (scripts/bench/kernels/decode_attention.py --tiles): blocks of 64 or 128 keys, 1 to 4 programs
    per multiprocessor.
    """
    wide = triton.next_power_of_2(head_dim)
    keys = 128 if pairs < card.multiprocessors or wide <= 64 else 64
    # Two stages of keys and values in flight, and 10 KB for the exchange between warps.
    while keys > 16 and 4 * keys * wide * itemsize + 10240 > card.shared:
        keys //= 2
    # Two programs per multiprocessor if both fit its shared memory. Once there is a pair for each
    # multiprocessor, splitting costs more than it gains; so does a second launch for 256 keys.
    programs = 2 if wide * itemsize <= 128 and 2 * pairs <= card.multiprocessors else 1
    splits = max(1, min(programs * card.multiprocessors // pairs, seen // 256))
    return Tile(keys, splits, pdl=card.pdl)


def _card(device: torch.device) -> Card:
    if device.type != "cuda":  # Triton's interpreter
        return Card(multiprocessors=16, shared=65536, pdl=False)
    found = torch.cuda.get_device_properties(device)
    return Card(
        found.multi_processor_count, found.shared_memory_per_block_optin, pdl=found.major >= 9
    )


def decode_forward(
    q: Float[Tensor, "b h hd"],
    k: Float[Tensor, "b kv hd"],
    v: Float[Tensor, "b kv hd"],
    cos: Float[Tensor, "b hd"] | None,
    sin: Float[Tensor, "b hd"] | None,
    k_cache: Float[Tensor, "b kv S hd"],
    v_cache: Float[Tensor, "b kv S hd"],
    lengths: Int[Tensor, "b"],
    window: int | None,
    how: Tile | None = None,
    *,
    scale: float | None = None,
    cap: float | None = None,
) -> Float[Tensor, "b h hd"]:
    """`decode_attention` through the kernels, for tensors that `decode_kernel_supports`.

    `how` replaces the tile that `tile` chooses (for tests and measurements). `scale` and `cap` are
    those of `decode_attention`.
    """
    (b, h, hd), (kv, S) = q.shape, k_cache.shape[1:3]
    seen = S if window is None else min(window, S)
    if how is None:
        how = tile(b * kv, seen, hd, q.element_size(), _card(q.device))
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    # The kernel does not read the tables if there is no rotation, so q takes their place.
    rotates = cos is not None
    cos, sin = (q[:, 0] if x is None else x.contiguous() for x in (cos, sin))
    out, single = q.new_empty(b, h, hd), how.splits == 1
    parts = out if single else q.new_empty(b * h * how.splits, hd, dtype=torch.float32)
    lse = out if single else q.new_empty(b * h * how.splits, dtype=torch.float32)
    d, group = triton.next_power_of_2(hd), h // kv
    static = dict(KV=kv, GROUP=group, HD=hd, D=d, PDL=how.pdl, BN=how.keys)
    static |= dict(launch_pdl=True) if how.pdl else {}
    launch(
        _part_kernel, (b * kv, how.splits),
        q, k, v, cos, sin, k_cache, v_cache, lengths, parts, lse, out,
        S, seen, 1 / math.sqrt(hd) if scale is None else scale, 1.0 if cap is None else cap,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        cos.stride(0), sin.stride(0), *k_cache.stride()[:2],  # pyright: ignore
        M=max(16, triton.next_power_of_2(group)), ROPE=rotates, STAGES=how.stages,  # pyright: ignore
        CAPPED=cap is not None, SINGLE=single, PRECISION=precision(q.dtype),  # pyright: ignore
        num_warps=how.warps, **static,  # pyright: ignore
    )  # fmt: skip
    if not single:
        launch(
            _join_kernel, (b * h,),
            lengths, parts, lse, out, S, seen, how.splits,
            CHUNK=16, num_warps=2, **static,  # pyright: ignore
        )  # fmt: skip
    return out
