"""batches."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fastlora.data.examples import Example, Packed
from fastlora.data.packing import padded_to
from fastlora.ops.loss.linear_cross_entropy import IGNORE as IGNORED


# ── 4. batches ────────────────────────────────────────────────────────────────────────────
def batches(
    sequences: Sequence[Example] | Sequence[Packed],
    batch_size: int,
    *,
    seed: int | None,
    epoch: int = 0,
    start: int = 0,
    pad_token_id: int = 0,
    max_seq_length: int | None = None,
) -> Iterator[dict[str, Tensor]]:
    """One epoch in batches on the CPU, from batch number `start` (the first is 0) on.

    The order is a function of `seed` and `epoch` alone, from a generator of its own; `seed=None`
    keeps the order given. The last batch may be smaller. Packed sequences give input_ids, labels
    and segment_ids; examples give input_ids, labels and attention_mask, padded on the right to the
    longest of the batch, rounded up to a multiple of 8 but to no more than `max_seq_length`.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: expected at least 1.")
    order = np.arange(len(sequences))
    if seed is not None:
        order = np.random.default_rng([seed, epoch]).permutation(order)
    for at in range(start * batch_size, len(order), batch_size):
        chosen = [sequences[i] for i in order[at : at + batch_size]]
        columns = _collate(chosen, pad_token_id, max_seq_length)
        yield {name: torch.from_numpy(np.stack(column)) for name, column in columns.items()}


def _collate(
    chosen: Sequence[Example | Packed], pad_token_id: int, max_seq_length: int | None
) -> dict[str, list[np.ndarray]]:
    longest = max(len(sequence.input_ids) for sequence in chosen)
    length = -(-longest // 8) * 8
    if max_seq_length is not None:
        length = max(longest, min(length, max_seq_length))
    columns: dict[str, list[np.ndarray]] = {}
    for sequence in chosen:
        ones = np.ones_like(sequence.input_ids)
        row = {"input_ids": sequence.input_ids, "labels": sequence.labels}
        if isinstance(sequence, Packed):
            row["segment_ids"] = sequence.segment_ids
        else:
            fills = {"input_ids": pad_token_id, "labels": IGNORED, "attention_mask": 0}
            row["attention_mask"] = ones
            row = {name: padded_to(values, length, fills[name]) for name, values in row.items()}
        for name, values in row.items():
            columns.setdefault(name, []).append(values)
    return columns


def count_batches(sequences: Sequence[Example] | Sequence[Packed], batch_size: int) -> int:
    """Batches in one epoch, the last partial one included."""
    return -(-len(sequences) // batch_size)


def count_trained_tokens(batch: Mapping[str, Tensor]) -> int:
    """Tokens of a batch that the loss is a mean over: labels but the first of a row, not -100."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())
