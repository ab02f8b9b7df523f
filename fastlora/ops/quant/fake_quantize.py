"""Fake quantisation: round a tensor to the values of a low-bit format, and keep its dtype.

The formulas and their roundings are those of the fake quantisers that torchao 0.18.0 (BSD-3) makes
for each config (torchao/quantization/qat/fake_quantizer.py and quant_primitives.py). The names of
the schemes and their configs are Unsloth's (Apache-2.0, models/_utils.py, _prepare_model_for_qat):

    int4       Int4WeightOnlyConfig(group_size=128)                          int4_groups
    int8       IntxWeightOnlyConfig(int8, PerAxis(0))                        int_groups
    fp8-int4   Float8DynamicActivationInt4WeightConfig()         fp8_rows    fp8_int4_groups
    fp8-fp8    Float8DynamicActivationFloat8WeightConfig(PerRow) fp8_rows    fp8_rows
    int8-int4  Int8DynamicActivationIntxWeightConfig(int4,       int8_rows   int_groups
               PerGroup(32)), embedding rows int8

    y = fq(x) fq(W)' + bias                                      of x        of W

Gradients pass through a rounding unchanged, and are zero for clipped values (Bengio et al. 2013,
arXiv:1308.3432; Jacob et al. 2018, arXiv:1712.05877). int_groups and int8_rows treat their scale as
a constant; the others differentiate it. This is torchao's behaviour with one exception: torchao's
float8 rounding also casts the gradient to float8, without a scale. Gradients below 2**-10, so
practically all gradients of a language model, then become zero. Here they pass unchanged.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

E4M3_MAX = 448.0

_LEAST_ROW = 1e-12  # lower bound of a row's largest |w| in the float8 scale of fp8_int4_groups

_LEAST_SCALE = 1e-6  # lower bound of an int4 group's scale; in int4_groups, of its range

_CHUNK_ELEMENTS = 2**24  # weight elements at a time: 64 MiB for each of about six fp32 temporaries

Kind = Literal["int4_groups", "fp8_int4_groups", "int_groups", "fp8_rows", "int8_rows"]


@dataclass(frozen=True, slots=True)
class Quantiser:
    """One fake quantiser: its formula, and the formula's parameters."""

    kind: Kind
    bits: int = 8
    group_size: int | None = None  # None: one group per row


@dataclass(frozen=True, slots=True)
class Scheme:
    """The fake quantisers of a `qat_scheme`; None leaves the tensor unchanged."""

    weight: Quantiser
    activation: Quantiser | None = None
    embedding: Quantiser | None = None


SCHEMES = {
    "int4": Scheme(Quantiser("int4_groups", 4, 128)),
    "int8": Scheme(Quantiser("int_groups", 8)),
    "fp8-int4": Scheme(Quantiser("fp8_int4_groups", 4, 128), Quantiser("fp8_rows")),
    "fp8-fp8": Scheme(Quantiser("fp8_rows"), Quantiser("fp8_rows")),
    "int8-int4": Scheme(
        Quantiser("int_groups", 4, 32), Quantiser("int8_rows"), Quantiser("int_groups", 8)
    ),
}


# ── 1. values ─────────────────────────────────────────────────────────────────────────────
def fake_quantize(x: Float[Tensor, "*n d"], quantiser: Quantiser) -> Float[Tensor, "*n d"]:
    """x rounded to the quantiser's format, in x.dtype. Plain torch, so all transforms work.

    A row of zeros gives zeros (torchao's float8 gives NaN). d must be a multiple of the group size.
    """
    match quantiser.kind:
        case "int4_groups":
            return _int4_groups(x, quantiser)
        case "fp8_int4_groups":
            return _int4_symmetric(_fp8_rows(x, _LEAST_ROW), quantiser)
        case "int_groups":
            return _int_groups(x, quantiser)
        case "int8_rows":
            return _int8_rows(x)
        case "fp8_rows":
            return _fp8_rows(x, 0.0)


def fake_quantize_rows(matrix: Float[Tensor, "n d"], quantiser: Quantiser) -> Float[Tensor, "n d"]:
    """`fake_quantize` in chunks of rows, for matrices whose temporaries would be too large."""
    rows = rows_per_chunk(matrix.shape[1])
    return torch.cat([fake_quantize(part, quantiser) for part in matrix.split(rows)])


def rows_per_chunk(d: int) -> int:
    """Rows of width d in a chunk of `_CHUNK_ELEMENTS`; at least 1."""
    return max(1, _CHUNK_ELEMENTS // d)


def _straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, with the derivative of x (straight-through estimator).

    Written as rounded + (x - x), which is exact: x + (rounded - x) would round. It is not an
    autograd.Function, whose derivative torch.compile drops under torch.func (pytorch#193279).
    """
    return rounded.detach() + (x - x.detach())


def _groups(x: Tensor, quantiser: Quantiser) -> Tensor:
    return x.unflatten(-1, (-1, quantiser.group_size or x.shape[-1]))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _int_range(bits: int) -> tuple[int, int]:
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def _int4_groups(w: Tensor, quantiser: Quantiser) -> Tensor:
    """int4 between a group's minimum and maximum (Int4WeightFakeQuantizer, bfloat16 inputs)."""
    g = _wide(_groups(w, quantiser))
    low, scale = _int4_scale(g)
    ratio = (g - low) / scale
    q = _straight_through(ratio, ratio.round()).clamp(0, 15)
    return ((q - 8) * scale + (low + scale * 8)).flatten(-2).to(w.dtype)


def _int4_scale(g: Tensor) -> tuple[Tensor, Tensor]:
    high, low = g.amax(-1, keepdim=True), g.amin(-1, keepdim=True)
    return low, (high - low).clamp(min=_LEAST_SCALE) / 15


def _int4_symmetric(w: Tensor, quantiser: Quantiser) -> Tensor:
    """int4 with scale |w|max / 8; clips a positive maximum (Int4WeightFakeQuantizer, float8)."""
    g = _groups(w, quantiser)
    scale = (g.abs().amax(-1, keepdim=True) / 8).clamp(min=_LEAST_SCALE)
    ratio = g * (1.0 / scale)
    return (_straight_through(ratio, ratio.round()).clamp(-8, 7) * scale).flatten(-2)


def _int_groups(w: Tensor, quantiser: Quantiser) -> Tensor:
    """Symmetric integers with scale |w|max / ((2**bits - 1) / 2) (IntxFakeQuantizer)."""
    g = _groups(w, quantiser)
    scale = _int_scale(g, quantiser.bits)
    ratio = g * (1.0 / scale)
    q = _straight_through(ratio, ratio.round()).clamp(*_int_range(quantiser.bits))
    return (q * scale).flatten(-2)


def _int_scale(g: Tensor, bits: int) -> Tensor:
    g = g.detach()  # torchao treats this scale as a constant
    low, high = g.amin(-1, keepdim=True).clamp(max=0), g.amax(-1, keepdim=True).clamp(min=0)
    scale = torch.maximum(-low, high) / ((2**bits - 1) / 2)
    return scale.clamp(min=torch.finfo(g.dtype).smallest_normal)


def _int8_rows(x: Tensor) -> Tensor:
    """int8 over a row's range, extended to contain 0; the zero point is an integer
    (IntxFakeQuantizer, per token)."""
    scale, zero = _int8_scale(x)
    ratio = x * (1.0 / scale)
    q = (_straight_through(ratio, ratio.round()) + zero).clamp(-128, 127)
    return (q - zero) * scale


def _int8_scale(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach()  # torchao treats scale and zero point as constants
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 255).clamp(min=torch.finfo(x.dtype).smallest_normal)
    return scale, (-128 - (low / scale).round()).clamp(-128, 127)


def _fp8_rows(x: Tensor, least: float) -> Tensor:
    """float8 e4m3; the scale maps a row's largest |x| to 448 (Float8FakeQuantizer, PerRow)."""
    scale = _fp8_scale(x, least)
    ratio = (_wide(x) / scale).clamp(-E4M3_MAX, E4M3_MAX)
    return (_straight_through(ratio, _e4m3(ratio)) * scale).to(x.dtype)


def _fp8_scale(x: Tensor, least: float) -> Tensor:
    largest = x.abs().amax(-1, keepdim=True)
    scale = _wide((largest.clamp(min=least) if least else largest) / E4M3_MAX)
    return torch.where(scale == 0, 1.0, scale)  # a row of zeros gives 0 / 1, not NaN


def _e4m3(x: Tensor) -> Tensor:
    return x.detach().to(torch.float8_e4m3fn).to(x.dtype)


# ── 2. derivatives, recomputed from x, so that nothing of x's size is kept for them ───────
def fake_quantize_backward(
    x: Float[Tensor, "*n d"], dy: Float[Tensor, "*n d"], quantiser: Quantiser
) -> Float[Tensor, "*n d"]:
    """The gradient of x under `fake_quantize` for the output gradient dy, in x.dtype.

    Not differentiable again.
    """
    match quantiser.kind:
        case "int4_groups":
            return _int4_groups_backward(x, dy, quantiser)
        case "fp8_int4_groups":
            inner = _fp8_rows(x, _LEAST_ROW)
            dinner = _int4_symmetric_backward(inner, dy, quantiser)
            return _fp8_rows_backward(x, dinner, _LEAST_ROW)
        case "int_groups":
            g = _groups(x, quantiser)
            low, high = _int_range(quantiser.bits)
            q = (g * (1.0 / _int_scale(g, quantiser.bits))).round()
            return torch.where((q >= low) & (q <= high), _groups(dy, quantiser), 0.0).flatten(-2)
        case "int8_rows":
            scale, zero = _int8_scale(x)
            q = (x * (1.0 / scale)).round() + zero
            return torch.where((q >= -128) & (q <= 127), dy, 0.0)
        case "fp8_rows":
            return _fp8_rows_backward(x, dy, 0.0)


def _int4_groups_backward(w: Tensor, dy: Tensor, quantiser: Quantiser) -> Tensor:
    """dy, plus the scale's gradient at the group's minimum and maximum.

    y = q * scale + min, and the straight-through slope of q gives dy.
    """
    g, dy = _wide(_groups(w, quantiser)), _wide(_groups(dy, quantiser))
    low, scale = _int4_scale(g)
    ratio = (g - low) / scale
    dscale = (dy * (ratio.round().clamp(0, 15) - ratio)).sum(-1, keepdim=True) / 15
    high = g.amax(-1, keepdim=True)
    dscale = torch.where(high - low >= _LEAST_SCALE, dscale, 0.0)
    dg = dy + _split_evenly(g == high, dscale) - _split_evenly(g == low, dscale)
    return dg.flatten(-2).to(w.dtype)


def _int4_symmetric_backward(w: Tensor, dy: Tensor, quantiser: Quantiser) -> Tensor:
    g, dy = _wide(_groups(w, quantiser)), _wide(_groups(dy, quantiser))
    largest = _groups(w, quantiser).abs().amax(-1, keepdim=True) / 8
    scale = _wide(largest.clamp(min=_LEAST_SCALE))
    # Computed in w.dtype, as in the forward pass: a float32 ratio would clip other elements.
    ratio = _wide(_groups(w, quantiser) * (1.0 / scale.to(w.dtype)))
    q = ratio.round()
    # y = q * scale: clipped values pass no gradient to w, but their q still scales with the scale.
    inside = (q >= -8) & (q <= 7)
    dscale = (dy * (q.clamp(-8, 7) - inside * ratio)).sum(-1, keepdim=True) / 8
    dscale = torch.where(largest >= _LEAST_SCALE, dscale, 0.0)
    dg = inside * dy + _at_largest(g, dscale)
    return dg.flatten(-2).to(w.dtype)


def _fp8_rows_backward(x: Tensor, dy: Tensor, least: float) -> Tensor:
    wide, dy, scale = _wide(x), _wide(dy), _fp8_scale(x, least)
    ratio = wide / scale
    clipped = ratio.clamp(-E4M3_MAX, E4M3_MAX)
    inside = ratio == clipped
    dscale = (dy * (_e4m3(clipped) - inside * ratio)).sum(-1, keepdim=True) / E4M3_MAX
    if least:  # below the bound the clamp makes the scale a constant
        dscale = torch.where(wide.abs().amax(-1, keepdim=True) >= least, dscale, 0.0)
    return (inside * dy + _at_largest(wide, dscale)).to(x.dtype)


def _at_largest(x: Tensor, dlargest: Tensor) -> Tensor:
    """The gradient of x through the largest |x| of the last axis, whose gradient is dlargest."""
    size = x.abs()
    return _split_evenly(size == size.amax(-1, keepdim=True), dlargest) * x.sign()


def _split_evenly(mask: Tensor, total: Tensor) -> Tensor:
    """`total` in equal parts for each True of the last axis; amax splits its gradient this way."""
    return mask * (total / mask.sum(-1, keepdim=True))
