"""Pure functions of (adapter, base, spec, ...), which torch.func and torch.compile can transform.

The adapter comes first, because the first argument is the one that is differentiated. Compiled
regions, fused ops, kernels and recomputation are used as `spec` says, except under a torch.func
transform (grad, vmap, jvp, linearize, ...) or a level of torch.autograd.forward_ad. There every op
runs its differentiable reference: `compile`, `recompute` and `kernels` have no effect, attention
holds [b, h, t, t] scores, and all activations are kept. The values are the same up to rounding.
`spec.resolved(device)` returns the spec that runs here and now.

The adapter may be a stack of n adapters: every leaf is [n, ...] (`stack`). `adapter_ids` says which
adapter each row of the batch uses; without it, the first b / n rows use adapter 0, the next ones
adapter 1, and so on. All rows run in one pass; the base's products are those of the whole batch.
A stack of LoRA in the layers runs as fast as one adapter does. Other stacks (DoRA, lora_bias,
adapted or copied embeddings, fake quantisation, an initial offset), and all stacks under a
torch.func transform, run under torch.vmap: eagerly, with attention's reference, which holds
[b, h, t, t] scores, and with all activations kept.

Places of the decoder have names (models/capture.py): "embed", "layers.I.in", "layers.I.attn.out",
"layers.I.mlp.out", "layers.I.out" and "norm". `capture` returns the tensors there, and `add` adds
others to them. Gradients flow through both, at every recompute level; captured tensors stay in
memory. Calls without them run the same compiled graphs as before.

Under value_and_grad(fn, per_example=...) fn gets an adapter whose gradient is computed for each
example: row i, or the rows or tokens that `adapter_ids` gives the number i.

Each function checks the classes, names, shapes and dtypes of its arguments, but no values: reading
these would wait for the GPU. `Model`'s methods check values as well.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastlora.arguments import FLAG
from fastlora.errors import raise_problems
from fastlora.models.capture_checks import checked_inputs, needed_entries
from fastlora.models.context_part import context_part, context_problems, padding_problems
from fastlora.models.each_row import AdapterIds, Inputs, for_each_row
from fastlora.models.input_checks import entry_problems
from fastlora.models.outputs import part_logprobs, row_logits, row_logprobs
from fastlora.models.params import Adapter, Base
from fastlora.models.positions import segment_starts
from fastlora.models.spec import Spec
from fastlora.models.stacking import stack as stack
from fastlora.models.stacking import unstack as unstack
from fastlora.models.stacks import stack_size
from fastlora.models.state import Batch, Seed
from fastlora.ops.attention.context_group import ContextGroup
from fastlora.ops.loss.ignore import IGNORE
from fastlora.runtime.per_example import PerExample

# PerExample is what value_and_grad(per_example=...) passes to its function.
AnyAdapter = Adapter | PerExample | None

Embeds = Float[Tensor, "b t d"]
Added = dict[str, Float[Tensor, "..."]]


def forward(
    adapter: AnyAdapter,
    base: Base,
    spec: Spec,
    input_ids: Int[Tensor, "b t"] | None,
    *,
    attention_mask: Int[Tensor, "b t"] | None = None,
    position_ids: Int[Tensor, "#b t"] | None = None,
    segment_ids: Int[Tensor, "b t"] | None = None,
    adapter_ids: AdapterIds = None,
    seed: Seed = None,
    capture: Sequence[str] | None = None,
    add: Added | None = None,
    inputs_embeds: Embeds | None = None,
) -> Any:  # Float[Tensor, "b t v"]; with capture a pair
    """Logits, in the base's dtype; with `capture` (logits, {name: tensor [b, t, d]}).

    Args:
        adapter: the trained tensors, or a stack of adapters; None computes the base model.
        base: frozen weights.
        spec: how to run them.
        input_ids: int64 in [0, v); None with inputs_embeds.
        attention_mask: 1 = real token; padding left or right.
        position_ids: default: with segment_ids, positions restart in each segment; with an
            attention_mask, they count real tokens; else 0, 1, 2, ...
        segment_ids: packed documents; attention is causal within a run of equal ids.
        adapter_ids: of a stack: the number of each row's adapter, in [0, n), in any order, or of
            each token's, for packed documents. Ids on the CPU are read: equally many rows for each
            adapter run as batched products, which are faster.
        seed: of the LoRA dropout masks; None: without dropout. A stack may have one seed for each
            adapter, [n]: its rows then have the masks that they have in a batch without the rows of
            other adapters. With a single seed they have those of this batch under one adapter.
        capture: names of places. The tensors are in the base's dtype, in the batch's order, and
            include what `add` adds there; do not write to them. The logits have the same bits as
            without it, except in compiled layers with DoRA or experts in 16 bits, where attn.out
            and mlp.out are rounded once more.
        add: name of a place -> a floating-point tensor that broadcasts to [b, t, d], such as a
            steering vector [d]. The sum is rounded to the base's dtype.
        inputs_embeds: the input of the first layer, instead of embedded input_ids and NEFTune's
            noise, such as a soft prompt in front of F.embedding(ids, base["embed_tokens"]). It is
            cast to the base's dtype. Exactly one of input_ids and inputs_embeds is given.

    Raises:
        ValueError: an argument has a wrong class, shape, dtype or device, or a name is not one of a
            place.
    """
    inputs: Inputs = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        "segment_ids": segment_ids,
    }
    model, how = (adapter, base, spec), (seed, adapter_ids)
    places = capture, add, inputs_embeds
    inputs = checked_inputs("functional.forward", model, inputs, *how, *places)
    return for_each_row(partial(row_logits, capture=capture), *model, inputs, *how)


def token_logprobs(
    adapter: AnyAdapter,
    base: Base,
    spec: Spec,
    input_ids: Int[Tensor, "b t"] | None,
    labels: Int[Tensor, "b t"],
    *,
    attention_mask: Int[Tensor, "b t"] | None = None,
    position_ids: Int[Tensor, "#b t"] | None = None,
    segment_ids: Int[Tensor, "b t"] | None = None,
    adapter_ids: AdapterIds = None,
    seed: Seed = None,
    add: Added | None = None,
    inputs_embeds: Embeds | None = None,
    entropy: bool = False,
) -> Any:  # Float[Tensor, "b t"]; with entropy a pair
    """Log-probability of labels[:, i] given the tokens before i; float32 or wider.

    With `entropy` (log-probabilities, entropies [b, t]): entropy i is that of the distribution over
    the vocabulary of which log-probability i is one value, in nats. Both are 0 at i = 0 and where
    the label is -100, and both have gradients. The logits are computed in chunks of tokens, so that
    [b, t, v] never exists; with `entropy` the backward pass computes them again.

    Args:
        adapter: the trained tensors, or a stack of adapters; None computes the base model.
        base: frozen weights.
        spec: how to run them.
        input_ids: int64 in [0, v); None with inputs_embeds.
        labels: in [0, v), or -100.
        attention_mask: as `forward`.
        position_ids: as `forward`.
        segment_ids: as `forward`.
        adapter_ids: as `forward`.
        seed: as `forward`.
        add: as `forward`.
        inputs_embeds: as `forward`.
        entropy: whether to return the entropies too.

    Raises:
        ValueError: an argument has a wrong class, shape, dtype or device, or spec.kernels is
            "triton" on a device that runs no Triton kernels.
    """
    inputs: Inputs = {
        "input_ids": input_ids,
        "labels": labels,
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        "segment_ids": segment_ids,
    }
    model, how, places = (adapter, base, spec), (seed, adapter_ids), (None, add, inputs_embeds)
    flag, name = (entropy, FLAG), "functional.token_logprobs"
    inputs = checked_inputs(name, model, inputs, *how, *places, entropy=flag)
    return for_each_row(partial(row_logprobs, entropy=entropy), *model, inputs, *how)


def loss_sum(
    adapter: AnyAdapter,
    base: Base,
    spec: Spec,
    batch: Batch,
    *,
    adapter_ids: AdapterIds = None,
    seed: Seed = None,
    first_row: Int[Tensor, ""] | None = None,
    context: ContextGroup | None = None,
    add: Added | None = None,
    inputs_embeds: Embeds | None = None,
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """(sum of -log p over the trained tokens, their number), for gradient accumulation.

    With `context` both are of this rank's part of every row; add them, and the gradients, over the
    ranks.

    Args:
        adapter: the trained tensors, or a stack of adapters; None computes the base model.
        base: frozen weights.
        spec: how to run them.
        batch: "input_ids", "labels", and optionally the masks and ids of `forward`.
        adapter_ids: as `forward`.
        seed: as `forward`.
        first_row: of a part of a larger batch, the number of its first token in that batch: rows
            before it times their padded length. The part then has the dropout masks and the noise
            that it has in the larger batch. Not with a stack; None: 0.
        context: the result of `fastlora.context_group`: its ranks have every row together, and all
            of them must make this call with the same batch, of whole rows. Padding must be at the
            ends of rows or documents, with labels of -100; an attention_mask is read from the
            device to check it. Not with a stack, by example, under torch.func, in a CUDA graph, or
            with add and inputs_embeds. None: this process runs whole rows.
        add: as `forward`.
        inputs_embeds: as `forward`; the batch then has no input_ids.

    Raises:
        ValueError: as `token_logprobs`, and for missing or unknown entries of the batch.
    """
    model, how = (adapter, base, spec), (seed, adapter_ids, add, inputs_embeds)
    if context is not None:
        logp, following = _own_logprobs(model, batch, context, first_row, *how)
        return -logp.sum(), (following != IGNORE).sum()
    logp, labels = _batch_logprobs("functional.loss_sum", model, batch, *how, first_row=first_row)
    return -logp.sum(), (labels[:, 1:] != IGNORE).sum()


def loss(
    adapter: AnyAdapter,
    base: Base,
    spec: Spec,
    batch: Batch,
    *,
    adapter_ids: AdapterIds = None,
    seed: Seed = None,
    add: Added | None = None,
    inputs_embeds: Embeds | None = None,
) -> Float[Tensor, ""]:
    """Mean of -log p(label) over labels != -100, as in Hugging Face's causal language models.

    With `segment_ids`, the first token of each document is not trained: the tokens before it belong
    to another document. The loss of a batch without any trained token is 0.

    Args:
        adapter: the trained tensors, or a stack of adapters, over whose rows together the mean is;
            None computes the base model.
        base: frozen weights.
        spec: how to run them.
        batch: "input_ids", "labels", and optionally the masks and ids of `forward`.
        adapter_ids: as `forward`.
        seed: as `forward`.
        add: as `forward`.
        inputs_embeds: as `forward`; the batch then has no input_ids.

    Raises:
        ValueError: as `loss_sum`.
    """
    model, how = (adapter, base, spec), (seed, adapter_ids, add, inputs_embeds)
    logp, labels = _batch_logprobs("functional.loss", model, batch, *how)
    # A batch without trained tokens gives 0 / 1, with zero gradients, and not NaN.
    return -logp.sum() / (labels[:, 1:] != IGNORE).sum().clamp(min=1)


def row_losses(
    adapter: AnyAdapter,
    base: Base,
    spec: Spec,
    batch: Batch,
    *,
    adapter_ids: AdapterIds = None,
    seed: Seed = None,
    add: Added | None = None,
    inputs_embeds: Embeds | None = None,
) -> tuple[Float[Tensor, "b"], Int[Tensor, "b"]]:
    """(sum of -log p over the trained tokens, their number) of each row.

    Args:
        adapter: the trained tensors, or a stack of adapters; None computes the base model.
        base: frozen weights.
        spec: how to run them.
        batch: "input_ids", "labels", and optionally the masks and ids of `forward`.
        adapter_ids: as `forward`.
        seed: as `forward`.
        add: as `forward`.
        inputs_embeds: as `forward`; the batch then has no input_ids.

    Raises:
        ValueError: as `loss_sum`.
    """
    model, how = (adapter, base, spec), (seed, adapter_ids, add, inputs_embeds)
    logp, labels = _batch_logprobs("functional.row_losses", model, batch, *how)
    return -logp.sum(1), (labels[:, 1:] != IGNORE).sum(1)


def _batch_logprobs(
    function: str,
    model: tuple[AnyAdapter, Base, Spec],
    batch: Batch,
    seed: Seed,
    adapter_ids: AdapterIds,
    *places: Any,
    first_row: Int[Tensor, ""] | None = None,
) -> tuple[Float[Tensor, "b t"], Int[Tensor, "b t"]]:
    """(log-probabilities of the trained labels, these labels). `places`: add, inputs_embeds."""
    # First, because the other checks read the batch's input_ids.
    problems = entry_problems(batch, needed_entries(places[1]))
    raise_problems(ValueError, f"{function} cannot use this batch:", problems)
    how = seed, adapter_ids
    inputs = checked_inputs(function, model, batch, *how, None, *places)
    inputs["labels"] = labels = trained_labels(batch)
    if first_row is None:
        return for_each_row(row_logprobs, *model, inputs, *how), labels
    adapter, base, spec = model
    if isinstance(adapter, PerExample) or stack_size(adapter) is not None:
        raise ValueError(f"{function} takes first_row for one adapter, and not by example")
    return row_logprobs(adapter, base, spec, inputs, seed, first_row), labels


def _own_logprobs(
    model: tuple[AnyAdapter, Base, Spec],
    batch: Batch,
    context: ContextGroup,
    first_row: Int[Tensor, ""] | None,
    seed: Seed,
    adapter_ids: AdapterIds,
    *places: Any,
) -> tuple[Float[Tensor, "b t"], Int[Tensor, "b t"]]:
    """(log-probabilities of the labels that follow this rank's tokens, these labels)."""
    function, (adapter, base, spec) = "functional.loss_sum", model
    raise_problems(ValueError, f"{function} cannot use this batch:", entry_problems(batch))
    problems = context_problems(adapter, context, adapter_ids, *places)
    raise_problems(ValueError, f"{function} with context cannot do this:", problems)
    assert not isinstance(adapter, PerExample)
    inputs = checked_inputs(function, model, batch, seed, None)
    labels, mask = trained_labels(batch), inputs.get("attention_mask")
    problems = padding_problems(mask, inputs.get("segment_ids"), labels)
    raise_problems(ValueError, f"{function} with context cannot do this:", problems)
    part = context_part(inputs, labels, context, first_row)
    return part_logprobs(adapter, base, spec, part, seed), part.following


def trained_labels(batch: Batch) -> Int[Tensor, "b t"]:
    """The batch's labels, with -100 at the first token of every packed document."""
    if batch.get("segment_ids") is None:
        return batch["labels"]
    return torch.where(segment_starts(batch["segment_ids"]), IGNORE, batch["labels"])
