"""StepShare: this process's part of a step, and the figures of the whole step."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

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

    def __init__(self, tokens: int, items: int) -> None:
        """A step over so many trained tokens and items of the loss."""
        self._tokens, self.divisor = tokens, items

    @contextmanager
    def compiling_in_turn(self, learner: Learner) -> Iterator[None]:
        """Around the passes of a step."""
        yield

    def mean(
        self, loss: Float[Tensor, ""], gradient: Sequence[Tensor], ordered: bool
    ) -> tuple[Float[Tensor, ""], Sequence[Tensor]]:
        """(mean loss, mean gradient) of the step, from sums over `divisor`."""
        return loss, gradient

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

    divisor = 1  # sums are divided after they are added up

    def __init__(self, group: Group, tokens: int, items: int, read: int) -> None:
        """Send the counts of this rank to the device."""
        self._group, self.divisor = group, 1
        self._figures = group.figures(tokens, items, read)
        self._totals = Totals(0, 0)

    @contextmanager
    def compiling_in_turn(self, learner: Learner) -> Iterator[None]:
        """On the first step the first rank of a node compiles; the others read its cache.

        Over a sharded base they cannot wait, because the passes need all ranks.
        """
        device = learner.model.base["norm"].device
        first = not self._group.compiled and compiles(learner.model.spec.compile, device)
        self._group.compiled = True
        if not first or self._group.lockstep:
            yield
            return
        with self._group.first_on_node("compilation"):
            yield

    def mean(
        self, loss: Float[Tensor, ""], gradient: Sequence[Tensor], ordered: bool
    ) -> tuple[Float[Tensor, ""], Sequence[Tensor]]:
        """(mean loss, mean gradient) of the step, over all ranks."""
        loss, gradient, self._sums = self._group.mean(loss, gradient, self._figures, ordered)
        return loss, gradient

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
    items = tokens if run.objective is None else sum(map(run.objective.count, own))
    if not isinstance(run.ranks, Group):
        return StepShare(tokens, items)
    return GroupShare(run.ranks, tokens, items, read_tokens(own))
