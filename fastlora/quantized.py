"""Matrices in 4 and 8 bits: what is kept of one, and bitsandbytes, which makes and reads them.

NF4 and FP4 (Dettmers et al. 2023, arXiv:2305.14314, section 3): a matrix, in row-major order, is
cut into blocks of 64 values; each is kept as its largest magnitude and a 4-bit number a value, an
index into 16 levels between -1 and 1. With double quantisation the magnitudes are 8-bit numbers
themselves, in blocks of 256, around their mean. LLM.int8 (arXiv:2208.07339) has a scale a row.

Records hold tensors only, like all of a tree. bitsandbytes is imported at the first call, not with
the package: it takes seconds and brings in more than fastlora itself.
"""

import math
from collections.abc import Sequence
from importlib import import_module
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


# ── bitsandbytes ──────────────────────────────────────────────────────────────────────────


def bitsandbytes(module: str = "bitsandbytes.functional") -> Any:
    """A module of bitsandbytes.

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
    """The matrix in 4 bits, on its own device: bitsandbytes' bytes and statistics.

    Args:
        weight: bfloat16, float16 or float32; the dtype is that of the dequantised matrix.
        quant_type: "nf4" or "fp4".
        nested: whether the scales are quantised too.
        block: values that share a scale.
    """
    made, state = bitsandbytes().quantize_4bit(
        weight.detach().contiguous(),
        blocksize=block,
        compress_statistics=nested,
        quant_type=quant_type,
    )
    absmax = state.absmax
    if nested:
        own = state.state2
        absmax = NestedAbsmax(state.absmax, own.absmax, own.code, state.offset)
    rows, columns = weight.shape
    form = empty_form((rows, columns), weight.dtype, weight.device, block)
    return Weight4bit(made.flatten(), state.code, form, absmax)


def dequantize_by_bitsandbytes(weight: Quantized) -> Float[Tensor, "d_out d_in"]:
    """The matrix that bitsandbytes reads: in `form`'s dtype, of 8 bits in float32."""
    functional = bitsandbytes()
    if isinstance(weight, Weight8bit):
        return functional.int8_vectorwise_dequant(weight.values, weight.scale)
    rows, columns, block, _ = weight.form.shape
    absmax, nested = weight.absmax, {}
    if isinstance(absmax, NestedAbsmax):
        own = functional.QuantState(
            absmax=absmax.scale, code=absmax.code, blocksize=NESTED_BLOCK, dtype=torch.float32
        )
        nested = {"offset": absmax.offset, "state2": own}
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
    # A single byte it takes for a transposed matrix.
    return functional.dequantize_4bit(weight.packed.unsqueeze(1), state).reshape(rows, columns)


def quant_type(weight: Weight4bit) -> str:
    """ "nf4" or "fp4": their first levels are -1 and 0. Reads the device."""
    return "nf4" if float(weight.levels[0]) < 0 else "fp4"


# Of the values that are compared; between two devices some lie on the border of two numbers. A
# weight that has moved by a hundredth of itself has another number in one case of fifty.
_MOST_DIFFERING = 1e-4
_COMPARED = 2**20  # values of each matrix, a multiple of every block: 40 ms on the CPU


def comes_from(weight: Quantized, matrix: Float[Tensor, "d_out d_in"]) -> bool:
    """Whether a dense matrix is the one that was quantised, as far as its bytes tell."""
    flat = matrix.flatten()[:_COMPARED]
    if isinstance(weight, Weight8bit):
        numbers = matrix.to(torch.float32) * (127 / weight.scale.clamp(min=1e-30))[:, None]
        # LLM.int8 rounds to float16 first: one number in many is the neighbour.
        off = (numbers.round() - weight.values).abs()
        return bool(off.isfinite().all() and off.max() <= 1 and off.mean() < 0.05)
    kind, block = quant_type(weight), weight.form.shape[2]
    like = quantize_4bit(
        flat[None].to(weight.form.dtype), quant_type=kind, nested=False, block=block
    )
    differing = (like.packed != weight.packed[: len(like.packed)]).sum()
    return bool(flat.isfinite().all() and differing <= _MOST_DIFFERING * len(flat))


def nf4_rounded(weight: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "d_out d_in"]:
    """The matrix after a round trip through NF4, in float32, on its own device; scales in float32
    (no double quantisation).

    Raises:
        ModuleNotFoundError: if bitsandbytes is not installed.
    """
    return dequantize_by_bitsandbytes(quantize_4bit(weight.to(torch.float32), nested=False))
