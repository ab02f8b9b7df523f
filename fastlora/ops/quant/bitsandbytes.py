"""Matrices in 4 and 8 bits: what is kept of one, and bitsandbytes, which makes and reads them.

NF4 and FP4 (Dettmers et al. 2023, arXiv:2305.14314, section 3): a matrix, in row-major order, is
cut into blocks of 64 values; each is kept as its largest magnitude and a 4-bit number a value, an
index into 16 levels between -1 and 1. With double quantisation the magnitudes are 8-bit numbers
themselves, in blocks of 256, around their mean. LLM.int8 (arXiv:2208.07339) has a scale a row.

Records hold tensors only, like all of a tree. bitsandbytes is imported at the first call, not with
the package: it takes seconds and brings in more than fastlora itself.
"""

from importlib import import_module
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fastlora.ops.quant.weights import (
    BLOCK,
    NESTED_BLOCK,
    NestedAbsmax,
    Quantized,
    Weight4bit,
    Weight8bit,
    empty_form,
    quant_type,
)


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
