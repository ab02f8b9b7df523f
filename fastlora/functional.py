"""Pure functions of (adapter, base, spec, ...), which torch.func and torch.compile can transform.

The adapter comes first, because the first argument is the one that is differentiated. Under a
torch.func transform every op runs its differentiable reference. Otherwise compiled regions, fused
ops and recomputation are used as `spec` says. The values are the same up to rounding.

Each function checks the classes, names, shapes and dtypes of its arguments, but no values: reading
these would wait for the GPU. `Model`'s methods check values as well.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils._pytree import tree_map

from fastlora.errors import raise_problems
from fastlora.models.decoder import dropout_key, hidden_states
from fastlora.models.head import head, logits, masked_for_head
from fastlora.models.head_logprobs import head_logprobs
from fastlora.models.input_checks import check_call, entry_problems
from fastlora.models.params import Adapter, Base
from fastlora.models.positions import segment_starts
from fastlora.models.self_contained import unpark_originals
from fastlora.models.spec import Spec
from fastlora.models.state import Batch, Seed
from fastlora.ops.loss.linear_cross_entropy import IGNORE


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
        adapter: the trained tensors; None computes the base model.
        base: frozen weights.
        spec: how to run them.
        input_ids: int64 in [0, v).
        attention_mask: 1 = real token; padding left or right.
        position_ids: default: with segment_ids, positions restart in each segment; with an
            attention_mask, they count real tokens; else 0, 1, 2, ...
        segment_ids: packed documents; attention is causal within a run of equal ids.
        adapter_ids: the number of each row's adapter, in [0, n). `adapter` is then a stack of n
            adapters: every leaf is [n, ...]. All rows run in one pass, in which the base's products
            are those of the whole batch. Attention runs under torch.vmap, as its reference, which
            holds [b, h, t, t] scores. Each row has the dropout masks that it would have without
            adapter_ids.
        seed: of the LoRA dropout masks; None: without dropout.

    Raises:
        ValueError: an argument has a wrong class, shape or dtype.
    """
    optional = {
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        "segment_ids": segment_ids,
    }
    inputs = {"input_ids": input_ids, **optional}
    check_call("functional.forward", adapter, base, spec, inputs, seed, adapter_ids)
    if adapter is not None and adapter_ids is not None:
        # One adapter per row: 45 MB each in float32 for rank 16 on all projections of Llama 3.2 1B.
        row_adapters = tree_map(lambda x: x[adapter_ids], adapter)
        given = {name: x for name, x in optional.items() if x is not None}
        return _row_by_row(row_adapters, base, spec, input_ids, given, seed)
    return _forward(adapter, base, spec, input_ids, optional, seed)


def _forward(
    adapter: Adapter | None,
    base: Base,
    spec: Spec,
    input_ids: Int[Tensor, "b t"],
    optional: dict[str, Tensor | None],
    seed: Seed,
    first_row: Int[Tensor, ""] | None = None,
) -> Float[Tensor, "b t v"]:
    # Parked originals are tensors of which the adapter has copies. Without it they are needed.
    base = base if adapter is not None else unpark_originals(base)
    hidden = hidden_states(
        adapter, base, spec, input_ids, seed=seed, first_row=first_row, **optional
    )
    model_head = head(adapter, base, spec)
    key = dropout_key(spec, seed, hidden.device)
    masked = masked_for_head(hidden, model_head, spec, key, first_row)
    return logits(hidden, masked, model_head, spec)


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
    # Dropout masks have one row per token of the batch.
    first_rows = torch.arange(len(input_ids), device=input_ids.device) * input_ids.shape[1]

    def one(adapter: Adapter, ids: Tensor, rows: dict[str, Tensor], first_row: Tensor) -> Tensor:
        inputs: dict[str, Tensor | None] = {name: x[None] for name, x in rows.items()}
        return _forward(adapter, base, spec, ids[None], inputs, seed, first_row)[0]

    return torch.vmap(one)(adapters, input_ids, rows, first_rows)


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
    """Log-probability of labels[:, i] given the tokens before i; float32 or wider.

    It is 0 at i = 0 and where the label is -100. The logits are computed in chunks of tokens, so
    that [b, t, v] never exists.

    Args:
        adapter: the trained tensors; None computes the base model.
        base: frozen weights.
        spec: how to run them.
        input_ids: int64 in [0, v).
        labels: in [0, v), or -100.
        attention_mask: as `forward`.
        position_ids: as `forward`.
        segment_ids: as `forward`.
        seed: as `forward`.

    Raises:
        ValueError: an argument has a wrong class, shape or dtype, or spec.kernels is "triton" on a
            device that runs no Triton kernels.
    """
    optional = {
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        "segment_ids": segment_ids,
    }
    inputs = {"input_ids": input_ids, "labels": labels, **optional}
    check_call("functional.token_logprobs", adapter, base, spec, inputs, seed)
    return _token_logprobs(adapter, base, spec, input_ids, labels, optional, seed)


def _token_logprobs(
    adapter: Adapter | None,
    base: Base,
    spec: Spec,
    input_ids: Int[Tensor, "b t"],
    labels: Int[Tensor, "b t"],
    optional: dict[str, Tensor | None],
    seed: Seed,
) -> Float[Tensor, "b t"]:
    base = base if adapter is not None else unpark_originals(base)
    hidden = hidden_states(adapter, base, spec, input_ids, seed=seed, **optional)
    # Shift the labels, not the states: [b, t, d] stays contiguous. The last position is ignored.
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
    model_head = head(adapter, base, spec)
    key = dropout_key(spec, seed, hidden.device)
    logp = head_logprobs(hidden.flatten(0, 1), model_head, spec, following.flatten(), key)
    return F.pad(logp.view(labels.shape)[:, :-1], (1, 0))


def loss_sum(
    adapter: Adapter | None, base: Base, spec: Spec, batch: Batch, *, seed: Seed = None
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """(sum of -log p over the trained tokens, their number), for gradient accumulation.

    Args:
        adapter: the trained tensors; None computes the base model.
        base: frozen weights.
        spec: how to run them.
        batch: "input_ids", "labels", and optionally the masks and ids of `forward`.
        seed: of the LoRA dropout masks; None: without dropout.

    Raises:
        ValueError: as `token_logprobs`, and for missing or unknown entries of the batch.
    """
    return _loss_sum("functional.loss_sum", adapter, base, spec, batch, seed)


def loss(
    adapter: Adapter | None, base: Base, spec: Spec, batch: Batch, *, seed: Seed = None
) -> Float[Tensor, ""]:
    """Mean of -log p(label) over labels != -100, as in Hugging Face's causal language models.

    With `segment_ids`, the first token of each document is not trained: the tokens before it belong
    to another document. The loss of a batch without any trained token is 0.

    Args:
        adapter: the trained tensors; None computes the base model.
        base: frozen weights.
        spec: how to run them.
        batch: "input_ids", "labels", and optionally the masks and ids of `forward`.
        seed: of the LoRA dropout masks; None: without dropout.

    Raises:
        ValueError: as `loss_sum`.
    """
    total, count = _loss_sum("functional.loss", adapter, base, spec, batch, seed)
    # A batch without trained tokens gives 0 / 1, with zero gradients, and not NaN.
    return total / count.clamp(min=1)


def _loss_sum(
    function: str, adapter: Adapter | None, base: Base, spec: Spec, batch: Batch, seed: Seed
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    # First, because check_call reads the batch's input_ids.
    raise_problems(ValueError, f"{function} cannot use this batch:", entry_problems(batch))
    check_call(function, adapter, base, spec, batch, seed)
    labels = trained_labels(batch)
    optional = {k: batch.get(k) for k in ("attention_mask", "position_ids", "segment_ids")}
    logp = _token_logprobs(adapter, base, spec, batch["input_ids"], labels, optional, seed)
    return -logp.sum(), (labels[:, 1:] != IGNORE).sum()


def trained_labels(batch: Batch) -> Int[Tensor, "b t"]:
    """The batch's labels, with -100 at the first token of every packed document."""
    if batch.get("segment_ids") is None:
        return batch["labels"]
    return torch.where(segment_starts(batch["segment_ids"]), IGNORE, batch["labels"])
