"""weights."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor

BLOCK = 64  # values that share one scale; QLoRA's and PEFT's choice

NESTED_BLOCK = 256  # scales that share one of their own


# The 16 levels, as bitsandbytes 0.50.2 has them; its kernels know no others.
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
    """Magnitudes in 8 bits: code[values] * scale + offset, block by block of 256."""

    values: UInt8[Tensor, "blocks"]
    scale: Float[Tensor, "groups"]
    code: Float[Tensor, "256"]
    offset: Float[Tensor, ""]


class Weight4bit(NamedTuple):
    """A matrix in NF4 or FP4: levels[number] * absmax of its block, rounded to `form`'s dtype."""

    packed: UInt8[Tensor, "bytes"]  # two numbers a byte, the first in the high half
    levels: Float[Tensor, "16"]
    form: Float[Tensor, "d_out d_in block 0"]  # empty: its shape and dtype are the matrix's
    absmax: Float[Tensor, "blocks"] | NestedAbsmax


class Weight8bit(NamedTuple):
    """A matrix in int8, one scale a row: values * scale / 127."""

    values: Int8[Tensor, "d_out d_in"]
    scale: Float[Tensor, "d_out"]


Quantized = Weight4bit | Weight8bit


# What a frozen linear layer may have for a weight; a dense one is [d_out, d_in].
Weight = Tensor | Weight4bit | Weight8bit


def shape_of(weight: Weight) -> tuple[int, int]:
    """(d_out, d_in)."""
    of = weight.form if isinstance(weight, Weight4bit) else weight
    of = of.values if isinstance(of, Weight8bit) else of
    return of.shape[0], of.shape[1]


def numel(weight: Weight) -> int:
    """Elements of the matrix (of a dense tensor, any number of dimensions)."""
    return weight.numel() if isinstance(weight, Tensor) else math.prod(shape_of(weight))


def parts(weight: Weight) -> list[Tensor]:
    """The tensors of a weight, for an op's argument; a dense one is its only part."""
    if isinstance(weight, Tensor):
        return [weight]
    if isinstance(weight, Weight4bit) and isinstance(weight.absmax, NestedAbsmax):
        return [*weight[:3], *weight.absmax]
    return [*weight]  # pyright: ignore[reportReturnType]


def from_parts(tensors: Sequence[Tensor]) -> Weight:
    """The inverse of `parts`: only their number says which kind it is."""
    match len(tensors):
        case 1:
            return tensors[0]
        case 2:
            return Weight8bit(*tensors)
        case 4:
            return Weight4bit(*tensors)
        case 7:
            packed, levels, form, *nested = tensors
            return Weight4bit(packed, levels, form, NestedAbsmax(*nested))
    raise AssertionError(len(tensors))


def empty_form(
    shape: tuple[int, int], dtype: torch.dtype, device: Any, block: int = BLOCK
) -> Float[Tensor, "d_out d_in block 0"]:
    """`Weight4bit.form`."""
    return torch.empty(*shape, block, 0, dtype=dtype, device=device)


def quant_type(weight: Weight4bit) -> str:
    """ "nf4" or "fp4": their first levels are -1 and 0. Reads the device."""
    return "nf4" if float(weight.levels[0]) < 0 else "fp4"
