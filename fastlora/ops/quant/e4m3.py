"""Rows in e4m3 (4 bits of exponent, 3 of mantissa; Micikevicius et al. 2022, arXiv:2209.05433):
x[i] = values[i] * scale[i], one scale for each row.

A row's scale is the smallest power of two that brings its largest magnitude to at most 448, the
largest finite number of e4m3. With powers of two, values * scale is exact in bf16, and so is a
gradient times the scales of W's rows. Any other scale would round no better: e4m3's relative steps
are the same at all sizes, down to 2**-15 of a row's largest magnitude.

A row with an infinite element or NaN has the scale NaN, so that no product hides an overflow: e4m3
has no infinity, and a GPU's conversion to it gives 448.

The reference is the specification. The op runs e4m3_kernel.py on CUDA, with the same bits for
finite rows.
"""

from collections.abc import Sequence
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from fastlora.ops.dispatch import triton_installed
from fastlora.ops.launch import implement
from fastlora.ops.quant.weights import (
    CARRY,
    E4M3,
    INFINITE,
    LEAST_POWER,
    NOT_A_NUMBER,
    WeightFP8,
)

Rows = tuple[Float[Tensor, "n d"], Float[Tensor, "n"]]


# ── 1. reference ──────────────────────────────────────────────────────────────────────────
def row_scales(amax: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """The scales of rows with these largest magnitudes (float32)."""
    bits = amax.view(torch.int32)
    power = ((bits + CARRY) >> 23) - 8
    scale = power.clamp(min=LEAST_POWER) << 23
    return torch.where(bits >= INFINITE, NOT_A_NUMBER, scale).view(torch.float32)


def quantize_rows_reference(
    ys: Sequence[Float[Tensor, "n _"]], factors: Sequence[Float[Tensor, "_"]] | None = None
) -> Rows:
    """The specification."""
    x = ys[0] if len(ys) == 1 else torch.cat([*ys], 1)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if factors is not None:
        x = x * (factors[0] if len(factors) == 1 else torch.cat([*factors]))
    scale = row_scales(x.abs().amax(1).float())
    return (x / scale[:, None]).to(E4M3), scale


def rounded_rows(x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
    """x rounded as `quantize_rows` does, in x.dtype; its derivative is that of x.

    Not for float16, which holds neither all rounded values, of which 65,536 is infinite there, nor
    the smallest ones.
    """
    assert x.dtype != torch.float16, "round in float32"
    wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    scale = row_scales(wide.abs().amax(-1, keepdim=True).float())
    rounded = ((wide / scale).to(E4M3).to(wide.dtype) * scale).to(x.dtype)
    # Exact: rounding changes a number by less than a factor of two, or to zero.
    return x + (rounded - x.detach())


# ── 2. op ─────────────────────────────────────────────────────────────────────────────────
torch.library.define(
    "fastlora::quantize_rows", "(Tensor[] ys, Tensor[]? factors) -> (Tensor, Tensor)"
)


@implement("fastlora::quantize_rows")
def _quantize_rows(ys, factors):
    if _kernel_supports(ys[0]):
        from fastlora.ops.quant import e4m3_kernel  # noqa: PLC0415  imports triton

        return e4m3_kernel.quantize_rows(ys, factors)
    return quantize_rows_reference(ys, factors)


def _kernel_supports(y: Tensor) -> bool:
    """Whether the kernel can round y. Triton writes e4m3 on GPUs that multiply in it."""
    if not y.is_cuda or y.dtype == torch.float64 or not triton_installed():
        return False
    return multiplies_e4m3(y.device.index)


@cache
def multiplies_e4m3(device: int) -> bool:
    """Whether a CUDA device has products in e4m3: Ada Lovelace, Hopper and later ones."""
    return torch.cuda.get_device_capability(device) >= (8, 9)


@torch.library.register_fake("fastlora::quantize_rows")
def _(ys, factors):
    n, d = ys[0].shape[0], sum(y.shape[1] for y in ys)
    return ys[0].new_empty((n, d), dtype=E4M3), ys[0].new_empty(n, dtype=torch.float32)


# ── 3. public functions ───────────────────────────────────────────────────────────────────
def quantize_rows(
    ys: Sequence[Float[Tensor, "n _"]], factors: Sequence[Float[Tensor, "_"]] | None = None
) -> Rows:
    """(values [n, d] in e4m3, scale [n] in float32) of the ys side by side. No gradient flows.

    Args:
        ys: of one dtype, on one device. Neither their rows nor they themselves need be adjacent.
        factors: of the columns of each y, powers of two in float32; multiplied before the rows are
            rounded.
    """
    factors = None if factors is None else [*factors]
    return torch.ops.fastlora.quantize_rows([*ys], factors)


# Elements of a matrix that are quantised at a time on the CPU, where their float32 copy is made.
_CHUNK = 2**24


def quantize_matrix(weight: Float[Tensor, "d_out d_in"]) -> WeightFP8:
    """A matrix in e4m3, on its device.

    Args:
        weight: without NaN and infinity.
    """
    rows = len(weight) if weight.is_cuda else max(1, _CHUNK // max(1, weight.shape[1]))
    pieces = [quantize_rows([piece]) for piece in weight.detach().split(rows)]
    values, scale = pieces[0]
    if len(pieces) > 1:
        values, scale = (torch.cat([piece[i] for piece in pieces]) for i in (0, 1))
    return WeightFP8(values.view(torch.uint8), scale)


def rounds_to(matrix: Float[Tensor, "d_out d_in"], weight: WeightFP8) -> bool:
    """Whether the matrix, rounded to any dtype of at least 16 bits and then to e4m3, may have given
    `weight`.

    e4m3's largest relative error is 1 / 16, and half a step of 2**-9 below its normal numbers.
    """
    scale = weight.scale[:, None]
    scaled = matrix.to(torch.float32) / scale
    error = (scaled - weight.values.view(E4M3).to(torch.float32)).abs()
    return bool((error <= torch.clamp(scaled.abs() / 16, min=2**-10) * (1 + 2**-4)).all())
