"""batches(): one epoch of shuffled batches, and counts of batches and trained tokens."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from fastlora.arguments import check_arguments, whole_number
from fastlora.data.examples import Example, Packed
from fastlora.data.packing import padded_to
from fastlora.ops.loss.ignore import IGNORE


class Span(NamedTuple):
    """The sequences of a batch, by their places in the order of the epoch."""

    begin: int
    end: int
    length: int = 0
    """Examples are padded as if the longest had at least this length."""


def epoch_order(count: int, seed: int | None, epoch: int) -> Int[np.ndarray, "n"]:
    """The indices of `count` sequences in the order of an epoch; `seed` None: 0, 1, 2, ..."""
    order = np.arange(count)
    if seed is None:
        return order
    # One generator per epoch: a resumed run need not repeat the draws of earlier epochs.
    return np.random.default_rng([seed, epoch]).permutation(order)


def spans_of(count: int, batch_size: int, start: int) -> Iterator[Span]:
    """The spans of consecutive batches; the last one may be smaller."""
    for first in range(start * batch_size, count, batch_size):
        yield Span(first, min(first + batch_size, count))


def batches(
    sequences: Sequence[Example] | Sequence[Packed],
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
    """One epoch of batches on the CPU.

    The order depends on `seed` and `epoch` only. The last batch may be smaller. All tensors are
    int64 [b, t]. Packed sequences give input_ids, labels and segment_ids. Examples give input_ids,
    labels and attention_mask, padded on the right to the longest of the batch, rounded up to a
    multiple of 8 but to no more than `max_seq_length`.

    Args:
        sequences: examples, or packed sequences of one length.
        batch_size: sequences in a batch.
        seed: of a private random generator; None keeps the order given.
        epoch: its number; each has another order.
        start: the number of batches to leave out at the beginning.
        spans: the batches to make, in place of those that `batch_size` and `start` give.
        order: the result of `epoch_order`, so that it is not computed again.
        pad_token_id: what `input_ids` are padded with.
        max_seq_length: a bound on the rounding to a multiple of 8.
    """
    check_arguments("batches", batch_size=(batch_size, whole_number(1)))
    # Sequences are shuffled by index; none is copied before its batch is due.
    if order is None:
        order = epoch_order(len(sequences), seed, epoch)
    for span in spans_of(len(order), batch_size, start) if spans is None else spans:
        chosen = [sequences[i] for i in order[span.begin : span.end].tolist()]
        columns = _collate(chosen, pad_token_id, max_seq_length, span.length)
        yield {
            name: torch.from_numpy(np.stack(column).astype(np.int64))
            for name, column in columns.items()
        }


def _collate(
    chosen: Sequence[Example | Packed],
    pad_token_id: int,
    max_seq_length: int | None,
    least: int = 0,
) -> dict[str, list[np.ndarray]]:
    """Name of a batch entry -> one array for each sequence, all of the same length."""
    longest = max(least, *(len(sequence.input_ids) for sequence in chosen))
    # Tensor cores in 16 bits want sizes divisible by 8, and fewer lengths mean fewer compilations.
    length = -(-longest // 8) * 8
    if max_seq_length is not None:
        length = max(longest, min(length, max_seq_length))
    fills = {"input_ids": pad_token_id, "labels": IGNORE, "attention_mask": 0}
    columns: dict[str, list[np.ndarray]] = {}
    for sequence in chosen:
        row = {"input_ids": sequence.input_ids, "labels": sequence.labels}
        if isinstance(sequence, Packed):
            row["segment_ids"] = sequence.segment_ids
        else:
            row["attention_mask"] = np.ones_like(sequence.input_ids)
            row = {name: padded_to(values, length, fills[name]) for name, values in row.items()}
        for name, values in row.items():
            columns.setdefault(name, []).append(values)
    return columns


def count_batches(sequences: Sequence[object], batch_size: int) -> int:
    """Batches in one epoch, including a last one that is not full."""
    return -(-len(sequences) // batch_size)


def count_trained_tokens(batch: Mapping[str, Tensor]) -> int:
    """The number of tokens that a batch's loss is a mean over: labels that are not -100, without
    the first column, which no token predicts."""
    return int((batch["labels"][:, 1:] != IGNORE).sum())
