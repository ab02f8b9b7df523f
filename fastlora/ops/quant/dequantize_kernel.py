"""Triton kernel of `dequantize`: a 4-bit weight to a matrix in one launch, also with nested absmax.

bitsandbytes launches three kernels: one for the nested absmax, one to add its mean, one for the
matrix. To give the same bits, we add the mean in a separate rounding (no fused multiply-add) and
round the product of level and absmax once, to the record's dtype.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from fastlora.ops.launch import launch
from fastlora.ops.quant.weights import NESTED_BLOCK, NestedAbsmax, Weight4bit


# ── kernel: one program per BYTES consecutive bytes ───────────────────────────────────────
@triton.jit
def _dequantize_kernel(
    packed_ptr, levels_ptr, absmax_ptr, scale_ptr, code_ptr, offset_ptr, out_ptr, n,
    NESTED: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, ROUND: tl.constexpr,
    BYTES: tl.constexpr,
):  # fmt: skip
    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    packed = tl.load(packed_ptr + byte, mask=2 * byte < n, other=0)
    # BLOCK is even, so both values of a byte share one absmax.
    block = 2 * byte // BLOCK
    if NESTED:
        number = tl.load(absmax_ptr + block, mask=2 * byte < n, other=0)
        level = tl.load(code_ptr + number.to(tl.int32))
        scale = tl.load(scale_ptr + block // GROUP, mask=2 * byte < n, other=0.0)
        absmax = level * scale + tl.load(offset_ptr)
    else:
        absmax = tl.load(absmax_ptr + block, mask=2 * byte < n, other=0.0)
    first = tl.load(levels_ptr + (packed >> 4).to(tl.int32)) * absmax
    second = tl.load(levels_ptr + (packed & 15).to(tl.int32)) * absmax
    # [BYTES, 2] -> [2 * BYTES]: each thread stores adjacent values.
    values = tl.reshape(tl.join(first, second), [2 * BYTES])
    at = tl.program_id(0).to(tl.int64) * 2 * BYTES + tl.arange(0, 2 * BYTES)
    values = values.to(ROUND).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at, values, mask=at < n)


# ── launcher ──────────────────────────────────────────────────────────────────────────────
_BYTES, _WARPS = 2048, 8

_TRITON = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def dequantize_4bit(weight: Weight4bit, dtype: torch.dtype) -> Float[Tensor, "d_out d_in"]:
    """The matrix in `dtype`, in one launch on the current stream."""
    rows, columns, block, _ = weight.form.shape
    absmax, n = weight.absmax, rows * columns
    nested = isinstance(absmax, NestedAbsmax)
    statistics = absmax if nested else (absmax, absmax, absmax, absmax)
    out = torch.empty(rows, columns, dtype=dtype, device=weight.packed.device)
    # enable_fp_fusion=False: bitsandbytes rounds level * scale before it adds the offset.
    launch(
        _dequantize_kernel, (triton.cdiv(len(weight.packed), _BYTES),),
        weight.packed, weight.levels, *statistics, out, n,
        NESTED=nested, BLOCK=block, GROUP=NESTED_BLOCK, ROUND=_TRITON[weight.form.dtype],
        BYTES=_BYTES, num_warps=_WARPS, enable_fp_fusion=False,  # pyright: ignore
    )  # fmt: skip
    return out
