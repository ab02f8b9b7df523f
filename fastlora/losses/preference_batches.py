"""preference_batches(): one epoch of batches of pairs or of labelled replies."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from fastlora.arguments import check_arguments, whole_number
from fastlora.data.batches import Span, batches, epoch_order, spans_of
from fastlora.data.examples import Example
from fastlora.losses.preference_rows import Labelled, Pair
from fastlora.ops.loss.ignore import IGNORE


def preference_batches(
    sequences: Sequence[Pair] | Sequence[Labelled],
    batch_size: int,
    *,
    seed: int | None,
    epoch: int = 0,
    start: int = 0,
    spans: Iterable[Span] | None = None,
    order: Int[np.ndarray, "n"] | None = None,
    pad_token_id: int = 0,
    max_seq_length: int | None = None,
) -> Iterator[dict[str, Tensor]]:
    """One epoch of batches on the CPU, in an order that depends on `seed` and `epoch` only.

    Pairs give input_ids, labels and attention_mask [2 b, t], padded on the right: the b prompts
    with their chosen replies, then the same prompts with their rejected replies. Labelled rows give
    these [b, t], "label" [b], and KL_input_ids, KL_labels and KL_attention_mask [b, u]: each prompt
    with the reply of the next row of the epoch, from which KTO estimates a divergence. That reply
    is cut at `max_seq_length`; nothing is trained on it.

    Args:
        sequences: the result of `encode_pairs` or `encode_labelled`.
        batch_size: b; the last batch may be smaller.
        seed: of a private random generator; None keeps the order given.
        epoch: its number; each has another order.
        start: the number of batches to leave out at the beginning.
        spans: the batches to make, in place of those that `batch_size` and `start` give. Their
            lengths are not used.
        order: the result of `epoch_order`, so that it is not computed again.
        pad_token_id: what `input_ids` are padded with.
        max_seq_length: a bound on the rounding of t and u to a multiple of 8.

    Raises:
        ValueError: batch_size is not a whole number >= 1.
    """
    check_arguments("losses.preference_batches", batch_size=(batch_size, whole_number(1)))

    def padded(examples: list[Example]) -> dict[str, Tensor]:
        settings = dict(seed=None, pad_token_id=pad_token_id, max_seq_length=max_seq_length)
        return next(batches(examples, len(examples), **settings))  # pyright: ignore

    if order is None:
        order = epoch_order(len(sequences), seed, epoch)
    for first, end, _ in spans_of(len(order), batch_size, start) if spans is None else spans:
        rows = [sequences[i] for i in order[first:end]]
        pairs = [row for row in rows if isinstance(row, Pair)]
        if pairs:
            chosen = [Example(p.chosen_ids, p.chosen_labels) for p in pairs]
            yield padded(chosen + [Example(p.rejected_ids, p.rejected_labels) for p in pairs])
            continue
        labelled = [row for row in rows if isinstance(row, Labelled)]
        # The last row of a batch has the first row of the next batch as its neighbour, so that a
        # batch of one row, too, has a reply to another prompt.
        after = sequences[order[(first + len(rows)) % len(order)]]
        examples = [Example(row.input_ids, row.labels) for row in (*labelled, after)]  # pyright: ignore
        others = [_mismatched(*pair, max_seq_length) for pair in pairwise(examples)]
        label = torch.from_numpy(np.concatenate([row.label for row in labelled]))
        mismatched = {f"KL_{key}": x for key, x in padded(others).items()}
        yield padded(examples[:-1]) | {"label": label} | mismatched


def _mismatched(row: Example, other: Example, max_seq_length: int | None) -> Example:
    """The prompt of one row with the reply of another."""
    # The index of the first trained token, where the reply begins.
    prompt, reply = (int((example.labels != IGNORE).argmax()) for example in (row, other))
    ids = np.concatenate([row.input_ids[:prompt], other.input_ids[reply:]])
    labels = np.concatenate([row.labels[:prompt], other.labels[reply:]])
    return Example(ids[:max_seq_length], labels[:max_seq_length])
