"""The batches of a step that one of several ranks runs."""

from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import numpy as np
import torch
from jaxtyping import Int

from fastlora.data.batches import Span, epoch_order
from fastlora.data.examples import Example
from fastlora.distributed.dealing import Piece, Split, deal, load_of
from fastlora.models.spec import Spec
from fastlora.models.state import Batch
from fastlora.ops.loss.linear_cross_entropy import IGNORE

Batches = Callable[..., Any]


class Dealt(list[Batch]):
    """A rank's batches of a step, with the pieces of the step that they are.

    The last ones may be batches without a trained token, which belong to no piece.
    """

    def __init__(self, batches: Sequence[Batch], pieces: Sequence[Piece]) -> None:
        super().__init__(batches)
        self.pieces = pieces


class Dealer:
    """Makes the batches of one rank."""

    def __init__(self, split: Split, batches: Batches, *, masked: bool, lockstep: bool) -> None:
        """A dealer.

        Args:
            split: of the run's micro-batches.
            batches: makes batches of sequences.
            masked: whether there are dropout masks or noise. They depend on the number of a row of
                tokens in the micro-batch, so all its pieces are padded to one length.
            lockstep: whether every rank must run the same number of passes.
        """
        self.split, self.batches = split, batches
        self.masked, self.lockstep = masked, lockstep

    def epochs(
        self, sequences: Sequence[Any], micro_batches: int, seed: int, steps_done: int
    ) -> Any:
        """Without end, the batches of each step after the first `steps_done`."""
        size = self.split.rows * micro_batches
        first_epoch, done = divmod(steps_done, -(-len(sequences) // size))
        for epoch in count(first_epoch):
            order = epoch_order(len(sequences), seed, epoch)
            start = done * size if epoch == first_epoch else 0
            for begin in range(start, len(order), size):
                yield self.step(sequences, order, begin, min(begin + size, len(order)))

    def of_stream(self, taken: Sequence[Any]) -> list[Batch]:
        """The batches of a step over sequences of a stream."""
        return self.step(taken, np.arange(len(taken)), 0, len(taken))

    def step(
        self, sequences: Sequence[Any], order: Int[np.ndarray, "n"], begin: int, end: int
    ) -> Dealt:
        """The batches of a step over the sequences order[begin:end]."""
        split, pieces = self.split, self.split.pieces(begin, end)
        lengths = self._lengths(sequences, order, pieces)
        loads = [load_of(p.end - p.begin, t) for p, t in zip(pieces, lengths, strict=True)]
        ranks = deal(loads, split.ranks)
        own = [i for i, rank in enumerate(ranks) if rank == split.rank]
        passes = max(ranks.count(rank) for rank in range(split.ranks)) if self.lockstep else 0
        # A rank without a piece runs another one's, without its labels.
        made = own if own or not passes else [0]
        spans = [Span(pieces[i].begin, pieces[i].end, lengths[i]) for i in made]
        batches = [
            *self.batches(sequences, split.most, seed=None, order=order, spans=spans),
        ]
        given = [untrained(batches[0])] * (passes - len(own)) if passes else []
        return Dealt([*(batches if own else []), *given], [pieces[i] for i in own])

    def _lengths(
        self, sequences: Sequence[Any], order: Int[np.ndarray, "n"], pieces: Sequence[Piece]
    ) -> list[int]:
        """The length that each piece is padded to; 0: as they are, or not known."""
        if not isinstance(sequences[int(order[pieces[0].begin])], Example):
            return [0] * len(pieces)
        length = lambda i: len(sequences[i].input_ids)
        longest = [max(map(length, order[p.begin : p.end].tolist())) for p in pieces]
        if self.masked:
            of_all: dict[int, int] = {}
            for p, t in zip(pieces, longest, strict=True):
                of_all[p.micro_batch] = max(t, of_all.get(p.micro_batch, 0))
            longest = [of_all[p.micro_batch] for p in pieces]
        return longest


def is_masked(spec: Spec) -> bool:
    """Whether a run with this spec draws dropout masks or noise."""
    drops = spec.lora is not None and spec.lora.lora_dropout > 0
    return drops or spec.neftune_alpha is not None


def untrained(batch: Batch) -> Batch:
    """A batch of which no token is trained: its loss and gradient are 0."""
    hidden = {n: torch.full_like(x, IGNORE) for n, x in batch.items() if n.endswith("labels")}
    return {**batch, **hidden}
