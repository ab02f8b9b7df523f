"""Dequantisation: W = levels[index] * absmax of its block, rounded once.

The reference is the specification. In 4 bits the op runs our kernel on CUDA (dequantize_kernel.py;
bitsandbytes without triton), and on the CPU bitsandbytes if rows end with blocks of fewer than
2,048 values, all with the same bits. In 8 bits and in e4m3 it runs the reference.

The op is opaque to torch.compile, and so are the ops of compiled layers that call it
(linear/frozen.py). No compiled graph therefore contains a dequantised matrix, which its partitioner
might keep for the backward pass.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from fastlora.ops.dispatch import triton_installed
from fastlora.ops.launch import implement
from fastlora.ops.quant.bitsandbytes import dequantize_by_bitsandbytes, quantize_4bit
from fastlora.ops.quant.weights import (
    NESTED_BLOCK,
    NestedAbsmax,
    Quantized,
    Weight,
    Weight4bit,
    Weight8bit,
    WeightFP8,
    from_parts,
    parts,
)


# ── 1. reference ──────────────────────────────────────────────────────────────────────────
def dequantize_reference(weight: Quantized, dtype: torch.dtype) -> Float[Tensor, "d_out d_in"]:
    """The specification: float32 products, rounded to the record's dtype, then to `dtype`."""
    if isinstance(weight, Weight8bit):  # like bitsandbytes, not / 127, which rounds differently
        return (weight.values * weight.scale[:, None] * (1 / 127)).to(dtype)
    if isinstance(weight, WeightFP8):
        # In bf16 the product is exact too, and the float32 matrix is not made.
        wide = dtype if dtype in (torch.bfloat16, torch.float64) else torch.float32
        values = weight.values.view(torch.float8_e4m3fn).to(wide)
        return values.mul_(weight.scale.to(wide)[:, None]).to(dtype)
    rows, columns, block, _ = weight.form.shape
    numbers = torch.stack([weight.packed >> 4, weight.packed & 15], -1).flatten()[: rows * columns]
    scales = _absmax(weight).repeat_interleave(block)[: rows * columns]
    values = weight.levels[numbers.int()] * scales
    return values.view(rows, columns).to(weight.form.dtype).to(dtype)


def _absmax(weight: Weight4bit) -> Float[Tensor, "blocks"]:
    absmax = weight.absmax
    if not isinstance(absmax, NestedAbsmax):
        return absmax
    scale = absmax.scale.repeat_interleave(NESTED_BLOCK)[: len(absmax.values)]
    return absmax.code[absmax.values.int()] * scale + absmax.offset


# ── 2. op ─────────────────────────────────────────────────────────────────────────────────
torch.library.define("fastlora::dequantize", "(Tensor[] weight, ScalarType dtype) -> Tensor")


@implement("fastlora::dequantize")
def _dequantize(weight, dtype):
    record = from_parts(weight)
    assert not isinstance(record, Tensor)
    if isinstance(record, Weight8bit | WeightFP8):
        return dequantize_reference(record, dtype)
    if record.packed.is_cuda and triton_installed():
        from fastlora.ops.quant import dequantize_kernel  # noqa: PLC0415  imports triton

        return dequantize_kernel.dequantize_4bit(record, dtype)
    # If blocks span rows, bitsandbytes' code for AVX-512 gives wrong values (0.50.2, for multiples
    # of 16 columns), and for odd numbers of columns it compiles a Python function for each shape.
    # It does so for long blocks too.
    _, columns, block, _ = record.form.shape
    if not record.packed.is_cuda and (columns % block or block >= 2048):
        return dequantize_reference(record, dtype)
    return dequantize_by_bitsandbytes(record).to(dtype)


@torch.library.register_fake("fastlora::dequantize")
def _(weight, dtype):
    # 8-bit values have the matrix's shape; a 4-bit record stores it in `form`, its third part.
    shape = weight[0].shape if len(weight) == 2 else weight[2].shape[:2]
    return weight[0].new_empty(shape, dtype=dtype)


# ── 3. public functions ───────────────────────────────────────────────────────────────────
def dequantize(weight: Quantized, dtype: torch.dtype) -> Float[Tensor, "d_out d_in"]:
    """The matrix in `dtype`, a new tensor on the weight's device. No gradient flows.

    The bits are those of bitsandbytes 0.50.2 on CUDA (dequantize_4bit, int8_vectorwise_dequant),
    converted to `dtype`. Of e4m3 they are values * scale, which bfloat16, float32 and float64 hold
    exactly.

    Args:
        weight: 4 or 8 bits.
        dtype: float64, float32, bfloat16 or float16.
    """
    return torch.ops.fastlora.dequantize(parts(weight), dtype)


def dense(weight: Weight, dtype: torch.dtype) -> Float[Tensor, "d_out d_in"]:
    """A dense weight unchanged, in its dtype; a quantised weight dequantised to `dtype`."""
    return weight if isinstance(weight, Tensor) else dequantize(weight, dtype)


def nf4_rounded(weight: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "d_out d_in"]:
    """The matrix after a round trip through NF4, in float32, on weight.device.

    Without double quantisation: the absmax values stay in float32.

    Raises:
        ModuleNotFoundError: if bitsandbytes is not installed.
    """
    return dequantize(quantize_4bit(weight.to(torch.float32), nested=False), torch.float32)
