"""Quantisation and dequantisation with bitsandbytes, to and from the records of weights.py.

bitsandbytes is imported at the first call and not with the package: its import takes seconds and
loads more code than fastlora has.
"""

from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from fastlora.ops.quant.e4m3 import rounds_to
from fastlora.ops.quant.weights import (
    BLOCK,
    LEVELS,
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
    """
    functional, matrix = bitsandbytes(), weight.detach().contiguous()
    levels = torch.tensor(LEVELS[quant_type], dtype=torch.float32, device=weight.device)
    if matrix.device.type == "cpu":
        packed, absmax = _quantize_on_cpu(matrix, levels, block)
    else:
        how = dict(blocksize=block, compress_statistics=False, quant_type=quant_type)
        packed, state = functional.quantize_4bit(matrix, **how)
        absmax = state.absmax
    if nested:
        offset = absmax.mean()
        with torch.device(weight.device):  # it makes a table on torch's default device
            values, second = functional.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK)
        absmax = NestedAbsmax(values, second.absmax, second.code, offset)
    rows, columns = weight.shape
    form = empty_form((rows, columns), weight.dtype, weight.device, block)
    return Weight4bit(packed.flatten(), levels, form, absmax)


def _quantize_on_cpu(
    matrix: Float[Tensor, "d_out d_in"], levels: Float[Tensor, "16"], block: int
) -> tuple[UInt8[Tensor, "bytes"], Float[Tensor, "blocks"]]:
    """(packed values, absmax), with the bits of bitsandbytes 0.50.2 (backends/default/ops.py:233).

    bitsandbytes makes its levels in torch's default dtype at the first call and keeps them, so
    after a call under bfloat16 its values are wrong for the rest of the process.
    """
    numbers = matrix.flatten().float()
    whole = len(numbers) // block * block
    blocks, rest = numbers[:whole].view(-1, block), numbers[whole:]
    absmax = blocks.abs().amax(1)
    scaled = (blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]).clamp(-1, 1).flatten()
    if len(rest):  # the last block is shorter
        largest = rest.abs().max().clamp(min=1e-38)
        absmax = torch.cat([absmax, largest[None]])
        scaled = torch.cat([scaled, (rest / largest).clamp(-1, 1)])
    scaled = F.pad(scaled, (0, len(scaled) % 2))
    order = levels.argsort()
    middles = (levels[order[:-1]] + levels[order[1:]]) / 2
    nearest = torch.bucketize(scaled, middles, out_int32=True)
    if levels[0] == 0:  # fp4's levels are not sorted
        nearest = order[nearest]
    nearest = nearest.to(torch.uint8)
    return (nearest[::2] << 4) | nearest[1::2], absmax


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
