"""Log-probability of each token's label under a head, without all logits in memory at once.

A frozen head needs one gradient per token, by the hidden state. A head with trained tensors needs
their gradients too, so its backward pass computes the logits of each chunk again
(ops/loss/linear_cross_entropy.py has both). The gradient of the entropy does so under every head
(ops/loss/entropy.py).
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastlora.models.head import (
    Head,
    divided,
    head_factors,
    is_frozen_product,
    logits,
    masked_for_head,
)
from fastlora.models.spec import Spec
from fastlora.ops.dispatch import transforms_active, use_kernel
from fastlora.ops.launch import Launch, launches_of
from fastlora.ops.loss.entropy import (
    chunked_logprobs_and_entropy,
    logits_gradient,
    logprobs_and_entropy,
)
from fastlora.ops.loss.linear_cross_entropy import (
    chunk_logprobs,
    chunk_value_and_grad,
    chunk_value_and_grad_kernel,
    chunked_logprobs,
    label_logprobs,
    label_logprobs_and_grad,
    label_logprobs_and_grad_kernel,
    linear_logprobs,
)
from fastlora.runtime.compiled import compiled, compiles


def head_logprobs(
    hidden: Float[Tensor, "n d"],
    model_head: Head,
    spec: Spec,
    labels: Int[Tensor, "n"],
    key: Int[Tensor, "..."] | None,
    first_row: Int[Tensor, "*pieces"] | None = None,
) -> Float[Tensor, "n"]:
    """log softmax(logits)[i, labels[i]] of each row i in at least float32; 0 if the label is -100.

    Args:
        hidden: the final norm's output.
        model_head: the result of `head`.
        spec: the model's.
        labels: in [0, v), or -100.
        key: the result of `decoder.dropout_key`.
        first_row: as in `dropout.dropout`.

    Raises:
        ValueError: spec.kernels is "triton" on a device that runs no Triton kernels.
    """
    kernel = use_kernel(hidden, spec.kernels)
    if is_frozen_product(model_head):
        return _frozen_head(hidden, model_head, spec, labels, kernel)
    return _trained_head(hidden, model_head, spec, labels, key, kernel, first_row)


def _frozen_head(
    hidden: Float[Tensor, "n d"],
    model_head: Head,
    spec: Spec,
    labels: Int[Tensor, "n"],
    kernel: bool,
) -> Float[Tensor, "n"]:
    value, value_and_grad = _regions(spec, hidden, chunk_logprobs, chunk_value_and_grad)
    # Only the gradient by the hidden states is needed. The forward pass computes it chunk by chunk,
    # so that the backward pass needs no logits.
    if kernel:
        value_and_grad = chunk_value_and_grad_kernel
    rows, weight = head_factors(hidden, model_head["weight"], spec)
    cap, rows = spec.config.logit_cap, divided(rows, spec)
    return linear_logprobs(rows, weight, labels, value, value_and_grad, cap)


def _trained_head(
    hidden: Float[Tensor, "n d"],
    model_head: Head,
    spec: Spec,
    labels: Int[Tensor, "n"],
    key: Int[Tensor, ""] | None,
    kernel: bool,
    first_row: Int[Tensor, "*pieces"] | None,
) -> Float[Tensor, "n"]:
    value, value_and_grad = _regions(spec, hidden, label_logprobs, label_logprobs_and_grad)
    if kernel:
        value_and_grad = label_logprobs_and_grad_kernel
    parts = _flat_head(hidden, model_head, spec, key, first_row)
    return chunked_logprobs(*parts, labels, spec.config.vocab_size, value, value_and_grad)


def loss_launches(spec: Spec, norm: Float[Tensor, "d"]) -> list[Launch]:
    """What `head_logprobs` launches if its gradient is needed, on any number of rows.

    Args:
        spec: the model's.
        norm: a tensor with the dtype and device of the hidden states.
    """
    if not use_kernel(norm, spec.kernels):
        return []
    with FakeTensorMode():
        logits = torch.empty(1, spec.config.vocab_size, dtype=norm.dtype, device=norm.device)
        labels = torch.empty(1, dtype=torch.int64, device=norm.device)
        return launches_of(label_logprobs_and_grad_kernel, logits, labels, spec.config.logit_cap)


def head_logprobs_and_entropy(
    hidden: Float[Tensor, "n d"],
    model_head: Head,
    spec: Spec,
    labels: Int[Tensor, "n"],
    key: Int[Tensor, "..."] | None,
    first_row: Int[Tensor, "*pieces"] | None = None,
) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"]]:
    """(`head_logprobs`, entropy of softmax(logits) of each row in nats; 0 if the label is -100).

    The arguments are those of `head_logprobs`. No Triton kernel computes the entropy.
    """
    value, gradient = _regions(spec, hidden, logprobs_and_entropy, logits_gradient)
    parts = _flat_head(hidden, model_head, spec, key, first_row)
    return chunked_logprobs_and_entropy(*parts, labels, spec.config.vocab_size, value, gradient)


def _flat_head(
    hidden: Float[Tensor, "n d"],
    model_head: Head,
    spec: Spec,
    key: Int[Tensor, "..."] | None,
    first_row: Int[Tensor, "*pieces"] | None,
) -> tuple[Callable[..., Tensor], tuple[Tensor, ...], list[Tensor]]:
    """(logits of rows and the head's tensors, the tensors with rows, those of the head).

    Tensors are passed flat, because each chunk is differentiated by them.
    """
    params, structure = tree_flatten(model_head)
    masked = masked_for_head(hidden, model_head, spec, key, first_row)
    # Without dropout both are one tensor, which is passed once: its gradient is computed once.
    inputs = (hidden,) if masked is hidden else (hidden, masked)

    def logits_of(*tensors: Tensor) -> Tensor:
        rows = tensors[: len(inputs)]
        tracked_head = tree_unflatten(tensors[len(inputs) :], structure)
        return logits(rows[0], rows[-1], tracked_head, spec)

    return logits_of, inputs, params


def _regions(spec: Spec, x: Tensor, *fns: Callable) -> tuple[Callable, ...]:
    """The functions, each as a compiled region if the spec says so."""
    if not compiles(spec.compile, x.device) or transforms_active():
        return fns

    def region(fn: Callable) -> Callable:
        return lambda *args: compiled(fn, _tensors(args), *args[len(_tensors(args)) :])

    return tuple(map(region, fns))


def _tensors(args: tuple) -> tuple[Tensor, ...]:
    """The tensors at the front of a region's arguments; numbers behind them are compiled in."""
    return tuple(x for x in args if isinstance(x, Tensor))
