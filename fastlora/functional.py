"""Pure functions of (adapter, base, spec, ...), which torch.func and torch.compile can transform.

The adapter comes first, because the first argument is the one that is differentiated. Under a
torch.func transform every op runs its differentiable reference. Otherwise compiled regions, fused
ops and recomputation are used as `spec` says. The values are the same up to rounding.

The adapter may be a stack of n adapters: every leaf is [n, ...] (`stack`). `adapter_ids` says which
adapter each row of the batch uses; without it, the first b / n rows use adapter 0, the next ones
adapter 1, and so on. All rows run in one pass; the base's products are those of the whole batch.
A stack of LoRA in the layers runs as fast as one adapter does. Other stacks (DoRA, lora_bias,
adapted or copied embeddings, fake quantisation, an initial offset), and all stacks under a
torch.func transform, run under torch.vmap: eagerly, with attention's reference, which holds
[b, h, t, t] scores, and with all activations kept.

Each function checks the classes, names, shapes and dtypes of its arguments, but no values: reading
these would wait for the GPU. `Model`'s methods check values as well.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fastlora.errors import raise_problems
from fastlora.models.decoder import dropout_key, hidden_states
from fastlora.models.each_row import AdapterIds, Inputs, for_each_row
from fastlora.models.head import head, logits, masked_for_head
from fastlora.models.head_logprobs import head_logprobs
from fastlora.models.input_checks import check_call, entry_problems
from fastlora.models.params import Adapter, Base
from fastlora.models.positions import segment_starts
from fastlora.models.self_contained import unpark_originals
from fastlora.models.spec import Spec
from fastlora.models.stacking import stack as stack
from fastlora.models.stacking import unstack as unstack
from fastlora.models.stacks import StackRows
from fastlora.models.state import Batch, Seed
from fastlora.ops.loss.ignore import IGNORE


def forward(
    adapter: Adapter | None,
    base: Base,
    spec: Spec,
    input_ids: Int[Tensor, "b t"],
    *,
    attention_mask: Int[Tensor, "b t"] | None = None,
    position_ids: Int[Tensor, "#b t"] | None = None,
    segment_ids: Int[Tensor, "b t"] | None = None,
    adapter_ids: AdapterIds = None,
    seed: Seed = None,
) -> Float[Tensor, "b t v"]:
    """Logits, in the base's dtype.

    Args:
        adapter: the trained tensors, or a stack of adapters; None computes the base model.
        base: frozen weights.
        spec: how to run them.
        input_ids: int64 in [0, v).
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

    Raises:
        ValueError: an argument has a wrong class, shape or dtype.
    """
    inputs: Inputs = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        "segment_ids": segment_ids,
    }
    check_call("functional.forward", adapter, base, spec, inputs, seed, adapter_ids)
    return for_each_row(_logits, adapter, base, spec, inputs, seed, adapter_ids)


def _logits(
    adapter: Adapter | None,
    base: Base,
    spec: Spec,
    inputs: Inputs,
    seed: Seed,
    first_row: Int[Tensor, ""] | None = None,
    rows: StackRows | None = None,
) -> Float[Tensor, "b t v"]:
    # Parked originals are tensors of which the adapter has copies. Without it they are needed.
    base = base if adapter is not None else unpark_originals(base)
    hidden = hidden_states(
        adapter, base, spec, **_known(inputs), seed=seed, first_row=first_row, rows=rows
    )
    model_head = head(adapter, base, spec)
    key = dropout_key(spec, seed, hidden.device)
    masked = masked_for_head(hidden, model_head, spec, key, first_row)
    return logits(hidden, masked, model_head, spec)


def _known(inputs: Inputs) -> dict[str, Tensor]:
    return {name: x for name, x in inputs.items() if x is not None and name != "labels"}


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
    adapter_ids: AdapterIds = None,
    seed: Seed = None,
) -> Float[Tensor, "b t"]:
    """Log-probability of labels[:, i] given the tokens before i; float32 or wider.

    It is 0 at i = 0 and where the label is -100. The logits are computed in chunks of tokens, so
    that [b, t, v] never exists.

    Args:
        adapter: the trained tensors, or a stack of adapters; None computes the base model.
        base: frozen weights.
        spec: how to run them.
        input_ids: int64 in [0, v).
        labels: in [0, v), or -100.
        attention_mask: as `forward`.
        position_ids: as `forward`.
        segment_ids: as `forward`.
        adapter_ids: as `forward`.
        seed: as `forward`.

    Raises:
        ValueError: an argument has a wrong class, shape or dtype, or spec.kernels is "triton" on a
            device that runs no Triton kernels.
    """
    inputs: Inputs = {
        "input_ids": input_ids,
        "labels": labels,
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        "segment_ids": segment_ids,
    }
    check_call("functional.token_logprobs", adapter, base, spec, inputs, seed, adapter_ids)
    return for_each_row(_token_logprobs, adapter, base, spec, inputs, seed, adapter_ids)


def _token_logprobs(
    adapter: Adapter | None,
    base: Base,
    spec: Spec,
    inputs: Inputs,
    seed: Seed,
    first_row: Int[Tensor, ""] | None = None,
    rows: StackRows | None = None,
) -> Float[Tensor, "b t"]:
    base, labels = base if adapter is not None else unpark_originals(base), inputs["labels"]
    assert labels is not None
    hidden = hidden_states(
        adapter, base, spec, **_known(inputs), seed=seed, first_row=first_row, rows=rows
    )
    # Shift the labels, not the states: [b, t, d] stays contiguous. The last position is ignored.
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
    model_head = head(adapter, base, spec)
    key = dropout_key(spec, seed, hidden.device)
    logp = head_logprobs(
        hidden.flatten(0, 1), model_head, spec, following.flatten(), key, first_row
    )
    return F.pad(logp.view(labels.shape)[:, :-1], (1, 0))


def loss_sum(
    adapter: Adapter | None,
    base: Base,
    spec: Spec,
    batch: Batch,
    *,
    adapter_ids: AdapterIds = None,
    seed: Seed = None,
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """(sum of -log p over the trained tokens, their number), for gradient accumulation.

    Args:
        adapter: the trained tensors, or a stack of adapters; None computes the base model.
        base: frozen weights.
        spec: how to run them.
        batch: "input_ids", "labels", and optionally the masks and ids of `forward`.
        adapter_ids: as `forward`.
        seed: as `forward`.

    Raises:
        ValueError: as `token_logprobs`, and for missing or unknown entries of the batch.
    """
    model = adapter, base, spec
    logp, labels = _batch_logprobs("functional.loss_sum", *model, batch, seed, adapter_ids)
    return -logp.sum(), (labels[:, 1:] != IGNORE).sum()


def loss(
    adapter: Adapter | None,
    base: Base,
    spec: Spec,
    batch: Batch,
    *,
    adapter_ids: AdapterIds = None,
    seed: Seed = None,
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

    Raises:
        ValueError: as `loss_sum`.
    """
    model = adapter, base, spec
    logp, labels = _batch_logprobs("functional.loss", *model, batch, seed, adapter_ids)
    # A batch without trained tokens gives 0 / 1, with zero gradients, and not NaN.
    return -logp.sum() / (labels[:, 1:] != IGNORE).sum().clamp(min=1)


def row_losses(
    adapter: Adapter | None,
    base: Base,
    spec: Spec,
    batch: Batch,
    *,
    adapter_ids: AdapterIds = None,
    seed: Seed = None,
) -> tuple[Float[Tensor, "b"], Int[Tensor, "b"]]:
    """(sum of -log p over the trained tokens, their number) of each row.

    Args:
        adapter: the trained tensors, or a stack of adapters; None computes the base model.
        base: frozen weights.
        spec: how to run them.
        batch: "input_ids", "labels", and optionally the masks and ids of `forward`.
        adapter_ids: as `forward`.
        seed: as `forward`.

    Raises:
        ValueError: as `loss_sum`.
    """
    model = adapter, base, spec
    logp, labels = _batch_logprobs("functional.row_losses", *model, batch, seed, adapter_ids)
    return -logp.sum(1), (labels[:, 1:] != IGNORE).sum(1)


def _batch_logprobs(
    function: str,
    adapter: Adapter | None,
    base: Base,
    spec: Spec,
    batch: Batch,
    seed: Seed,
    adapter_ids: AdapterIds,
) -> tuple[Float[Tensor, "b t"], Int[Tensor, "b t"]]:
    """(log-probabilities of the trained labels, these labels)."""
    # First, because check_call reads the batch's input_ids.
    raise_problems(ValueError, f"{function} cannot use this batch:", entry_problems(batch))
    check_call(function, adapter, base, spec, batch, seed, adapter_ids)
    labels = trained_labels(batch)
    inputs: Inputs = {**batch, "labels": labels}
    return for_each_row(_token_logprobs, adapter, base, spec, inputs, seed, adapter_ids), labels


def trained_labels(batch: Batch) -> Int[Tensor, "b t"]:
    """The batch's labels, with -100 at the first token of every packed document."""
    if batch.get("segment_ids") is None:
        return batch["labels"]
    return torch.where(segment_starts(batch["segment_ids"]), IGNORE, batch["labels"])
