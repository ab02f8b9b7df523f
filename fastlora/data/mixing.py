"""mix(): examples of several sources, by weight."""

from collections.abc import Sequence

import numpy as np

from fastlora.data.examples import Example


def mix(
    parts: Sequence[Sequence[Example]], weights: Sequence[float], *, seed: int
) -> list[Example]:
    """As many examples as the parts have together, of which each part gives its weight's share.

    A part that has fewer is repeated: complete passes, and for the rest a sample without
    replacement. A part that has more gives a sample. An example that occurs twice is the same
    object, which takes no memory.

    Args:
        parts: the examples of each source.
        weights: one each, > 0; their sum is any number.
        seed: of the samples.
    """
    chosen: list[Example] = []
    for i, (part, quota) in enumerate(zip(parts, quotas(parts, weights), strict=True)):
        passes, rest = divmod(quota, len(part)) if part else (0, 0)
        order = np.random.default_rng([seed, i]).permutation(len(part))[:rest]
        chosen += [*part] * passes
        chosen += [part[j] for j in np.sort(order)]
    return chosen


def quotas(parts: Sequence[Sequence[Example]], weights: Sequence[float]) -> list[int]:
    """The number of examples of each part. Their sum is the number of examples in all parts, and
    each differs by less than 1 from its share (the method of largest remainders)."""
    total = sum(map(len, parts))
    shares = np.array(weights, dtype=np.float64)
    shares = shares / shares.sum() * total
    counts = np.floor(shares).astype(np.int64)
    largest = np.argsort(counts - shares, kind="stable")  # largest remainders first
    counts[largest[: total - counts.sum()]] += 1
    return counts.tolist()
