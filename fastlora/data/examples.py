"""examples."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Int64

from fastlora.ops.loss.linear_cross_entropy import IGNORE as IGNORED

TrainOn = Literal["responses", "all"]


# ── 2. rows -> tokens ─────────────────────────────────────────────────────────────────────
@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One document: its tokens, and the labels beside them."""

    input_ids: Int64[np.ndarray, "t"]
    labels: Int64[np.ndarray, "t"]


def make_example(ids: Sequence[int], trained: Sequence[bool] | np.ndarray) -> Example:
    input_ids = np.array(ids, dtype=np.int64)
    labels = np.where(np.asarray(trained, dtype=bool), input_ids, IGNORED)
    labels[:1] = IGNORED  # nothing comes before it, and in a pack another document does
    return Example(input_ids, labels)


# ── 3. tokens -> sequences of one length ──────────────────────────────────────────────────
@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """Several documents in one sequence. Padding is a segment of its own, number 0, at the end."""

    input_ids: Int64[np.ndarray, "t"]
    labels: Int64[np.ndarray, "t"]
    segment_ids: Int64[np.ndarray, "t"]  # documents are 1, 2, …
