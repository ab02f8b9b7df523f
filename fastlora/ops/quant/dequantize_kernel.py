"""Triton kernel of `dequantize`: a 4-bit weight to a matrix in one launch, also with nested absmax.

bitsandbytes launches three kernels: one for the nested absmax, one to add its mean, one for the
matrix. To give the same bits, we add the mean in a separate rounding (no fused multiply-add) and
round the product of level and absmax once, to the record's dtype.
"""

# pyright: reportArgumentType=false

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from fastlora.ops.launch import launch
from fastlora.ops.quant.levels_ptx import SHUFFLE, TABLE
from fastlora.ops.quant.weights import NESTED_BLOCK, NestedAbsmax, Weight4bit


# ── kernel: one program per BYTES consecutive bytes, four of them in each thread ──────────
@triton.jit
def _dequantize_kernel(
    packed_ptr, levels_ptr, absmax_ptr, scale_ptr, code_ptr, offset_ptr, out_ptr, size, n,
    NESTED: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, ROUND: tl.constexpr,
    BYTES: tl.constexpr, SHUFFLE: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BYTES
    left = tl.minimum(size - start, BYTES).to(tl.int32)
    word = tl.arange(0, BYTES // 4)
    byte = 4 * word[:, None] + tl.arange(0, 4)[None, :]
    packed = tl.load(packed_ptr + start + byte, mask=byte < left, other=0)
    # BLOCK is a multiple of 8, so all values of a word share one absmax, and divides 2 * BYTES.
    block, here = 2 * start // BLOCK + 8 * word // BLOCK, 4 * word < left
    if NESTED:
        number = tl.load(absmax_ptr + block, mask=here, other=0)
        level = tl.load(code_ptr + number.to(tl.int32))
        scale = tl.load(scale_ptr + block // GROUP, mask=here, other=0.0)
        absmax = level * scale + tl.load(offset_ptr)
    else:
        absmax = tl.load(absmax_ptr + block, mask=here, other=0.0)
    if SHUFFLE is not None:  # the table: level number (lane % 16) in each lane
        table = tl.inline_asm_elementwise(
            TABLE, "=r,l", [levels_ptr.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
        )
        first, second = tl.inline_asm_elementwise(
            SHUFFLE, "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r,r", [packed, table],
            dtype=(tl.int32, tl.int32), is_pure=True, pack=4,
        )  # fmt: skip
        first = first.to(tl.float32, bitcast=True)
        second = second.to(tl.float32, bitcast=True)
    else:
        first = tl.load(levels_ptr + (packed >> 4).to(tl.int32))
        second = tl.load(levels_ptr + (packed & 15).to(tl.int32))
    # [BYTES / 4, 4, 2] -> [2 * BYTES]: each thread stores adjacent values.
    values = tl.join(first * absmax[:, None], second * absmax[:, None])
    values = tl.reshape(values, [2 * BYTES]).to(ROUND).to(out_ptr.dtype.element_ty)
    at = tl.arange(0, 2 * BYTES)
    tl.store(out_ptr + 2 * start + at, values, mask=at < tl.minimum(n - 2 * start, 2 * BYTES))


# ── launcher ──────────────────────────────────────────────────────────────────────────────
# Bytes of a program, warps. On an H200 14,336 x 4,096 values take 41 us; 34 are needed to move
# their bytes at 4.3 TB/s. A byte takes 14 instructions. With 41, an absmax for each byte and levels
# from memory, they took 58 us, and a step of 8B over NF4, 2 x 2048 tokens, 310.0 ms in place of
# 303.6 (h200-dequantize-2026-11-30). Levels from shared memory (tl.gather) take 25 instructions a
# byte; alone they are as fast.
_BYTES, _WARPS = 4096, 4

_TRITON = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def dequantize_4bit(weight: Weight4bit, dtype: torch.dtype) -> Float[Tensor, "d_out d_in"]:
    """The matrix in `dtype`, in one launch on the current stream."""
    rows, columns, block, _ = weight.form.shape
    absmax, n = weight.absmax, rows * columns
    nested = isinstance(absmax, NestedAbsmax)
    assert block % 8 == 0 == 2 * _BYTES % block and len(weight.packed) == triton.cdiv(n, 2)
    statistics = absmax if nested else (absmax, absmax, absmax, absmax)
    out = torch.empty(rows, columns, dtype=dtype, device=weight.packed.device)
    # enable_fp_fusion=False: bitsandbytes rounds level * scale before it adds the offset.
    launch(
        _dequantize_kernel, (triton.cdiv(len(weight.packed), _BYTES),),
        weight.packed, weight.levels, *statistics, out, len(weight.packed), n,
        NESTED=nested, BLOCK=block, GROUP=NESTED_BLOCK, ROUND=_TRITON[weight.form.dtype],
        BYTES=_BYTES, SHUFFLE=SHUFFLE if out.is_cuda else None, TABLE=TABLE,
        num_warps=_WARPS, enable_fp_fusion=False,  # pyright: ignore
    )  # fmt: skip
    return out
