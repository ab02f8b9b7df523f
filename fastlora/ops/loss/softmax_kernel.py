"""Triton kernel of a row's label log-probability and its gradient by the logits.

    logp = z[label] - lse(z),  d logp / d z = onehot(label) - exp(z - lse(z))

The gradient overwrites the logits, as in Liger-Kernel (Hsu et al. 2024, arXiv:2410.10989). The
first pass computes maximum and sum together (Milakov & Gimelshein 2018, arXiv:1805.02867).

The specification is `label_logprobs_and_grad` of linear_cross_entropy.py.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from fastlora.ops.launch import launch


# ── kernel: one program per row ───────────────────────────────────────────────────────────
# On a GPU tl.exp2 of float32 is one instruction and tl.exp is five, because it also treats results
# below 2**-126. 1.4426950408889634 is log2(e), 2.8853900817779268 twice that.
@triton.jit
def _logprob_kernel(
    z_ptr, label_ptr, logp_ptr, V, cap, CAPPED: tl.constexpr, IGNORE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # rows * V passes 2**31 at 16,744 rows of 128,256
    z_ptr += row * V
    wide = logp_ptr.dtype.element_ty
    narrow = z_ptr.dtype.element_ty
    label = tl.load(label_ptr + row)
    if label == IGNORE:
        tl.store(logp_ptr + row, 0.0)
        for start in range(0, V, BLOCK):
            column = start + tl.arange(0, BLOCK)
            tl.store(z_ptr + column, tl.zeros((BLOCK,), narrow), mask=column < V)
    else:
        # Read the label's logit now, because the last pass overwrites it. NaN: outside the row.
        inside, slope = (label >= 0) & (label < V), 1.0
        chosen = tl.load(z_ptr + label, mask=inside, other=float("nan")).to(wide)
        if CAPPED:  # cap * tanh(z / cap)
            of_label = 1 - 2 / (1 + tl.exp2(chosen * (2.8853900817779268 / cap)))
            chosen, slope = cap * of_label, 1 - of_label * of_label
        # A maximum and a sum for every eight neighbours of a block, which one thread holds, so that
        # no thread waits for others before the row ends. A finite start: -inf - -inf is NaN.
        neighbours = 8 * tl.arange(0, BLOCK // 8)[:, None] + tl.arange(0, 8)[None, :]
        top = tl.full((BLOCK // 8,), -3.4028234663852886e38, wide)
        total = tl.zeros((BLOCK // 8,), wide)
        for start in range(0, V, BLOCK):
            column = start + neighbours
            z = tl.load(z_ptr + column, mask=column < V, other=float("-inf")).to(wide)
            if CAPPED:  # behind the last column -cap would count
                z = cap * (1 - 2 / (1 + tl.exp2(z * (2.8853900817779268 / cap))))
                z = tl.where(column < V, z, float("-inf"))
            new = tl.maximum(top, tl.max(z, 1))
            total *= tl.exp2((top - new) * 1.4426950408889634)
            total += tl.sum(tl.exp2((z - new[:, None]) * 1.4426950408889634), 1)
            top = new
        best = tl.max(top, 0)
        lse = best + tl.log(tl.sum(total * tl.exp2((top - best) * 1.4426950408889634), 0))
        tl.store(logp_ptr + row, chosen - lse)
        for start in range(0, V, BLOCK):
            column = start + tl.arange(0, BLOCK)
            z = tl.load(z_ptr + column, mask=column < V, other=float("-inf")).to(wide)
            dz = -tl.exp2((z - lse) * 1.4426950408889634)
            if CAPPED:
                tanh = 1 - 2 / (1 + tl.exp2(z * (2.8853900817779268 / cap)))
                dz = -tl.exp2((cap * tanh - lse) * 1.4426950408889634) * (1 - tanh * tanh)
            tl.store(z_ptr + column, dz.to(narrow), mask=column < V)
        tl.debug_barrier()  # another thread may have stored the label's element
        dz = (1 - tl.exp2((chosen - lse) * 1.4426950408889634)) * slope
        tl.store(z_ptr + label, dz.to(narrow), mask=inside)


# ── launcher ──────────────────────────────────────────────────────────────────────────────
def block_and_warps(vocab_size: int) -> tuple[int, int]:
    """(elements per block, warps) of a program.

    A program has up to 1,024 threads, so few rows are in progress, and the second pass finds part
    of its row in the L2 cache. Microseconds for 2**27 logits in bf16 on an H200
    (softmax-kernel-2026-11-30); a copy of them takes 126:

    | vocabulary | 16,384 elements | 32,768 |
    |---|---|---|
    | 32,000 | 144 | 219 |
    | 128,256 | 196 | 178 |
    | 256,000 | 203 | 215 |
    """
    most = 2**15 if 2**16 < vocab_size <= 3 * 2**16 else 2**14
    block = min(max(8, triton.next_power_of_2(vocab_size)), most)
    return block, min(32, max(1, block // 512))


def logprobs_and_dlogits_(
    logits: Float[Tensor, "n v"], labels: Int[Tensor, "n"], ignore: int, cap: float | None = None
) -> tuple[Float[Tensor, "n"], Float[Tensor, "n v"]]:
    """(log-probabilities in at least float32, d logp / d logits in the logits' dtype).

    Both are 0 in rows whose label is `ignore`. The gradient is written over `logits`.

    Args:
        logits: contiguous; overwritten.
        labels: in [0, v), or `ignore`. Of any other label the log-probability is NaN.
        ignore: the label of rows to skip.
        cap: the log-probabilities are those of cap * tanh(logits / cap); None: of the logits.
    """
    n, v = logits.shape
    logp = logits.new_empty(n, dtype=torch.promote_types(logits.dtype, torch.float32))
    block, warps = block_and_warps(v)
    launch(
        _logprob_kernel, (n,),
        logits, labels, logp, v, 1.0 if cap is None else cap,
        CAPPED=cap is not None, IGNORE=ignore, BLOCK=block, num_warps=warps,  # pyright: ignore
    )  # fmt: skip
    return logp, logits
