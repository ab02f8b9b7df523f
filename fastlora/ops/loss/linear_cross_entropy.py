"""Log-probability of each row's label under softmax(h W'), the logits never whole.

Forming the gradient beside the loss, chunk by chunk, while the logits are there, is the idea of
Liger-Kernel's fused linear cross-entropy (Hsu et al. 2024, arXiv:2410.10989). Here it is kept per
row, so that any function of the log-probabilities differentiates through it:

    logp_i = z_i[label_i] - lse(z_i),  z_i = W h_i,  d logp_i / d h_i = W' (onehot_i - softmax z_i)
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastlora.ops.dispatch import plain, transforms_active

IGNORE = -100


# Of logits; 256 MiB in 16 bits. At v = 128,256: 1,024 rows a chunk, whose products run at 734 and
# 809 TFLOP/s there and back, where those of 512 rows run at 671 and 771 (H100, d = 2048).
_CHUNK_ELEMENTS = 2**27


def rows_per_chunk(vocab_size: int) -> int:
    """A power of two that keeps a chunk of logits at 2**27 elements or less; only shapes decide."""
    return 1 << max(0, (_CHUNK_ELEMENTS // vocab_size).bit_length() - 1)


def label_logprobs(
    logits: Float[Tensor, "n v"], labels: Int[Tensor, "n"]
) -> tuple[Float[Tensor, "n"], Float[Tensor, "n v"]]:
    """(log-probabilities in at least float32, 0 where ignored; log-softmax) of a chunk of rows."""
    logsoftmax = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    index = labels.clamp(min=0)[:, None]
    return torch.where(labels == IGNORE, 0.0, logsoftmax.gather(1, index)[:, 0]), logsoftmax


def label_logprobs_and_grad(
    logits: Float[Tensor, "n v"], labels: Int[Tensor, "n"]
) -> tuple[Float[Tensor, "n"], Float[Tensor, "n v"]]:
    """A chunk's log-probabilities, and the derivative of each by its row of logits, in their dtype.

    May write over the logits.
    """
    logp, logsoftmax = label_logprobs(logits, labels)
    columns = torch.arange(logits.shape[1], dtype=torch.int32, device=logits.device)
    onehot = (columns == labels[:, None].int()).to(logsoftmax.dtype)
    dlogits = torch.where((labels == IGNORE)[:, None], 0.0, onehot - logsoftmax.exp())
    return logp, dlogits.to(logits.dtype)


def label_logprobs_and_grad_kernel(
    logits: Float[Tensor, "n v"], labels: Int[Tensor, "n"]
) -> tuple[Float[Tensor, "n"], Float[Tensor, "n v"]]:
    """label_logprobs_and_grad in one Triton kernel, in the logits' own memory."""
    from fastlora.ops.loss.softmax_kernel import logprobs_and_dlogits_  # noqa: PLC0415  imports triton

    return logprobs_and_dlogits_(logits, labels, IGNORE)


# ── a head that is frozen ─────────────────────────────────────────────────────────────────
def chunk_logprobs(
    h: Float[Tensor, "n d"], weight: Float[Tensor, "v d"], labels: Int[Tensor, "n"]
) -> tuple[Float[Tensor, "n"], Float[Tensor, "n v"]]:
    """`label_logprobs` of the logits of a chunk of rows."""
    return label_logprobs(h @ weight.t(), labels)


def linear_logprobs_reference(
    h: Float[Tensor, "n d"], weight: Float[Tensor, "v d"], labels: Int[Tensor, "n"]
) -> Float[Tensor, "n"]:
    """The specification: differentiable in h and weight any number of times; keeps the logits."""
    rows = rows_per_chunk(weight.shape[0])
    chunks = zip(h.split(rows), labels.split(rows), strict=True)
    return torch.cat([chunk_logprobs(x, weight, y)[0] for x, y in chunks])


def chunk_value_and_grad(
    h: Float[Tensor, "n d"], weight: Float[Tensor, "v d"], labels: Int[Tensor, "n"]
) -> tuple[Float[Tensor, "n"], Float[Tensor, "n d"]]:
    """One chunk's log-probabilities, and the derivative of each by its own row of h, in h.dtype."""
    logp, dlogits = label_logprobs_and_grad(h @ weight.t(), labels)
    return logp, dlogits @ weight


def chunk_value_and_grad_kernel(
    h: Float[Tensor, "n d"], weight: Float[Tensor, "v d"], labels: Int[Tensor, "n"]
) -> tuple[Float[Tensor, "n"], Float[Tensor, "n d"]]:
    """chunk_value_and_grad with softmax and its gradient in one Triton kernel, between products."""
    logp, dlogits = label_logprobs_and_grad_kernel(h @ weight.t(), labels)
    return logp, dlogits @ weight


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, weight, labels, value, value_and_grad):
        rows = rows_per_chunk(weight.shape[0])
        logp = h.new_empty(h.shape[0], dtype=torch.promote_types(h.dtype, torch.float32))
        unit = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        for start in range(0, h.shape[0], rows):
            here = slice(start, start + rows)
            if unit is None:
                logp[here] = value(h[here], weight, labels[here])[0]
            else:
                logp[here], unit[here] = value_and_grad(h[here], weight, labels[here])
        if unit is not None:
            ctx.save_for_backward(unit)
        return logp

    @staticmethod
    def backward(ctx, dlogp):  # pyright: ignore[reportIncompatibleMethodOverride]
        if torch.is_grad_enabled():  # create_graph=True, but `unit` is a constant and would lie
            raise RuntimeError(
                "the fused cross-entropy has no second derivative; differentiate "
                "fastlora.functional with torch.func, which runs the plain one."
            )
        (unit,) = ctx.saved_tensors
        return (dlogp[:, None] * unit).to(unit.dtype), None, None, None, None


def linear_logprobs(
    h: Float[Tensor, "n d"],
    weight: Float[Tensor, "v d"],
    labels: Int[Tensor, "n"],
    value: Callable = chunk_logprobs,
    value_and_grad: Callable = chunk_value_and_grad,
) -> Float[Tensor, "n"]:
    """log softmax(h W')[i, labels[i]] per row, 0 where the label is -100; at least float32.

    Peak memory beyond the result is one chunk of logits (at most 2**27 elements in the compute
    dtype and in float32) and one tensor like h. weight receives no gradient, unless it asks for
    one: then, and under torch.func, the reference runs, which keeps every chunk.

    Args:
        h: rows to classify.
        weight: the head.
        labels: in [0, v), or -100.
        value: chunk_logprobs or its compiled form.
        value_and_grad: chunk_value_and_grad, its compiled form, or chunk_value_and_grad_kernel.
    """
    if plain(weight):
        return linear_logprobs_reference(h, weight, labels)
    return _LinearLogprobs.apply(h, weight, labels, value, value_and_grad)  # pyright: ignore


# ── a head that is trained ────────────────────────────────────────────────────────────────
# The derivative of each log-probability by the head is as large as the head, so it cannot be kept
# for every row: the backward pass forms each chunk's logits again, once it knows their weights.
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
        if torch.is_grad_enabled():  # create_graph=True, but what follows is not differentiable
            raise RuntimeError(
                "the chunked cross-entropy has no second derivative; differentiate "
                "fastlora.functional with torch.func, which runs the plain one."
            )
        labels, *tensors = ctx.saved_tensors
        needs = ctx.needs_input_grad[6:]
        leaf = lambda x, i: x.detach().requires_grad_(needs[i])
        params = [leaf(x, i) for i, x in enumerate(tensors) if i >= ctx.n]
        # Sums over all rows, in at least float32: chunk by chunk a narrow one would lose the small.
        wide = lambda x: torch.promote_types(x.dtype, torch.float32)
        sums = [
            (torch.empty_like(x) if i < ctx.n else torch.zeros_like(x, dtype=wide(x)))
            if needs[i]
            else None
            for i, x in enumerate(tensors)
        ]
        for start in range(0, len(labels), ctx.rows):
            here = slice(start, start + ctx.rows)
            leaves = [leaf(x[here], i) for i, x in enumerate(tensors[: ctx.n])] + params
            with torch.enable_grad():
                logits = ctx.logits_of(*leaves)
            _, dlogits = ctx.value_and_grad(logits.detach(), labels[here])
            dlogits = dlogits * dlogp[here, None].to(dlogits.dtype)
            wanted = [i for i, needed in enumerate(needs) if needed]
            found = torch.autograd.grad(
                logits, [leaves[i] for i in wanted], dlogits, materialize_grads=True
            )
            for i, grad in zip(wanted, found, strict=True):
                total = sums[i]
                assert total is not None
                if i < ctx.n:
                    total[here] = grad
                else:
                    total += grad
        grads = [None if s is None else s.to(x) for s, x in zip(sums, tensors, strict=True)]
        return None, None, None, None, None, None, *grads


def chunked_logprobs(
    logits_of: Callable[..., Float[Tensor, "n v"]],
    inputs: Sequence[Float[Tensor, "n d"]],
    params: Sequence[Tensor],
    labels: Int[Tensor, "n"],
    vocab_size: int,
    value: Callable = label_logprobs,
    value_and_grad: Callable = label_logprobs_and_grad,
) -> Float[Tensor, "n"]:
    """log softmax(logits)[i, labels[i]] per row, 0 where the label is -100; at least float32.

    For heads that are trained: differentiable in `inputs` and `params`. Keeps these and labels;
    peak memory beyond is one chunk of logits and, for each of `params`, a sum in at least float32.
    Under torch.func, and inside somebody's torch.compile, the plain way runs, which keeps every
    chunk.

    Args:
        logits_of: (*inputs, *params) -> logits of any number of rows.
        inputs: tensors that have one row for each of the logits'.
        params: tensors that all rows share.
        labels: in [0, v), or -100.
        vocab_size: v; only this decides how many rows a chunk has.
        value: label_logprobs or its compiled form.
        value_and_grad: label_logprobs_and_grad, its compiled form, or ..._kernel.
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
