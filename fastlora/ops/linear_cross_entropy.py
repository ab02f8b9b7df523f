"""Log-probability of each row's label under softmax(h W'), the logits never whole.

Forming the gradient beside the loss, chunk by chunk, while the logits are there, is the idea of
Liger-Kernel's fused linear cross-entropy (Hsu et al. 2024, arXiv:2410.10989). Here it is kept per
row, so that any function of the log-probabilities differentiates through it:

    logp_i = z_i[label_i] - lse(z_i),  z_i = W h_i,  d logp_i / d h_i = W' (onehot_i - softmax z_i)
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastlora.ops.dispatch import plain

IGNORE = -100
_CHUNK_ELEMENTS = 2**26  # of logits; 256 MiB in float32. At v = 128,256: 512 rows a chunk


def rows_per_chunk(vocab_size: int) -> int:
    """A power of two that keeps a chunk of logits at 2**26 elements or less; only shapes decide."""
    return 1 << max(0, (_CHUNK_ELEMENTS // vocab_size).bit_length() - 1)


def chunk_logprobs(
    h: Float[Tensor, "n d"], weight: Float[Tensor, "v d"], labels: Int[Tensor, "n"]
) -> tuple[Float[Tensor, "n"], Float[Tensor, "n v"]]:
    """(log-probabilities in at least float32, 0 where ignored; log-softmax) of a chunk of rows."""
    logits = h @ weight.t()
    logsoftmax = logits.to(torch.promote_types(h.dtype, torch.float32)).log_softmax(-1)
    index = labels.clamp(min=0)[:, None]
    return torch.where(labels == IGNORE, 0.0, logsoftmax.gather(1, index)[:, 0]), logsoftmax


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
    logp, logsoftmax = chunk_logprobs(h, weight, labels)
    columns = torch.arange(weight.shape[0], dtype=torch.int32, device=h.device)
    onehot = (columns == labels[:, None].int()).to(logsoftmax.dtype)
    dlogits = torch.where((labels == IGNORE)[:, None], 0.0, onehot - logsoftmax.exp())
    return logp, dlogits.to(h.dtype) @ weight


def chunk_value_and_grad_kernel(
    h: Float[Tensor, "n d"], weight: Float[Tensor, "v d"], labels: Int[Tensor, "n"]
) -> tuple[Float[Tensor, "n"], Float[Tensor, "n d"]]:
    """chunk_value_and_grad with softmax and its gradient in one Triton kernel, between products."""
    from fastlora.ops.softmax_kernel import logprobs_and_dlogits_  # noqa: PLC0415  imports triton

    logp, dlogits = logprobs_and_dlogits_(h @ weight.t(), labels, IGNORE)
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

    Peak memory beyond the result is one chunk of logits (at most 2**26 elements in the compute
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
