"""The records of encoded data: one document, or several packed into one sequence."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Int

from fastlora.arguments import one_of
from fastlora.ops.loss.ignore import IGNORE

TrainOn = Literal["responses", "last_response", "all"]
TRAIN_ON = one_of("last_response", "responses", "all")

# Ids and labels have 32 bits, half of the memory of a batch's int64: vocabularies are smaller than
# 2**31, and 500,000 rows of 500 tokens take 2 GB.
ID_TYPE = np.int32


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """The tokens of one document, and a label for each."""

    input_ids: Int[np.ndarray, "t"]
    labels: Int[np.ndarray, "t"]  # the token if it is trained, else -100


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """Several documents in one sequence, with padding at its end."""

    input_ids: Int[np.ndarray, "t"]
    labels: Int[np.ndarray, "t"]
    segment_ids: Int[np.ndarray, "t"]  # documents are 1, 2, ...; padding is 0


def make_example(ids: Sequence[int], trained: Sequence[bool] | np.ndarray) -> Example:
    """An example, in int32, from token ids and a flag for each: whether the token is trained.

    The first token is never trained: no token comes before it, and in a packed sequence the token
    before it belongs to another document.
    """
    input_ids = np.array(ids, dtype=ID_TYPE)
    labels = np.where(np.asarray(trained, dtype=bool), input_ids, ID_TYPE(IGNORE))
    labels[:1] = IGNORE
    return Example(input_ids, labels)
