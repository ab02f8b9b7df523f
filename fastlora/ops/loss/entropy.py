"""Log-probability of each row's label and entropy of its distribution, in chunks of rows.

    H_i = -sum_j p_j log p_j,  p = softmax z_i,  d H_i / d z_j = -p_j (log p_j + H_i)

Keeping both gradients of every row would take two tensors of the hidden states' size. The backward
pass computes the logits of each chunk again instead, as that of a trained head does.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastlora.ops.dispatch import transforms_active
from fastlora.ops.loss.ignore import IGNORE
from fastlora.ops.loss.linear_cross_entropy import (
    label_logprobs,
    rows_per_chunk,
    sums_over_chunks,
)


def logprobs_and_entropy(
    logits: Float[Tensor, "n v"], labels: Int[Tensor, "n"]
) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"]]:
    """(log-probability of each row's label, entropy of the row in nats), in at least float32.

    Rows with the label -100 get 0 for both.
    """
    logp, logsoftmax = label_logprobs(logits, labels)
    entropy = -(logsoftmax.exp() * logsoftmax).sum(-1)
    return logp, torch.where(labels == IGNORE, 0.0, entropy)


def logits_gradient(
    logits: Float[Tensor, "n v"],
    labels: Int[Tensor, "n"],
    dlogp: Float[Tensor, "n"],
    dentropy: Float[Tensor, "n"],
) -> Float[Tensor, "n v"]:
    """The gradient by the logits, in their dtype, from those by `logprobs_and_entropy`'s results.

    May overwrite the logits when compiled.
    """
    logsoftmax = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    p = logsoftmax.exp()
    entropy = -(p * logsoftmax).sum(-1, keepdim=True)
    # Elementwise and not a scatter, so that Inductor can fuse it with the softmax.
    columns = torch.arange(logits.shape[1], dtype=torch.int32, device=logits.device)
    onehot = (columns == labels[:, None].int()).to(logsoftmax.dtype)
    dlogits = dlogp[:, None] * (onehot - p) - dentropy[:, None] * p * (logsoftmax + entropy)
    return torch.where((labels == IGNORE)[:, None], 0.0, dlogits).to(logits.dtype)


class _ChunkedEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, labels, rows, logits_of, value, gradient, n, *tensors):
        ctx.rows, ctx.logits_of, ctx.gradient, ctx.n = rows, logits_of, gradient, n
        ctx.save_for_backward(labels, *tensors)
        ctx.set_materialize_grads(True)
        chunks = [slice(i, i + rows) for i in range(0, len(labels), rows)]
        logits = lambda here: logits_of(*(x[here] for x in tensors[:n]), *tensors[n:])
        logp, entropy = zip(*(value(logits(here), labels[here]) for here in chunks), strict=True)
        return torch.cat(logp), torch.cat(entropy)

    @staticmethod
    def backward(ctx, dlogp, dentropy):  # pyright: ignore[reportIncompatibleMethodOverride]
        labels, *tensors = ctx.saved_tensors

        def dlogits(logits: Tensor, here: slice) -> Tensor:
            return ctx.gradient(logits, labels[here], dlogp[here], dentropy[here])

        needs = ctx.needs_input_grad[6:]
        grads = sums_over_chunks(ctx.logits_of, dlogits, tensors, ctx.n, needs, ctx.rows)
        return None, None, None, None, None, None, *grads


def chunked_logprobs_and_entropy(
    logits_of: Callable[..., Float[Tensor, "n v"]],
    inputs: Sequence[Float[Tensor, "n d"]],
    params: Sequence[Tensor],
    labels: Int[Tensor, "n"],
    vocab_size: int,
    value: Callable = logprobs_and_entropy,
    gradient: Callable = logits_gradient,
) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"]]:
    """`logprobs_and_entropy` of the logits of any number of rows, differentiable in both results.

    The arguments are those of `chunked_logprobs`, and so are the memory, the behaviour under
    torch.func and the errors; `value` and `gradient` are the functions above or their compiled
    forms.

    Raises:
        RuntimeError: in the backward pass, if it is run with create_graph=True.
    """
    rows = rows_per_chunk(vocab_size)
    if transforms_active() or torch.compiler.is_compiling():
        starts = range(0, len(labels), rows)
        chunk = lambda i: logits_of(*(x[i : i + rows] for x in inputs), *params)
        pairs = [logprobs_and_entropy(chunk(i), labels[i : i + rows]) for i in starts]
        logp, entropy = zip(*pairs, strict=True)
        return torch.cat(logp), torch.cat(entropy)
    tensors = (*inputs, *params)
    return _ChunkedEntropy.apply(  # pyright: ignore
        labels, rows, logits_of, value, gradient, len(inputs), *tensors
    )
