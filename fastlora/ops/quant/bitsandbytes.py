"""Quantisation and dequantisation with bitsandbytes, to and from the records of weights.py.

bitsandbytes is imported at the first call and not with the package: its import takes seconds and
loads more code than fastlora has.
"""

from importlib import import_module
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fastlora.ops.quant.e4m3 import rounds_to
from fastlora.ops.quant.weights import (
    BLOCK,
    NESTED_BLOCK,
    NestedAbsmax,
    Quantized,
    Weight4bit,
    Weight8bit,
    WeightFP8,
    empty_form,
    quant_type,
)


def bitsandbytes(module: str = "bitsandbytes.functional") -> Any:
    """Import and return a module of bitsandbytes.

    Raises:
        ModuleNotFoundError: if it is not installed.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        cure = "bases in 4 bits and 8-bit optimisers need bitsandbytes: pip install bitsandbytes."
        raise ModuleNotFoundError(cure) from error


def quantize_4bit(
    weight: Float[Tensor, "d_out d_in"],
    *,
    quant_type: str = "nf4",
    nested: bool = True,
    block: int = BLOCK,
) -> Weight4bit:
    """The matrix in 4 bits, on weight.device, with the bytes and statistics of bitsandbytes.

    Args:
        weight: bfloat16, float16 or float32; dequantising returns this dtype.
        quant_type: "nf4" or "fp4".
        nested: whether the absmax values are quantised too (double quantisation).
        block: values per absmax.

    Raises:
        ModuleNotFoundError: if bitsandbytes is not installed.
        RuntimeError: torch's default dtype is not float32.
    """
    if torch.get_default_dtype() != torch.float32:
        raise RuntimeError(
            f"torch's default dtype is {torch.get_default_dtype()}. bitsandbytes would make its"
            " table of 4-bit levels in it, and keep that for the whole process; quantise under"
            " torch.set_default_dtype(torch.float32)."
        )
    with torch.device(weight.device):  # it makes tables on torch's default device
        packed, state = bitsandbytes().quantize_4bit(
            weight.detach().contiguous(),
            blocksize=block,
            compress_statistics=nested,
            quant_type=quant_type,
        )
    absmax = state.absmax
    if nested:
        second = state.state2
        absmax = NestedAbsmax(state.absmax, second.absmax, second.code, state.offset)
    rows, columns = weight.shape
    form = empty_form((rows, columns), weight.dtype, weight.device, block)
    return Weight4bit(packed.flatten(), state.code, form, absmax)


def dequantize_by_bitsandbytes(weight: Weight4bit | Weight8bit) -> Float[Tensor, "d_out d_in"]:
    """The matrix that bitsandbytes computes: in `form`'s dtype, or in float32 from 8 bits."""
    functional = bitsandbytes()
    if isinstance(weight, Weight8bit):
        return functional.int8_vectorwise_dequant(weight.values, weight.scale)
    rows, columns, block, _ = weight.form.shape
    absmax, nested = weight.absmax, {}
    if isinstance(absmax, NestedAbsmax):
        second = functional.QuantState(
            absmax=absmax.scale, code=absmax.code, blocksize=NESTED_BLOCK, dtype=torch.float32
        )
        nested = {"offset": absmax.offset, "state2": second}
        absmax = absmax.values
    state = functional.QuantState(
        absmax=absmax,
        shape=torch.Size([rows, columns]),
        dtype=weight.form.dtype,
        blocksize=block,
        code=weight.levels,
        quant_type=quant_type(weight),
        **nested,
    )
    # reshape, because bitsandbytes takes a single byte for a transposed matrix and transposes it.
    return functional.dequantize_4bit(weight.packed.unsqueeze(1), state).reshape(rows, columns)


# The share of compared values that may differ. Between two devices, values halfway between two
# levels may be rounded differently. If weights change by 1 %, one value in fifty differs.
_MAX_DIFFERING_SHARE = 1e-4

_COMPARED_VALUES = 2**20  # per matrix, a multiple of every block size; takes 40 ms on the CPU


def comes_from(weight: Quantized, matrix: Float[Tensor, "d_out d_in"]) -> bool:
    """Whether the dense matrix, once quantised, gives the bytes of `weight`.

    Compares the first 2**20 values of a 4-bit matrix and all values of an 8-bit matrix, with small
    tolerances, and of a matrix in e4m3 all values with its rounding error.
    """
    if isinstance(weight, WeightFP8):
        return rounds_to(matrix, weight)
    flat = matrix.flatten()[:_COMPARED_VALUES]
    if isinstance(weight, Weight8bit):
        numbers = matrix.to(torch.float32) * (127 / weight.scale.clamp(min=1e-30))[:, None]
        # LLM.int8 rounds to float16 first, so a few values differ by 1.
        off = (numbers.round() - weight.values).abs()
        return bool(off.isfinite().all() and off.max() <= 1 and off.mean() < 0.05)
    kind, block = quant_type(weight), weight.form.shape[2]
    like = quantize_4bit(
        flat[None].to(weight.form.dtype), quant_type=kind, nested=False, block=block
    )
    differing = (like.packed != weight.packed[: len(like.packed)]).sum()
    return bool(flat.isfinite().all() and differing <= _MAX_DIFFERING_SHARE * len(flat))
