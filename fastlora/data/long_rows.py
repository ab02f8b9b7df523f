"""fit(): examples of at most a given length, by the policy of `too_long`."""

from typing import Literal

import numpy as np

from fastlora.arguments import one_of
from fastlora.data.examples import Example
from fastlora.ops.loss.ignore import IGNORE

TooLong = Literal["error", "drop", "truncate", "split"]
TOO_LONG = one_of("error", "drop", "truncate", "split")


def fit(example: Example, max_seq_length: int, too_long: TooLong) -> list[Example]:
    """The example in pieces of at most `max_seq_length` tokens.

    "drop" gives no piece, "truncate" the first tokens. "split" gives pieces that each begin with
    the last token of the piece before it, so that every token but the first is predicted once.
    Pieces without a trained token are left out.

    Raises:
        ValueError: the example is too long, with "error".
    """
    t = len(example.input_ids)
    if t <= max_seq_length:
        return [example]
    if too_long == "error":
        raise ValueError(f"{t} tokens, {t - max_seq_length} more than max_seq_length")
    if too_long == "drop":
        return []
    last = 1 if too_long == "truncate" else t - 1
    pieces = [
        _piece(example, start, max_seq_length) for start in range(0, last, max_seq_length - 1)
    ]
    return [piece for piece in pieces if is_trained(piece)]


def _piece(example: Example, start: int, length: int) -> Example:
    # Copies: a view would keep the whole row's memory.
    labels = example.labels[start : start + length].copy()
    labels[0] = IGNORE
    return Example(example.input_ids[start : start + length].copy(), labels)


def is_trained(example: Example) -> bool:
    """Whether a token is trained."""
    return bool(np.any(example.labels != IGNORE))
