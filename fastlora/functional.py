"""Pure functions of (adapter, base, spec, ...): what torch.func and torch.compile transform.

The adapter comes first, so that the first argument is the one to differentiate. Inside a
torch.func transform every op runs its plain reference; outside, compiled regions, fused ops and
recomputation as `spec` says. The values are the same.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from fastlora.models.decoder import dropout_key, hidden_states
from fastlora.models.head import Head, head, head_factors, is_plain, logits, masked_for_head
from fastlora.models.params import Adapter, Base
from fastlora.models.positions import segment_starts
from fastlora.models.self_contained import unpark_originals
from fastlora.models.spec import Spec
from fastlora.models.state import Batch, Seed
from fastlora.ops.dispatch import transforms_active, use_kernel
from fastlora.ops.loss.linear_cross_entropy import (
    IGNORE,
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


def forward(
    adapter: Adapter | None,
    base: Base,
    spec: Spec,
    input_ids: Int[Tensor, "b t"],
    *,
    attention_mask: Int[Tensor, "b t"] | None = None,
    position_ids: Int[Tensor, "#b t"] | None = None,
    segment_ids: Int[Tensor, "b t"] | None = None,
    adapter_ids: Int[Tensor, "b"] | None = None,
    seed: Seed = None,
) -> Float[Tensor, "b t v"]:
    """Logits, in the base's dtype.

    Args:
        adapter: what LoRA trains; None is the base model.
        base: frozen weights.
        spec: how to run them.
        input_ids: int64 in [0, v).
        attention_mask: 1 = real token; padding left or right.
        position_ids: default: restart with each segment, count real tokens, else 0, 1, 2, ...
        segment_ids: packed documents; attention is causal within a run of equal ids.
        adapter_ids: which of n adapters each row has, in [0, n): `adapter` is then a stack of them,
            every leaf [n, ...]. One pass, in which the base's products are the batch's; attention
            is written out (torch.vmap), so it holds [b, h, t, t] scores.
        seed: of the LoRA dropout masks; None is no dropout.
    """
    if adapter_ids is not None:
        own = tree_map(lambda x: x[adapter_ids], adapter)
        given = dict(
            attention_mask=attention_mask, position_ids=position_ids, segment_ids=segment_ids
        )
        optional = {name: x for name, x in given.items() if x is not None}
        return _row_by_row(own, base, spec, input_ids, optional, seed)
    base = base if adapter is not None else unpark_originals(base)
    hidden = hidden_states(
        adapter,
        base,
        spec,
        input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        segment_ids=segment_ids,
        seed=seed,
    )
    found = head(adapter, base, spec)
    key = dropout_key(spec, seed, hidden.device)
    return logits(hidden, masked_for_head(hidden, found, spec, key), found, spec)


def _row_by_row(
    adapters: Adapter,
    base: Base,
    spec: Spec,
    input_ids: Int[Tensor, "b t"],
    optional: dict[str, Tensor],
    seed: Seed,
) -> Float[Tensor, "b t v"]:
    """Logits of row i under the i-th adapter of a stack."""
    rows = {name: x.expand_as(input_ids) for name, x in optional.items()}  # position_ids: [1, t]

    def one(adapter: Adapter, ids: Tensor, rows: dict[str, Tensor]) -> Tensor:
        inputs = {name: x[None] for name, x in rows.items()}
        return forward(adapter, base, spec, ids[None], seed=seed, **inputs)[0]

    return torch.vmap(one)(adapters, input_ids, rows)


def token_logprobs(
    adapter: Adapter | None,
    base: Base,
    spec: Spec,
    input_ids: Int[Tensor, "b t"],
    labels: Int[Tensor, "b t"],
    *,
    attention_mask: Int[Tensor, "b t"] | None = None,
    position_ids: Int[Tensor, "#b t"] | None = None,
    segment_ids: Int[Tensor, "b t"] | None = None,
    seed: Seed = None,
) -> Float[Tensor, "b t"]:
    """Log-probability of labels[:, i] given the tokens before i; at least float32.

    0 at i = 0 and where the label is -100. The logits are never whole.

    Raises:
        ValueError: spec.kernels is "triton" where no Triton kernel can run.
    """
    kernel = use_kernel(input_ids, spec.kernels)
    base = base if adapter is not None else unpark_originals(base)
    hidden = hidden_states(
        adapter,
        base,
        spec,
        input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        segment_ids=segment_ids,
        seed=seed,
    )
    # Shift the labels, not the states: [b, t, d] stays contiguous, the last row is ignored.
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
    found = head(adapter, base, spec)
    choose = _frozen_head if is_plain(found) else _trained_head
    key = dropout_key(spec, seed, hidden.device)
    logp = choose(hidden.flatten(0, 1), found, spec, following.flatten(), key, kernel)
    return F.pad(logp.view(labels.shape)[:, :-1], (1, 0))


def _frozen_head(
    hidden: Float[Tensor, "n d"],
    found: Head,
    spec: Spec,
    labels: Int[Tensor, "n"],
    key: Int[Tensor, ""] | None,
    kernel: bool,
) -> Float[Tensor, "n"]:
    value, value_and_grad = _regions(spec, hidden, chunk_logprobs, chunk_value_and_grad)
    if kernel:
        value_and_grad = chunk_value_and_grad_kernel
    rows, weight = head_factors(hidden, found["weight"], spec)
    return linear_logprobs(rows, weight, labels, value, value_and_grad)


def _trained_head(
    hidden: Float[Tensor, "n d"],
    found: Head,
    spec: Spec,
    labels: Int[Tensor, "n"],
    key: Int[Tensor, ""] | None,
    kernel: bool,
) -> Float[Tensor, "n"]:
    value, value_and_grad = _regions(spec, hidden, label_logprobs, label_logprobs_and_grad)
    if kernel:
        value_and_grad = label_logprobs_and_grad_kernel
    params, structure = tree_flatten(found)
    dropped = masked_for_head(hidden, found, spec, key)
    inputs = (hidden,) if dropped is hidden else (hidden, dropped)

    def logits_of(*tensors: Tensor) -> Tensor:
        rows, own = tensors[: len(inputs)], tree_unflatten(tensors[len(inputs) :], structure)
        return logits(rows[0], rows[-1], own, spec)

    vocab_size = spec.config.vocab_size
    return chunked_logprobs(logits_of, inputs, params, labels, vocab_size, value, value_and_grad)


def _regions(spec: Spec, x: Tensor, *fns: Callable) -> tuple[Callable, ...]:
    """The functions, each a compiled region where the spec says so."""
    if not compiles(spec.compile, x.device) or transforms_active():
        return fns
    return tuple(lambda *args, fn=fn: compiled(fn, args) for fn in fns)


def loss_sum(
    adapter: Adapter | None, base: Base, spec: Spec, batch: Batch, *, seed: Seed = None
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """(sum of -log p over the trained tokens, their number): what gradient accumulation adds up."""
    labels = trained_labels(batch)
    optional = {k: batch.get(k) for k in ("attention_mask", "position_ids", "segment_ids")}
    logp = token_logprobs(adapter, base, spec, batch["input_ids"], labels, seed=seed, **optional)
    return -logp.sum(), (labels[:, 1:] != IGNORE).sum()


def loss(
    adapter: Adapter | None, base: Base, spec: Spec, batch: Batch, *, seed: Seed = None
) -> Float[Tensor, ""]:
    """Mean of -log p(label) over labels != -100, as Hugging Face's causal language models have it.

    With `segment_ids`, the first token of a document is no target: nothing before it is its own.
    A batch without a single target has loss 0.
    """
    total, count = loss_sum(adapter, base, spec, batch, seed=seed)
    return total / count.clamp(min=1)


def trained_labels(batch: Batch) -> Int[Tensor, "b t"]:
    """The batch's labels, with the first token of every packed document ignored."""
    if batch.get("segment_ids") is None:
        return batch["labels"]
    return torch.where(segment_starts(batch["segment_ids"]), IGNORE, batch["labels"])
