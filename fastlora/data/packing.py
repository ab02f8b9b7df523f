"""packing."""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

from fastlora.data.examples import Example, Packed
from fastlora.errors import raise_problems
from fastlora.ops.loss.linear_cross_entropy import IGNORE as IGNORED


def pack(
    examples: Sequence[Example], max_seq_length: int, *, pad_token_id: int = 0
) -> list[Packed]:
    """Sequences of exactly `max_seq_length` tokens, each filled with whole examples.

    Best fit, longest first, ties in the order given: a function of the examples alone (`batches`
    does the shuffling). It needs at most 11/9 of the fewest possible sequences plus a constant
    (Johnson et al. 1974, SIAM J. Comput. 3(4)), in O(n log n) steps.

    Raises:
        ValueError: examples longer than `max_seq_length`.
    """
    lengths = [len(example.input_ids) for example in examples]
    long = [f"example {n}: {t} tokens" for n, t in enumerate(lengths, 1) if t > max_seq_length]
    raise_problems(ValueError, f"examples longer than max_seq_length={max_seq_length}:", long)
    bins: list[list[Example]] = []
    room: dict[int, list[int]] = {}  # free tokens -> bins that have so many
    sizes: list[int] = []  # the keys of `room`, sorted
    for i in sorted(range(len(examples)), key=lambda i: -lengths[i]):
        at = bisect_left(sizes, lengths[i])
        if at == len(sizes):
            chosen, free = len(bins), max_seq_length
            bins.append([])
        else:
            free = sizes[at]
            chosen = room[free].pop()
            if not room[free]:
                del room[free], sizes[at]
        bins[chosen].append(examples[i])
        left = free - lengths[i]
        if left not in room:
            room[left] = []
            insort(sizes, left)
        room[left].append(chosen)
    return [_packed(documents, max_seq_length, pad_token_id) for documents in bins]


def _packed(documents: Sequence[Example], length: int, pad_token_id: int) -> Packed:
    lengths = [len(document.input_ids) for document in documents]
    segments = np.repeat(np.arange(1, len(documents) + 1), lengths)
    labels = np.concatenate([d.labels for d in documents])
    labels[np.cumsum([0, *lengths[:-1]])] = IGNORED  # else a document would predict the next
    return Packed(
        padded_to(np.concatenate([d.input_ids for d in documents]), length, pad_token_id),
        padded_to(labels, length, IGNORED),
        padded_to(segments, length, 0),
    )


def padded_to(values: np.ndarray, length: int, fill: int) -> Int64[np.ndarray, "t"]:
    return np.pad(values, (0, length - len(values)), constant_values=fill).astype(np.int64)
