"""Log-probability of each row's label under softmax(h W'), without all logits in memory at once.

Logits are computed in chunks of rows, and each chunk's gradient while its logits are in memory. The
idea is from Liger-Kernel's fused linear cross-entropy (Hsu et al. 2024, arXiv:2410.10989), which
returns the gradient of a sum. We keep one gradient per row, so the backward pass works for any
function of the log-probabilities:

    logp_i = z_i[label_i] - lse(z_i),  z_i = W h_i,  d logp_i / d h_i = W' (onehot_i - softmax z_i)
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastlora.ops.dispatch import needs_reference, transforms_active
from fastlora.ops.loss.ignore import IGNORE
from fastlora.ops.soft_cap import soft_cap

# Logits per chunk: 256 MiB in 16 bits. At v = 128,256 this gives 1,024 rows, whose products run at
# 734 (forward) and 809 TFLOP/s (backward); with 512 rows they run at 671 and 771 (H100, d = 2048).
_CHUNK_ELEMENTS = 2**27


def rows_per_chunk(vocab_size: int) -> int:
    """Rows per chunk: the largest power of two with at most 2**27 logits; at least 1.

    It depends on the vocabulary size only.
    """
    return 1 << max(0, (_CHUNK_ELEMENTS // vocab_size).bit_length() - 1)


def label_logprobs(
    logits: Float[Tensor, "n v"], labels: Int[Tensor, "n"]
) -> tuple[Float[Tensor, "n"], Float[Tensor, "n v"]]:
    """(log-probability of each row's label, log-softmax of the logits) of a chunk of rows.

    Both in at least float32. Rows with the label -100 get 0.
    """
    logsoftmax = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    index = labels.clamp(min=0)[:, None]  # gather needs valid indices for ignored rows too
    return torch.where(labels == IGNORE, 0.0, logsoftmax.gather(1, index)[:, 0]), logsoftmax


def label_logprobs_and_grad(
    logits: Float[Tensor, "n v"], labels: Int[Tensor, "n"]
) -> tuple[Float[Tensor, "n"], Float[Tensor, "n v"]]:
    """(log-probability of each row's label, its derivative by the row's logits, in their dtype).

    May overwrite the logits when compiled.
    """
    logp, logsoftmax = label_logprobs(logits, labels)
    # Elementwise and not a scatter, so that Inductor can fuse it with the softmax.
    columns = torch.arange(logits.shape[1], dtype=torch.int32, device=logits.device)
    onehot = (columns == labels[:, None].int()).to(logsoftmax.dtype)
    dlogits = torch.where((labels == IGNORE)[:, None], 0.0, onehot - logsoftmax.exp())
    return logp, dlogits.to(logits.dtype)


def label_logprobs_and_grad_kernel(
    logits: Float[Tensor, "n v"], labels: Int[Tensor, "n"], cap: float | None = None
) -> tuple[Float[Tensor, "n"], Float[Tensor, "n v"]]:
    """`label_logprobs_and_grad` in one Triton kernel; overwrites the logits with the gradient.

    With `cap` the log-probabilities are those of cap * tanh(logits / cap), and the derivative is by
    the logits themselves.
    """
    from fastlora.ops.loss.softmax_kernel import (  # noqa: PLC0415  imports triton
        logprobs_and_dlogits_,
    )

    return logprobs_and_dlogits_(logits, labels, IGNORE, cap)


# ── frozen head ───────────────────────────────────────────────────────────────────────────
def chunk_logprobs(
    h: Float[Tensor, "n d"],
    weight: Float[Tensor, "v d"],
    labels: Int[Tensor, "n"],
    cap: float | None = None,
) -> tuple[Float[Tensor, "n"], Float[Tensor, "n v"]]:
    """`label_logprobs` of the logits h W' of a chunk of rows, after their soft cap."""
    return label_logprobs(_capped(h @ weight.t(), cap), labels)


def _capped(logits: Float[Tensor, "n v"], cap: float | None) -> Float[Tensor, "n v"]:
    """The logits after their soft cap. With a cap they are in at least float32, and not rounded to
    the dtype of the product again."""
    if cap is None:
        return logits
    return soft_cap(logits.to(torch.promote_types(logits.dtype, torch.float32)), cap)


def linear_logprobs_reference(
    h: Float[Tensor, "n d"],
    weight: Float[Tensor, "v d"],
    labels: Int[Tensor, "n"],
    cap: float | None = None,
) -> Float[Tensor, "n"]:
    """The specification, differentiable in h and weight any number of times.

    Autograd keeps the log-softmax of every chunk.
    """
    rows = rows_per_chunk(weight.shape[0])
    chunks = zip(h.split(rows), labels.split(rows), strict=True)
    return torch.cat([chunk_logprobs(x, weight, y, cap)[0] for x, y in chunks])


def chunk_value_and_grad(
    h: Float[Tensor, "n d"],
    weight: Float[Tensor, "v d"],
    labels: Int[Tensor, "n"],
    cap: float | None = None,
) -> tuple[Float[Tensor, "n"], Float[Tensor, "n d"]]:
    """(log-probability of each row's label, its derivative by the row of h, in h.dtype)."""
    capped = _capped(h @ weight.t(), cap)
    logp, dlogits = label_logprobs_and_grad(capped, labels)
    if cap is not None:  # d (cap tanh(z / cap)) / dz = 1 - tanh(z / cap)**2
        dlogits = dlogits * (1 - (capped / cap).square())
    return logp, dlogits.to(h.dtype) @ weight


def chunk_value_and_grad_kernel(
    h: Float[Tensor, "n d"],
    weight: Float[Tensor, "v d"],
    labels: Int[Tensor, "n"],
    cap: float | None = None,
) -> tuple[Float[Tensor, "n"], Float[Tensor, "n d"]]:
    """`chunk_value_and_grad` with one Triton kernel for the softmax and its gradient."""
    logp, dlogits = label_logprobs_and_grad_kernel(h @ weight.t(), labels, cap)
    return logp, dlogits @ weight


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, weight, labels, value, value_and_grad, cap):
        rows = rows_per_chunk(weight.shape[0])
        logp = h.new_empty(h.shape[0], dtype=torch.promote_types(h.dtype, torch.float32))
        # d logp_i / d h_i of each row i: [n, d] in h.dtype, all that the backward pass needs.
        unit = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        for start in range(0, h.shape[0], rows):
            here = slice(start, start + rows)
            if unit is None:
                logp[here] = value(h[here], weight, labels[here], cap)[0]
            else:
                logp[here], unit[here] = value_and_grad(h[here], weight, labels[here], cap)
        if unit is not None:
            ctx.save_for_backward(unit)
        return logp

    @staticmethod
    def backward(ctx, dlogp):  # pyright: ignore[reportIncompatibleMethodOverride]
        # With create_graph=True a second derivative would treat `unit` as a constant and be wrong.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the fused cross-entropy has no second derivative; differentiate "
                "fastlora.functional with torch.func, which runs the reference."
            )
        (unit,) = ctx.saved_tensors
        return (dlogp[:, None] * unit).to(unit.dtype), None, None, None, None, None


def linear_logprobs(
    h: Float[Tensor, "n d"],
    weight: Float[Tensor, "v d"],
    labels: Int[Tensor, "n"],
    value: Callable = chunk_logprobs,
    value_and_grad: Callable = chunk_value_and_grad,
    cap: float | None = None,
) -> Float[Tensor, "n"]:
    """log softmax(h W')[i, labels[i]] of each row i in at least float32; 0 if the label is -100.

    Peak memory beyond the result: one chunk of logits (at most 2**27 elements, in the compute dtype
    and in float32) and one tensor of h's size. If `weight` requires a gradient, and under
    torch.func, the reference runs, which keeps every chunk.

    Args:
        h: inputs of the head.
        weight: the head's matrix.
        labels: in [0, v), or -100.
        value: `chunk_logprobs` or its compiled form.
        value_and_grad: `chunk_value_and_grad`, its compiled form, or `chunk_value_and_grad_kernel`.
        cap: logits z become cap * tanh(z / cap); None: they stay.

    Raises:
        RuntimeError: in the backward pass, if it is run with create_graph=True.
    """
    if needs_reference(weight):
        return linear_logprobs_reference(h, weight, labels, cap)
    return _LinearLogprobs.apply(h, weight, labels, value, value_and_grad, cap)  # pyright: ignore


# ── trained head ──────────────────────────────────────────────────────────────────────────
# The derivative of one log-probability by the head is as large as the head, so we cannot keep one
# per row. The backward pass recomputes each chunk's logits and weights their gradient with dlogp.
class _ChunkedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, labels, rows, logits_of, value, value_and_grad, n, *tensors):
        inputs, params = tensors[:n], tensors[n:]
        ctx.rows, ctx.logits_of, ctx.value_and_grad, ctx.n = rows, logits_of, value_and_grad, n
        ctx.save_for_backward(labels, *tensors)
        chunks = [slice(i, i + rows) for i in range(0, len(labels), rows)]
        logits = lambda here: logits_of(*(x[here] for x in inputs), *params)
        return torch.cat([value(logits(here), labels[here])[0] for here in chunks])

    @staticmethod
    def backward(ctx, dlogp):  # pyright: ignore[reportIncompatibleMethodOverride]
        labels, *tensors = ctx.saved_tensors

        def dlogits(logits: Tensor, here: slice) -> Tensor:
            unit = ctx.value_and_grad(logits, labels[here])[1]
            return unit * dlogp[here, None].to(unit.dtype)

        needs = ctx.needs_input_grad[6:]
        grads = sums_over_chunks(ctx.logits_of, dlogits, tensors, ctx.n, needs, ctx.rows)
        return None, None, None, None, None, None, *grads


def sums_over_chunks(
    logits_of: Callable[..., Float[Tensor, "n v"]],
    dlogits_of: Callable[[Tensor, slice], Tensor],
    tensors: Sequence[Tensor],
    n: int,
    needs: Sequence[bool],
    rows: int,
) -> list[Tensor | None]:
    """The gradients by `tensors`, chunk by chunk of rows, in their dtypes.

    Args:
        logits_of: (*tensors) -> logits of the rows in the first n of them.
        dlogits_of: (logits, rows) -> the gradient by these rows' logits, which it may overwrite.
        tensors: n tensors with one row per row of logits, then tensors that all rows share.
        n: number of tensors with rows.
        needs: for each tensor, whether its gradient is wanted; otherwise it is None.
        rows: per chunk.

    Raises:
        RuntimeError: under create_graph=True, because the sums are not differentiable.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the chunked cross-entropy has no second derivative; differentiate "
            "fastlora.functional with torch.func, which runs the reference."
        )
    leaf = lambda x, i: x.detach().requires_grad_(needs[i])
    params = [leaf(x, i) for i, x in enumerate(tensors) if i >= n]
    # Gradients of `params` are sums over all chunks. We add in at least float32, because in 16
    # bits a large partial sum absorbs small terms.
    wide = lambda x: torch.promote_types(x.dtype, torch.float32)
    sums = [
        (torch.empty_like(x) if i < n else torch.zeros_like(x, dtype=wide(x))) if needs[i] else None
        for i, x in enumerate(tensors)
    ]
    for start in range(0, len(tensors[0]), rows):
        here = slice(start, start + rows)
        leaves = [leaf(x[here], i) for i, x in enumerate(tensors[:n])] + params
        with torch.enable_grad():
            logits = logits_of(*leaves)
        dlogits = dlogits_of(logits.detach(), here)
        wanted = [i for i, needed in enumerate(needs) if needed]
        grads_here = torch.autograd.grad(
            logits, [leaves[i] for i in wanted], dlogits, materialize_grads=True
        )
        for i, grad in zip(wanted, grads_here, strict=True):
            total = sums[i]
            assert total is not None
            if i < n:
                total[here] = grad
            else:
                total += grad
    return [None if s is None else s.to(x) for s, x in zip(sums, tensors, strict=True)]


def chunked_logprobs(
    logits_of: Callable[..., Float[Tensor, "n v"]],
    inputs: Sequence[Float[Tensor, "n d"]],
    params: Sequence[Tensor],
    labels: Int[Tensor, "n"],
    vocab_size: int,
    value: Callable = label_logprobs,
    value_and_grad: Callable = label_logprobs_and_grad,
) -> Float[Tensor, "n"]:
    """log softmax(logits)[i, labels[i]] of each row i in at least float32; 0 if the label is -100.

    For trained heads: differentiable in `inputs` and `params`. Saves these and the labels for the
    backward pass. Peak memory beyond: one chunk of logits and, for each of `params`, a sum in at
    least float32. Under torch.func, and inside the caller's torch.compile, plain autograd runs,
    which keeps every chunk.

    Args:
        logits_of: (*inputs, *params) -> logits of any number of rows.
        inputs: tensors with one row per row of logits.
        params: tensors that all rows share.
        labels: in [0, v), or -100.
        vocab_size: v, which determines the number of rows per chunk.
        value: `label_logprobs` or its compiled form.
        value_and_grad: `label_logprobs_and_grad`, its compiled form, or
            `label_logprobs_and_grad_kernel`.

    Raises:
        RuntimeError: in the backward pass, if it is run with create_graph=True.
    """
    rows = rows_per_chunk(vocab_size)
    if transforms_active() or torch.compiler.is_compiling():
        starts = range(0, len(labels), rows)
        chunk = lambda i: logits_of(*(x[i : i + rows] for x in inputs), *params)
        return torch.cat([label_logprobs(chunk(i), labels[i : i + rows])[0] for i in starts])
    tensors = (*inputs, *params)
    return _ChunkedLogprobs.apply(  # pyright: ignore
        labels, rows, logits_of, value, value_and_grad, len(inputs), *tensors
    )
