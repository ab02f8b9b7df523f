"""pack(): several documents in each sequence, so that little is spent on padding."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import overload

import numpy as np
from jaxtyping import Int

from fastlora.data.examples import ID_TYPE, Example, Packed
from fastlora.errors import raise_problems
from fastlora.ops.loss.ignore import IGNORE


class PackedSequences(Sequence[Packed]):
    """Packed sequences, each made of its examples when it is asked for."""

    def __init__(
        self, bins: Sequence[Sequence[Example]], max_seq_length: int, pad_token_id: int
    ) -> None:
        self._bins, self._length, self._pad = bins, max_seq_length, pad_token_id

    def __len__(self) -> int:
        return len(self._bins)

    @overload
    def __getitem__(self, index: int) -> Packed: ...

    @overload
    def __getitem__(self, index: slice) -> list[Packed]: ...

    def __getitem__(self, index: int | slice) -> Packed | list[Packed]:
        if isinstance(index, slice):
            return [_packed(bin, self._length, self._pad) for bin in self._bins[index]]
        return _packed(self._bins[index], self._length, self._pad)


def pack(
    examples: Sequence[Example], max_seq_length: int, *, pad_token_id: int = 0
) -> PackedSequences:
    """Sequences of exactly `max_seq_length` tokens, each filled with complete examples.

    Best-fit decreasing: the longest example first, each into the fullest sequence that still has
    room for it. Ties keep the order given, so the result depends on the examples only; `batches`
    does the shuffling. The number of sequences is at most 11/9 of the smallest possible one plus a
    constant (Johnson et al. 1974, SIAM J. Comput. 3(4)), in O(n log n) steps.

    Raises:
        ValueError: examples are longer than `max_seq_length`.
    """
    lengths = [len(example.input_ids) for example in examples]
    long = [f"example {n}: {t} tokens" for n, t in enumerate(lengths, 1) if t > max_seq_length]
    raise_problems(ValueError, f"examples longer than max_seq_length={max_seq_length}:", long)
    # The smallest room that fits is found by bisection among the distinct rooms, of which there are
    # at most max_seq_length.
    bins: list[list[Example]] = []
    bins_with_room: dict[int, list[int]] = {}  # free tokens -> the bins that have so many
    rooms: list[int] = []  # the keys of `bins_with_room`, sorted
    for i in sorted(range(len(examples)), key=lambda i: -lengths[i]):
        smallest_fit = bisect_left(rooms, lengths[i])
        if smallest_fit == len(rooms):
            chosen, free = len(bins), max_seq_length
            bins.append([])
        else:
            free = rooms[smallest_fit]
            chosen = bins_with_room[free].pop()
            if not bins_with_room[free]:
                del bins_with_room[free], rooms[smallest_fit]
        bins[chosen].append(examples[i])
        left = free - lengths[i]
        if left not in bins_with_room:
            bins_with_room[left] = []
            insort(rooms, left)
        bins_with_room[left].append(chosen)
    return PackedSequences(bins, max_seq_length, pad_token_id)


def _packed(documents: Sequence[Example], length: int, pad_token_id: int) -> Packed:
    lengths = [len(document.input_ids) for document in documents]
    segments = np.repeat(np.arange(1, len(documents) + 1), lengths)
    labels = np.concatenate([d.labels for d in documents])
    labels[np.cumsum([0, *lengths[:-1]])] = IGNORE  # no document predicts the next one
    return Packed(
        padded_to(np.concatenate([d.input_ids for d in documents]), length, pad_token_id),
        padded_to(labels, length, IGNORE),
        padded_to(segments, length, 0),
    )


def padded_to(values: np.ndarray, length: int, fill: int) -> Int[np.ndarray, "t"]:
    """`values` in int32, padded on the right with `fill` to a length."""
    return np.pad(values, (0, length - len(values)), constant_values=fill).astype(ID_TYPE)
