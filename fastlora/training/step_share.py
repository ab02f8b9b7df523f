"""StepShare: this process's part of a step, and the figures of the whole step."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fastlora.data.batches import count_trained_tokens
from fastlora.distributed.data_parallel import Group, Totals
from fastlora.models.state import Batch
from fastlora.runtime.compiled import compiles
from fastlora.training.dealt_batches import Dealt
from fastlora.training.history import Record
from fastlora.training.learner import Learner
from fastlora.training.progress import read_tokens
from fastlora.training.run import Run


class StepShare:
    """The part of a process that is alone: the whole step."""

    divides: bool = True
    """Whether passes divide by the step's tokens. Otherwise they return sums."""

    def __init__(self, tokens: int, counts: Sequence[int]) -> None:
        """A step over so many trained tokens, and so many items of the loss in each micro-batch."""
        self._tokens, self.counts = tokens, counts

    @contextmanager
    def compiling_in_turn(self, learner: Learner) -> Iterator[None]:
        """Around the passes of a step."""
        yield

    def any_rank(self, overflows: bool) -> bool:
        """Whether the passes are run again with a smaller scale."""
        return overflows

    def mean(
        self, loss: Float[Tensor, ""], gradient: Sequence[Tensor], more: Any, ordered: bool
    ) -> tuple[Float[Tensor, ""], Sequence[Tensor], Any]:
        """(mean loss, mean gradient, more figures) of the step, from those of the passes."""
        return loss, gradient, more

    def wait(self) -> None:
        """Wait for other ranks, before the first read from the device."""

    def tokens(self) -> int:
        """The trained tokens of the step."""
        return self._tokens

    def finish(self, figures: Record) -> Record:
        """The figures of the step."""
        return figures


class GroupShare(StepShare):
    """The part of one of several ranks."""

    divides = False  # sums are divided after they are added up

    def __init__(self, group: Group, tokens: int, counts: Sequence[int], read: int) -> None:
        """Send the counts of this rank to the device."""
        super().__init__(tokens, counts)
        self._group = group
        self._figures = group.figures(tokens, sum(counts), read)
        self._totals = Totals(0, 0)

    @contextmanager
    def compiling_in_turn(self, learner: Learner) -> Iterator[None]:
        """On the first step the first rank of a node compiles; the others read its cache.

        They cannot wait if the passes need other ranks.
        """
        device = learner.model.base["norm"].device
        first = not self._group.compiled and compiles(learner.model.spec.compile, device)
        self._group.compiled = True
        if not first or self._group.passes_send:
            yield
            return
        with self._group.first_on_node("compilation"):
            yield

    def any_rank(self, overflows: bool) -> bool:
        """Whether the passes are run again; on all ranks alike if the passes need others."""
        if not self._group.passes_send:
            return overflows
        flag = torch.tensor(float(overflows), dtype=torch.float32, device=self._group.device)
        return bool(self._group.sums([flag])[0])

    def mean(
        self, loss: Float[Tensor, ""], gradient: Sequence[Tensor], more: Any, ordered: bool
    ) -> tuple[Float[Tensor, ""], Sequence[Tensor], Any]:
        """(mean loss, mean gradient, more figures) of the step, over all ranks."""
        loss, gradient, self._sums = self._group.mean(loss, gradient, self._figures, ordered)
        return loss, gradient, more

    def wait(self) -> None:
        """Wait for other ranks, before the first read from the device."""
        self._group.wait()

    def tokens(self) -> int:
        """The trained tokens of the step, of all ranks. Reads from the device."""
        self._totals = self._group.totals(self._sums)
        return self._totals.tokens

    def finish(self, figures: Record) -> Record:
        """The figures of the step, with the number of ranks."""
        self._group.note_update(figures)
        more: dict[str, Any] = {"ranks": self._group.count}
        return figures | more | {"read_tokens": self._totals.read_tokens}


def begin_step(run: Run, micro_batches: Sequence[Batch]) -> StepShare:
    """This process's part of a step."""
    own = micro_batches
    if isinstance(micro_batches, Dealt):
        own = micro_batches[: len(micro_batches.pieces)]
    tokens = sum(map(count_trained_tokens, own))
    count = count_trained_tokens if run.objective is None else run.objective.count
    counts = [*map(count, own)]
    if not isinstance(run.ranks, Group):
        return StepShare(tokens, counts)
    if not run.ranks.counts_rows:
        return GroupShare(run.ranks, 0, [0] * len(counts), 0)
    return GroupShare(run.ranks, tokens, counts, read_tokens(own))
