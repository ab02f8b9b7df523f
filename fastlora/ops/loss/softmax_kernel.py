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
@triton.jit
def _logprob_kernel(
    z_ptr, label_ptr, logp_ptr, V, cap, CAPPED: tl.constexpr, IGNORE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # rows * V passes 2**31 at 16,744 rows of 128,256
    z_ptr += row * V
    wide = logp_ptr.dtype.element_ty
    label = tl.load(label_ptr + row)
    ignored = label == IGNORE
    # Read the label's logit now, because the second pass overwrites it. The reductions of the first
    # pass are barriers between this load and those stores.
    chosen = tl.load(z_ptr + tl.where(ignored, 0, label)).to(wide)
    if CAPPED:  # cap * tanh(z / cap)
        chosen = cap * (1 - 2 / (1 + tl.exp(chosen * (2 / cap))))
    top = tl.full((), float("-inf"), wide)
    total = tl.full((), 0.0, wide)
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + column, mask=column < V, other=float("-inf")).to(wide)
        if CAPPED:  # behind the last column -cap would count
            z = tl.where(column < V, cap * (1 - 2 / (1 + tl.exp(z * (2 / cap)))), -float("inf"))
        new = tl.maximum(top, tl.max(z, 0))
        total = total * tl.exp(top - new) + tl.sum(tl.exp(z - new), 0)
        top = new
    lse = top + tl.log(total)
    tl.store(logp_ptr + row, tl.where(ignored, 0.0, chosen - lse))
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + column, mask=column < V, other=float("-inf")).to(wide)
        slope = 1.0
        if CAPPED:
            tanh = 1 - 2 / (1 + tl.exp(z * (2 / cap)))
            z, slope = cap * tanh, 1 - tanh * tanh
        dz = (tl.where(column == label, 1.0, 0.0) - tl.exp(z - lse)) * slope
        dz = tl.where(ignored, 0.0, dz)
        tl.store(z_ptr + column, dz.to(z_ptr.dtype.element_ty), mask=column < V)


# ── launcher ──────────────────────────────────────────────────────────────────────────────
def block_and_warps(vocab_size: int) -> tuple[int, int]:
    """(elements per block, warps) of a program.

    With 1,024 threads of 32 elements, only one program fits on a multiprocessor. So few rows are
    then in progress that the second pass finds part of its row in the L2 cache. 512 x 128,256
    logits in bf16 take 150 µs on an H100; with blocks of 16,384 they take 161 µs, with 8,192
    165 µs. Inductor's kernel takes 224 µs and a copy of the logits 95 µs.
    """
    block = min(triton.next_power_of_2(vocab_size), 32768)
    return block, max(1, block // 1024)


def logprobs_and_dlogits_(
    logits: Float[Tensor, "n v"], labels: Int[Tensor, "n"], ignore: int, cap: float | None = None
) -> tuple[Float[Tensor, "n"], Float[Tensor, "n v"]]:
    """(log-probabilities in at least float32, d logp / d logits in the logits' dtype).

    Both are 0 in rows whose label is `ignore`. The gradient is written over `logits`.

    Args:
        logits: contiguous; overwritten.
        labels: in [0, v), or `ignore`.
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
