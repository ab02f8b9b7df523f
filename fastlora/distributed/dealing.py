"""Dealing a step to ranks: micro-batches are cut into pieces, and each piece goes to one rank.

A step has some micro-batches of `rows` sequences each, the same on one rank and on many. N ranks
with batches of b sequences cut a micro-batch of N b into N pieces. All of it is a function of
numbers that every rank knows, so nothing is sent.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

# Loads that differ by less are dealt in turn.
_ALIKE = 1.1


class Piece(NamedTuple):
    """Consecutive rows of a micro-batch, which one rank runs in one pass."""

    number: int
    """Among the pieces of the step."""
    micro_batch: int
    """Among those of the step."""
    row: int
    """Its first row in the micro-batch."""
    begin: int
    """Its first sequence in the order of the epoch."""
    end: int


@dataclass(frozen=True, slots=True)
class Split:
    """How a run's micro-batches are shared by ranks."""

    rank: int
    ranks: int
    rows: int
    """Sequences in a micro-batch of all ranks together."""
    most: int
    """Sequences that a rank runs in one pass at most."""

    def pieces(self, begin: int, end: int) -> list[Piece]:
        """The pieces of a step over the sequences [begin, end) of an epoch."""
        found: list[Piece] = []
        for micro_batch, first in enumerate(range(begin, end, self.rows)):
            last = min(first + self.rows, end)
            for at in range(first, last, self.most):
                stop = min(at + self.most, last)
                found.append(Piece(len(found), micro_batch, at - first, at, stop))
        return found


def split_for(rank: int, ranks: int, rows: int, batch_size: int, micro_batches: int) -> Split:
    """The split of micro-batches of `rows` sequences into pieces of at most `batch_size`.

    If there would be fewer pieces in a step than ranks, pieces become smaller.

    Args:
        rank: of this process.
        ranks: their number.
        rows: sequences in a micro-batch of all ranks together.
        batch_size: sequences that a rank can run in one pass.
        micro_batches: of a step.
    """
    pieces = max(-(-rows // batch_size), min(rows, -(-ranks // micro_batches)))
    return Split(rank, ranks, rows, -(-rows // pieces))


def deal(loads: Sequence[float], ranks: int) -> list[int]:
    """The rank of each piece.

    Piece k goes to rank k mod ranks. If loads differ by more than a tenth, the heaviest piece that
    is left goes to the rank with the least load (Graham 1969, "longest processing time first").

    Args:
        loads: of the pieces, in any unit.
        ranks: their number.
    """
    if len(loads) <= ranks or max(loads) <= _ALIKE * min(loads):
        return [k % ranks for k in range(len(loads))]
    totals, chosen = [0.0] * ranks, [0] * len(loads)
    for k in sorted(range(len(loads)), key=lambda k: (-loads[k], k)):
        rank = min(range(ranks), key=lambda r: (totals[r], r))
        totals[rank] += loads[k]
        chosen[k] = rank
    return chosen


# A layer's products cost the same for every token. Attention's cost grows with the tokens before
# it: for 8B it reaches that of the products at about this length (7 / 2 x 4096 x 32 operations a
# pair of tokens, 4 x 8e9 a token).
_ATTENTION_LENGTH = 2**15


def load_of(rows: int, length: int) -> float:
    """The work of a padded batch, in tokens of short rows."""
    return rows * length * (1 + length / _ATTENTION_LENGTH)
