"""Products with a frozen matrix in e4m3, whose other operand is rounded to e4m3 too, row by row
(ops/quant/e4m3.py): y = Q(x) W', and for the gradient of x, Q(dy * scales of W's rows) W8.

On GPUs with fp8 products (sm_89 and newer) bf16 operands whose widths are multiples of 16 are
multiplied in e4m3. Otherwise the rounded values are multiplied in the dtype of x, which holds them
exactly, or in float32 if x is in float16, which does not.

fp8 products need both operands contiguous along the summed dimension, so for the gradient W8 is
transposed into a scratch matrix first. Several matrices of one input are transposed side by side:
the sum of their products is one product with one sum, whose left operand has one scale
for each row. The scales of W's rows are factors of the columns of dy then, and are multiplied into
dy before it is rounded.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fastlora.ops.dispatch import triton_installed
from fastlora.ops.launch import implement
from fastlora.ops.quant.e4m3 import Rows, multiplies_e4m3, quantize_rows
from fastlora.ops.quant.weights import E4M3, WeightFP8

# ── plain functions ───────────────────────────────────────────────────────────────────────


def fp8_product(rows: Rows, weight: WeightFP8, dtype: torch.dtype) -> Float[Tensor, "n d_out"]:
    """x W' in `dtype`, where `rows` are those of x."""
    values, scale = rows
    if _multiplies_fp8(values, weight.values, dtype):
        return _scaled_mm(values, weight.values.view(E4M3), scale, weight.scale)
    wide = exact_dtype(dtype)
    x = values.to(wide).mul_(scale.to(wide)[:, None])
    w = weight.values.view(E4M3).to(wide).mul_(weight.scale.to(wide)[:, None])
    return torch.mm(x, w.t()).to(dtype)


def fp8_input_gradient(
    dys: Sequence[Float[Tensor, "n _"]], weights: Sequence[WeightFP8]
) -> Float[Tensor, "n d_in"]:
    """The sum of dy_i W_i, in dy's dtype. The dys side by side are rounded with one scale a row."""
    dtype = dys[0].dtype
    values, scale = quantize_rows(dys, [weight.scale for weight in weights])
    if _multiplies_fp8(values, weights[0].values, dtype):
        from fastlora.ops.quant.e4m3_kernel import side_by_side  # noqa: PLC0415  imports triton

        turned, ones = side_by_side([weight.values for weight in weights])
        return _scaled_mm(values, turned.view(E4M3), scale, ones)
    wide = exact_dtype(dtype)
    w = torch.cat([weight.values.view(E4M3).to(wide) for weight in weights])
    return torch.mm(values.to(wide).mul_(scale.to(wide)[:, None]), w).to(dtype)


def fp8_linear(
    rows: Rows,
    weight: WeightFP8,
    bias: Float[Tensor, "d_out"] | None,
    x_a: Float[Tensor, "n r"] | None,
    b: Float[Tensor, "d_out r"] | None,
    scaling: float,
    dtype: torch.dtype,
) -> Float[Tensor, "n d_out"]:
    """x W' + bias + scaling * xA B', in `dtype`.

    fp8 products cannot add to an existing tensor, so the low-rank product adds to the base product,
    which is rounded to `dtype` before.
    """
    y = fp8_product(rows, weight, dtype)
    if bias is not None:
        y.add_(bias)
    return y if x_a is None or b is None else y.addmm_(x_a, b.t(), alpha=scaling)


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which products of rounded values are computed: float16 does not hold them."""
    return torch.float32 if dtype == torch.float16 else dtype


def _multiplies_fp8(x: Tensor, w: Tensor, dtype: torch.dtype) -> bool:
    """Whether the GPU's fp8 products run: their results are in bf16, and all widths of operands
    multiples of 16."""
    if not (x.is_cuda and dtype == torch.bfloat16 and len(x) and triton_installed()):
        return False
    return multiplies_e4m3(x.device.index) and not any(n % 16 for n in (*x.shape[1:], *w.shape))


def _scaled_mm(
    x: Float[Tensor, "n k"], w: Float[Tensor, "m k"], x_scale: Tensor, w_scale: Tensor
) -> Float[Tensor, "n m"]:
    return torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
        x,
        w.t(),
        scale_a=x_scale[:, None],
        scale_b=w_scale[None],
        out_dtype=torch.bfloat16,
        # Sums of fewer bits than float32 has. The products of a step of 8B take 172 ms, and 191
        # with sums in float32; their error, nearly all from rounding the operands, is at most 1.005
        # times as large (H200, fp8-layer-2026-11-30 in scripts/bench/results.jsonl).
        use_fast_accum=True,
    )


# ── op ────────────────────────────────────────────────────────────────────────────────────
# For layers that share their input's rounded rows (lora_group.py). Ops of a single layer round its
# input themselves.
torch.library.define(
    "fastlora::fp8_linear",
    "(Tensor values, Tensor scale, Tensor[] weight, Tensor? bias, Tensor? x_a, Tensor? b,"
    " float scaling, ScalarType dtype) -> Tensor",
)


@implement("fastlora::fp8_linear")
def _fp8_linear(values, scale, weight, bias, x_a, b, scaling, dtype):
    return fp8_linear((values, scale), WeightFP8(*weight), bias, x_a, b, scaling, dtype)


@torch.library.register_fake("fastlora::fp8_linear")
def _(values, scale, weight, bias, x_a, b, scaling, dtype):
    return values.new_empty((values.shape[0], weight[0].shape[0]), dtype=dtype)
