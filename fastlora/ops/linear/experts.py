"""Products of row groups with one matrix per group: y[i] = x[i] W[g]', and with LoRA
y[i] = x[i] W[g]' + s x[i] A[g]' B[g]', where g is the group of row i.

Groups are consecutive rows and may be empty. `offsets[g]` is the end of group g: the index of the
row after its last. Three groups of 2, 0 and 3 rows have the offsets [2, 2, 5].

The references are the specification. The ops give the same values, with one grouped product each.
No shape depends on the data, so compiled regions can contain them. For an adapted layer the
backward pass computes no gradient of W.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fastlora.ops.dispatch import needs_reference


# ── 1. reference ──────────────────────────────────────────────────────────────────────────
def grouped_linear_reference(
    x: Float[Tensor, "m d_in"], weight: Float[Tensor, "e d_out d_in"], offsets: Int[Tensor, "e"]
) -> Float[Tensor, "m d_out"]:
    """The specification, differentiable any number of times and under vmap.

    Every row is multiplied with every matrix, and all products but one are masked out. This takes e
    times the arithmetic, but no shape depends on the data.
    """
    row = torch.arange(x.shape[0], device=x.device)
    y = x.new_zeros(())
    for group in range(weight.shape[0]):
        inside = row < offsets[group]
        if group > 0:
            inside = inside & (row >= offsets[group - 1])
        y = y + torch.where(inside[:, None], F.linear(x, weight[group]), 0.0)
    return y


def grouped_lora_linear_reference(
    x: Float[Tensor, "m d_in"],
    weight: Float[Tensor, "e d_out d_in"],
    a: Float[Tensor, "g r d_in"],
    b: Float[Tensor, "g d_out r"],
    offsets: Int[Tensor, "e"],
    scaling: float,
    lora_offsets: Int[Tensor, "g"] | None = None,
) -> Float[Tensor, "m d_out"]:
    """The specification, differentiable in every argument any number of times."""
    ends = offsets if lora_offsets is None else lora_offsets
    x_a = grouped_linear_reference(x, a, ends)
    update = grouped_linear_reference(x_a, b, ends)
    return grouped_linear_reference(x, weight, offsets) + scaling * update


# ── 2. ops ────────────────────────────────────────────────────────────────────────────────
# As in lora.py, one op computes base product and low-rank term, so that a recompute policy keeps
# one tensor, and the derivative is an autograd.Function around it. torch's grouped products cannot
# accumulate into an existing tensor, so the sum takes one more pass over y.
torch.library.define(
    "fastlora::grouped_linear",
    "(Tensor x, Tensor weight, Tensor offsets, Tensor? x_a, Tensor? b, float scaling,"
    " Tensor? lora_offsets=None) -> Tensor",
)

torch.library.define("fastlora::grouped_outer", "(Tensor y, Tensor x, Tensor offsets) -> Tensor")


@torch.library.impl("fastlora::grouped_linear", "CompositeExplicitAutograd")
def _grouped_linear(x, weight, offsets, x_a, b, scaling, lora_offsets=None):
    y = _rows(x, weight, offsets)
    if x_a is None:
        return y
    # In place: base product and sum share one [m, d_out] buffer.
    ends = offsets if lora_offsets is None else lora_offsets
    return y.add_(_rows(x_a, b, ends), alpha=scaling)


@torch.library.register_fake("fastlora::grouped_linear")
def _(x, weight, offsets, x_a, b, scaling, lora_offsets=None):
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.impl("fastlora::grouped_outer", "CompositeExplicitAutograd")
def _grouped_outer(y, x, offsets):
    """For each group, the sum of y[i]' x[i] over its rows; zeros for an empty group."""
    if _grouped_mm_supports(y, x):
        return F.grouped_mm(y.contiguous().t(), x.contiguous(), offs=offsets)
    out, start = x.new_zeros(offsets.shape[0], y.shape[1], x.shape[1]), 0
    for group, end in enumerate(offsets.tolist()):
        if end > start:
            torch.mm(y[start:end].t(), x[start:end], out=out[group])
        start = end
    return out


@torch.library.register_fake("fastlora::grouped_outer")
def _(y, x, offsets):
    return x.new_empty(offsets.shape[0], y.shape[1], x.shape[1])


def _rows(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    if _grouped_mm_supports(x, weight):
        return F.grouped_mm(x.contiguous(), weight.transpose(1, 2), offs=offsets)
    out, start = x.new_empty(x.shape[0], weight.shape[1]), 0
    for group, end in enumerate(offsets.tolist()):
        if end > start:
            torch.mm(x[start:end], weight[group].t(), out=out[start:end])
        start = end
    return out


def _grouped_mm_supports(*operands: Tensor) -> bool:
    """Whether torch's grouped kernel supports these operands; otherwise a loop over groups runs.

    The kernel needs bf16, sm90, addresses that are multiples of 16 bytes, and one unit stride with
    all others multiples of 16 bytes. It writes zeros for empty groups. It multiplies 16,384 rows
    with 64 matrices of 2,048 x 1,536 in 0.17 ms, 600 TFLOP/s (torch 2.11, H200). On a GPU the loop
    synchronises with the device to read `offsets`. On the CPU we always use the loop: it gives the
    same bits in about the same time (torch 2.13) and supports float64.
    """
    if not all(t.is_cuda and t.dtype == torch.bfloat16 for t in operands):
        return False
    if torch.cuda.get_device_capability(operands[0].device) < (9, 0):
        return False
    aligned = lambda n: n % 8 == 0
    return all(
        aligned(t.shape[-1])
        and t.data_ptr() % 16 == 0
        and (t.dim() == 2 or (aligned(t.shape[-2]) and 1 in t.stride()[-2:]))
        for t in operands
    )


# ── 3. derivatives: each uses the other, so both are differentiable any number of times ───
class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, offsets):
        ctx.save_for_backward(x, weight, offsets)
        return torch.ops.fastlora.grouped_linear(x, weight, offsets, None, None, 0.0)

    @staticmethod
    def backward(ctx, dy):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, offsets = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        dx = _GroupedLinear.apply(dy, weight.transpose(1, 2), offsets) if wanted[0] else None
        dweight = _GroupedOuter.apply(dy, x, offsets) if wanted[1] else None
        return dx, dweight, None


class _GroupedOuter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, x, offsets):
        ctx.save_for_backward(y, x, offsets)
        return torch.ops.fastlora.grouped_outer(y, x, offsets)

    @staticmethod
    def backward(ctx, dout):  # pyright: ignore[reportIncompatibleMethodOverride]
        y, x, offsets = ctx.saved_tensors
        dy = _GroupedLinear.apply(x, dout, offsets)
        return dy, _GroupedLinear.apply(y, dout.transpose(1, 2), offsets), None


class _GroupedLoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, x_a, b, offsets, scaling, lora_offsets):
        ctx.save_for_backward(weight, x_a, b, offsets, lora_offsets)
        ctx.scaling = scaling
        op = torch.ops.fastlora.grouped_linear
        return op(x, weight, offsets, x_a, b, scaling, lora_offsets)

    @staticmethod
    def backward(ctx, dy):  # pyright: ignore[reportIncompatibleMethodOverride]
        weight, x_a, b, offsets, ends = ctx.saved_tensors
        ends = offsets if ends is None else ends
        # Products of the other classes, so that this backward pass is differentiable itself.
        transposed, scaling = weight.transpose(1, 2), ctx.scaling
        dx = _GroupedLinear.apply(dy, transposed, offsets) if ctx.needs_input_grad[0] else None
        dx_a = _GroupedLinear.apply(dy, b.transpose(1, 2), ends) * scaling
        db = _GroupedOuter.apply(dy, x_a, ends) * scaling if ctx.needs_input_grad[3] else None
        return dx, None, dx_a, db, None, None, None  # the weight is frozen


# ── 4. public functions ───────────────────────────────────────────────────────────────────
def grouped_linear(
    x: Float[Tensor, "m d_in"], weight: Float[Tensor, "e d_out d_in"], offsets: Int[Tensor, "e"]
) -> Float[Tensor, "m d_out"]:
    """Each group of rows times its matrix, in x.dtype; `offsets` is int32 and non-decreasing."""
    if needs_reference(weight):
        return grouped_linear_reference(x, weight, offsets)
    return _GroupedLinear.apply(x, weight, offsets)  # pyright: ignore[reportReturnType]


def grouped_lora_linear(
    x: Float[Tensor, "m d_in"],
    weight: Float[Tensor, "e d_out d_in"],
    a: Float[Tensor, "g r d_in"],
    b: Float[Tensor, "g d_out r"],
    offsets: Int[Tensor, "e"],
    scaling: float,
    lora_offsets: Int[Tensor, "g"] | None = None,
) -> Float[Tensor, "m d_out"]:
    """The adapted groups. All floating-point tensors have x.dtype. `weight` receives no gradient.

    Args:
        x: rows, sorted by group.
        weight: frozen base matrices.
        a: LoRA's A of each group.
        b: LoRA's B of each group.
        offsets: the end of each group, int32; see the head of this file.
        scaling: factor of the low-rank term (alpha / r).
        lora_offsets: the end of each group of A and B, if these are finer than the groups of the
            weight; None: they are the same.
    """
    if needs_reference(weight):
        return grouped_lora_linear_reference(x, weight, a, b, offsets, scaling, lora_offsets)
    # The grouped kernel needs strides of 16 bytes, 8 elements. Zero rows of A and zero columns of B
    # change no value; autograd drops their gradients.
    if x.is_cuda and (short := -a.shape[1] % 8):
        a, b = F.pad(a, (0, 0, 0, short)), F.pad(b, (0, short))
    x_a = _GroupedLinear.apply(x, a, offsets if lora_offsets is None else lora_offsets)
    y = _GroupedLoRALinear.apply(x, weight, x_a, b, offsets, scaling, lora_offsets)
    return y  # pyright: ignore[reportReturnType]


def grouped_lora_product(
    x: Float[Tensor, "m d_in"],
    x_a: Float[Tensor, "m r"],
    weight: Float[Tensor, "e d_out d_in"],
    b: Float[Tensor, "e d_out r"],
    offsets: Int[Tensor, "e"],
    scaling: float,
) -> Float[Tensor, "m d_out"]:
    """`grouped_lora_linear` of rows whose x A' the caller has computed. Not under torch.func."""
    if x.is_cuda and (short := -b.shape[2] % 8):
        x_a, b = F.pad(x_a, (0, short)), F.pad(b, (0, short))
    y = _GroupedLoRALinear.apply(x, weight, x_a, b, offsets, scaling, None)
    return y  # pyright: ignore[reportReturnType]


def grouped_rows(
    x: Float[Tensor, "m d_in"], weight: Float[Tensor, "e d_out d_in"], offsets: Int[Tensor, "e"]
) -> Float[Tensor, "m d_out"]:
    """`grouped_linear` for few rows and without a derivative, for which no host waits for a GPU.

    If there are fewer rows than matrices, each row's matrix is copied for one batched product.
    Otherwise the reference reads each matrix once.
    """
    if _grouped_mm_supports(x, weight):
        return F.grouped_mm(x.contiguous(), weight.transpose(1, 2), offs=offsets)
    if x.shape[0] >= weight.shape[0]:
        return grouped_linear_reference(x, weight, offsets)
    group = (torch.arange(x.shape[0], device=x.device)[:, None] >= offsets).sum(1)
    return torch.bmm(weight[group], x[:, :, None])[:, :, 0]
