"""The results of a batch's rows under one adapter, or under the sorted adapters of a stack.

functional.py runs these functions through `each_row.for_each_row`, which arranges the rows.
"""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils._pytree import tree_map

from fastlora.models.capture import Taps
from fastlora.models.capture_checks import taps_of
from fastlora.models.context_part import ContextPart
from fastlora.models.decoder import dropout_key, hidden_states
from fastlora.models.each_row import Inputs
from fastlora.models.examples import ExampleRows
from fastlora.models.head import head, logits, masked_for_head
from fastlora.models.head_logprobs import head_logprobs, head_logprobs_and_entropy
from fastlora.models.params import Adapter, Base
from fastlora.models.self_contained import unpark_originals
from fastlora.models.spec import Spec
from fastlora.models.stacks import StackRows
from fastlora.models.state import Seed
from fastlora.ops.loss.ignore import IGNORE


def row_logits(
    adapter: Adapter | None,
    base: Base,
    spec: Spec,
    inputs: Inputs,
    seed: Seed,
    first_row: Int[Tensor, ""] | None = None,
    rows: StackRows | None = None,
    examples: ExampleRows | None = None,
    capture: Sequence[str] | None = None,
) -> Any:
    """The logits, and with `capture` also the captured tensors; see `functional.forward`.

    `inputs` is the result of `capture_checks.prepared_inputs`, `first_row`, `rows` and
    `examples` are those of `decoder.hidden_states`.
    """
    of_rows = first_row, rows, examples
    model, taps, hidden = _hidden(adapter, base, spec, inputs, seed, *of_rows, capture)
    model_head = head(adapter, model, spec)
    key = dropout_key(spec, seed, hidden.device)
    masked = masked_for_head(hidden, model_head, spec, key, first_row)
    result = logits(hidden, masked, model_head, spec)
    return result if capture is None else (result, taps.captured)


def row_logprobs(
    adapter: Adapter | None,
    base: Base,
    spec: Spec,
    inputs: Inputs,
    seed: Seed,
    first_row: Int[Tensor, ""] | None = None,
    rows: StackRows | None = None,
    examples: ExampleRows | None = None,
    entropy: bool = False,
) -> Any:
    """The log-probabilities of the labels, and with `entropy` a pair; see `token_logprobs`.

    The arguments are those of `row_logits`.
    """
    labels = inputs["labels"]
    assert labels is not None
    model, _, hidden = _hidden(adapter, base, spec, inputs, seed, first_row, rows, examples)
    # Shift the labels, not the states: [b, t, d] stays contiguous. The last position is ignored.
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORE).flatten()
    model_head = head(adapter, model, spec)
    key = dropout_key(spec, seed, hidden.device)
    of_head = head_logprobs_and_entropy if entropy else head_logprobs
    result = of_head(hidden.flatten(0, 1), model_head, spec, following, key, first_row)
    return tree_map(lambda x: F.pad(x.view(labels.shape)[:, :-1], (1, 0)), result)


def part_logprobs(
    adapter: Adapter | None, base: Base, spec: Spec, part: ContextPart, seed: Seed
) -> Float[Tensor, "b t"]:
    """Log-probabilities of the labels that follow this rank's tokens; 0 without a label.

    The arguments are those of `row_logprobs`, with `part` in place of the inputs.
    """
    base = base if adapter is not None else unpark_originals(base)
    hidden = hidden_states(adapter, base, spec, part.input_ids, seed=seed, part=part)
    key, rows = dropout_key(spec, seed, hidden.device), hidden.flatten(0, 1)
    labels, first_rows = part.following.flatten(), part.first_rows
    found = head_logprobs(rows, head(adapter, base, spec), spec, labels, key, first_rows)
    return found.view(part.following.shape)


def _hidden(
    adapter: Adapter | None,
    base: Base,
    spec: Spec,
    inputs: Inputs,
    seed: Seed,
    first_row: Int[Tensor, ""] | None,
    rows: StackRows | None,
    examples: ExampleRows | None,
    capture: Sequence[str] | None = None,
) -> tuple[Base, Taps, Float[Tensor, "b t d"]]:
    """(the base as this adapter needs it, its taps, the final norm's output)."""
    # Parked originals are tensors of which the adapter has copies. Without it they are needed.
    base = base if adapter is not None else unpark_originals(base)
    taps, known = taps_of(inputs, capture)
    of_rows: dict[str, Any] = {"first_row": first_row, "rows": rows, "examples": examples}
    hidden = hidden_states(adapter, base, spec, **known, seed=seed, **of_rows, taps=taps)
    return base, taps, hidden
