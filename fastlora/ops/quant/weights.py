"""Records of quantised matrices, in 4 and 8 bits.

NF4 and FP4 (Dettmers et al. 2023, arXiv:2305.14314, section 3): a matrix, in row-major order, is
split into blocks of 64 values. Each block stores its largest magnitude (absmax), and one 4-bit
index per value into 16 levels between -1 and 1. With double quantisation the absmax values are
themselves stored as 8-bit indices, in blocks of 256, around their mean. LLM.int8
(arXiv:2208.07339) stores int8 values and one scale per row, e4m3 (e4m3.py) 8-bit floating-point
numbers and one scale per row.

Records hold only tensors, so trees of parameters can contain them.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor

BLOCK = 64  # values per absmax; the choice of QLoRA and PEFT

NESTED_BLOCK = 256  # absmax values per nested scale


E4M3 = torch.float8_e4m3fn

# Added to a float32's bits, this carries into the exponent if the mantissa exceeds 1.75, which is
# that of 448 = 1.75 * 2**8.
CARRY = 0x1FFFFF

# Biased exponent of the smallest scale, 2**-100, which rows of zeros have.
LEAST_POWER = 27

# The bits of float32's infinity and NaN. Those of a magnitude are larger only if it is NaN.
INFINITE, NOT_A_NUMBER = 0x7F800000, 0x7FC00000

# The 16 levels of bitsandbytes 0.50.2. Its kernels support only these.
LEVELS = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "fp4": (
        *(0.0, 0.0052083334885537624, 0.6666666865348816, 1.0),
        *(0.3333333432674408, 0.5, 0.1666666716337204, 0.25),
        *(0.0, -0.0052083334885537624, -0.6666666865348816, -1.0),
        *(-0.3333333432674408, -0.5, -0.1666666716337204, -0.25),
    ),
}


class NestedAbsmax(NamedTuple):
    """absmax values in 8 bits: code[values] * scale + offset, with one scale per 256 values."""

    values: UInt8[Tensor, "blocks"]
    scale: Float[Tensor, "groups"]
    code: Float[Tensor, "256"]
    offset: Float[Tensor, ""]


class Weight4bit(NamedTuple):
    """A matrix in NF4 or FP4: levels[index] * absmax of its block, rounded to `form`'s dtype."""

    packed: UInt8[Tensor, "bytes"]  # two indices per byte, the first in the high half
    levels: Float[Tensor, "16"]
    form: Float[Tensor, "d_out d_in block 0"]  # empty; stores the shape, block size and dtype
    absmax: Float[Tensor, "blocks"] | NestedAbsmax


class Weight8bit(NamedTuple):
    """A matrix in int8 with one scale per row: values * scale / 127."""

    values: Int8[Tensor, "d_out d_in"]
    scale: Float[Tensor, "d_out"]


class WeightFP8(NamedTuple):
    """A matrix in e4m3 with one scale per row, a power of two: values * scale.

    `values` holds the bytes of torch.float8_e4m3fn, a dtype for which torch has neither isfinite
    nor equal, and NumPy no counterpart.
    """

    values: UInt8[Tensor, "d_out d_in"]
    scale: Float[Tensor, "d_out"]


Quantized = Weight4bit | Weight8bit | WeightFP8


# The weight of a frozen linear layer. A dense weight is a tensor [d_out, d_in].
Weight = Tensor | Weight4bit | Weight8bit | WeightFP8


def shape_of(weight: Weight) -> tuple[int, int]:
    """The matrix's shape: (d_out, d_in)."""
    of = weight.form if isinstance(weight, Weight4bit) else weight
    of = of.values if isinstance(of, Weight8bit | WeightFP8) else of
    return of.shape[0], of.shape[1]


def numel(weight: Weight) -> int:
    """Number of elements of the matrix; a dense tensor may have any number of dimensions."""
    return weight.numel() if isinstance(weight, Tensor) else math.prod(shape_of(weight))


def parts(weight: Weight) -> list[Tensor]:
    """The tensors of a weight, as a flat list for an op's argument:

    dense                    [weight]
    int8, e4m3               [values, scale]; the dtype of `values` tells which
    4 bits                   [packed, levels, form, absmax]
    4 bits, nested absmax    [packed, levels, form, values, scale, code, offset]
    """
    if isinstance(weight, Tensor):
        return [weight]
    if isinstance(weight, Weight4bit) and isinstance(weight.absmax, NestedAbsmax):
        return [*weight[:3], *weight.absmax]
    return [*weight]  # pyright: ignore[reportReturnType]


def from_parts(tensors: Sequence[Tensor]) -> Weight:
    """The inverse of `parts`. Their number, and the first one's dtype, determine the kind."""
    match len(tensors):
        case 1:
            return tensors[0]
        case 2:
            return (WeightFP8 if tensors[0].dtype == torch.uint8 else Weight8bit)(*tensors)
        case 4:
            return Weight4bit(*tensors)
        case 7:
            packed, levels, form, *nested = tensors
            return Weight4bit(packed, levels, form, NestedAbsmax(*nested))
    raise AssertionError(len(tensors))


def empty_form(
    shape: tuple[int, int], dtype: torch.dtype, device: Any, block: int = BLOCK
) -> Float[Tensor, "d_out d_in block 0"]:
    """The field `form` of a `Weight4bit`. It has no elements, so it takes no memory."""
    return torch.empty(*shape, block, 0, dtype=dtype, device=device)


def quant_type(weight: Weight4bit) -> str:
    """ "nf4" or "fp4": their first levels are -1 and 0. Synchronises with the device."""
    return "nf4" if float(weight.levels[0]) < 0 else "fp4"
