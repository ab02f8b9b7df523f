"""nonfinite_cause(): the tensor, or the sequence and the layer, in which NaN or infinity appears.

It runs only after a loss or gradient was not finite, so it may take its time.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastlora.distributed.ranks import ALONE, Ranks
from fastlora.formats.peft.names import named_leaves
from fastlora.functional import token_logprobs
from fastlora.models.decoder import hidden_states
from fastlora.models.input_checks import BATCH_ENTRIES
from fastlora.models.names import tensors_from_base
from fastlora.models.params import first_nonfinite
from fastlora.models.state import Batch, ModelState, Seed, require_adapter
from fastlora.runtime.layer_fetching import is_collective
from fastlora.training.learner import Learner

# The ranks of a sharded base must run the same passes, but only one of them may have found NaN.
_NOT_SEARCHED = "its cause is not searched for, because the base is sharded over ranks"

# Context parallel: a whole row may not fit this card.
_ROWS_NOT_SEARCHED = "sequences that several ranks have together are not searched"


def nonfinite_cause(
    learner: Learner,
    batches: Sequence[Batch],
    seeds: Sequence[Seed],
    gradient: Sequence[Tensor],
    ranks: Ranks = ALONE,
) -> str:
    """The origin of a step's NaN or infinity, as a part of a sentence.

    Args:
        learner: of the step, not updated.
        batches: micro-batches, on the model's device.
        seeds: of their dropout masks and noise.
        gradient: of the step, in the order of the learner's leaves.
        ranks: of the run; the cause may be in the batches of another one.
    """
    if is_collective(learner.model.base):
        return _NOT_SEARCHED
    shared = ranks.context is not None
    batches, seeds = ([], []) if shared else (batches, seeds)
    noisy = replace(learner.model, spec=learner.spec)  # with the noise of NEFTune, as in the step
    if cause := ranks.first_text(_forward_cause(noisy, batches, seeds)):
        return cause
    for name, grad in zip(learner.leaves, gradient, strict=True):
        if not bool(grad.isfinite().all()):
            known = _ROWS_NOT_SEARCHED if shared else "the forward pass is finite"
            return f"the gradient of {name} is not finite; {known}"
    if shared:
        return f"base and adapter are finite; {_ROWS_NOT_SEARCHED}"
    return "no tensor and no sequence could be found that it comes from"


def nonfinite_cause_of_batches(
    model: ModelState, batches: Iterable[Batch], ranks: Ranks = ALONE
) -> str:
    """As `nonfinite_cause`, for a loss without gradient and dropout."""
    if is_collective(model.base):
        return _NOT_SEARCHED
    shared = ranks.context is not None
    batches = [] if shared else list(batches)
    cause = ranks.first_text(_forward_cause(model, batches, [None] * len(batches)))
    if shared and not cause:
        return f"base and adapter are finite; {_ROWS_NOT_SEARCHED}"
    return cause or "the mean of finite losses"


@torch.no_grad()
def _forward_cause(model: ModelState, batches: Sequence[Batch], seeds: Sequence[Seed]) -> str:
    """The first tensor of the model, else the first sequence and layer; "" if all are finite."""
    _, adapter = require_adapter(model)
    groups = (
        ("base's", tensors_from_base(model.spec.config, model.base)),
        ("adapter's", named_leaves(adapter)),
    )
    for owner, tensors in groups:
        if (name := first_nonfinite(tensors)) is not None:
            return f"the {owner} tensor {name} holds NaN or infinity"
    for number, (batch, seed) in enumerate(zip(batches, seeds, strict=True), 1):
        row = _first_row(model, batch, seed)
        if row is not None:
            layer = _first_layer(model, batch, seed)
            place = "its logits" if layer is None else f"the output of model.layers.{layer}"
            return (
                f"{place} overflows {str(model.base['norm'].dtype).removeprefix('torch.')} for"
                f" sequence {row + 1} of micro-batch {number}"
            )
    return ""


def _first_row(model: ModelState, batch: Batch, seed: Seed) -> int | None:
    """The first row of a batch with a token whose log-probability is not finite."""
    inputs = _inputs(batch)
    labels = batch["labels"]
    logp = token_logprobs(model.adapter, model.base, model.spec, labels=labels, seed=seed, **inputs)
    rows = (~logp.isfinite()).any(dim=1).nonzero().flatten().tolist()
    return rows[0] if rows else None


def _first_layer(model: ModelState, batch: Batch, seed: Seed) -> int | None:
    """The first layer whose output is not finite, by bisection; None if all are finite."""
    # Layers only add to the hidden states, so NaN and infinity stay from one layer to the next.
    finite, count = 0, model.spec.config.num_hidden_layers
    if _is_finite_after(model, batch, seed, count):
        return None
    while count - finite > 1:
        middle = (finite + count) // 2
        if _is_finite_after(model, batch, seed, middle):
            finite = middle
        else:
            count = middle
    return count - 1


def _is_finite_after(model: ModelState, batch: Batch, seed: Seed, layers: int) -> bool:
    """Whether the output of the first `layers` layers, normed, is finite."""
    lora, adapter = require_adapter(model)
    config = model.spec.config
    # The fields of the config that have one value for each layer.
    per_layer = ("layer_types", "no_rope_layers", "sparse_layers")
    shorter = {name: getattr(config, name)[:layers] for name in per_layer}
    spec = replace(
        model.spec,
        config=replace(config, num_hidden_layers=layers, **shorter),
        lora=replace(lora, targets=lora.targets[:layers]),
    )
    # Trained copies of later layers' tensors have no place in the shorter model.
    copies = {
        name: x
        for name, x in adapter.get("replaced", {}).items()
        if not name.startswith("model.layers.") or int(name.split(".")[2]) < layers
    }
    adapter = adapter | {"layers": adapter["layers"][:layers]}
    if "replaced" in adapter:
        adapter["replaced"] = copies
    base: Any = model.base | {"layers": model.base["layers"][:layers]}
    inputs = _inputs(batch)
    hidden = hidden_states(adapter, base, spec, seed=seed, **inputs)
    return bool(hidden.isfinite().all())


def _inputs(batch: Batch) -> dict[str, Any]:
    """The entries of a batch that the model reads. Batches of preference rows have more entries."""
    return {name: x for name, x in batch.items() if name in BATCH_ENTRIES and name != "labels"}
