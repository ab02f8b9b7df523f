"""Ranks: what training asks of the processes that run together. This class is a process alone."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from jaxtyping import Float
from torch import Tensor

from fastlora.ops.attention.context_group import ContextGroup


class Ranks:
    """The processes of a run, seen from one of them. `data_parallel.Group` has more than one."""

    rank: int = 0
    count: int = 1
    several: bool = False
    """Whether there is a process group, which may be of one rank."""
    lockstep: bool = False
    """Whether every rank must run the same number of passes."""
    context: ContextGroup | None = None
    """The ranks that have rows together with this one; None: rows are whole."""

    @property
    def row_ranks(self) -> int:
        """How many ranks have a row together."""
        return 1 if self.context is None else self.context.ranks

    @property
    def data_count(self) -> int:
        """Among how many ranks, or groups that have rows together, sequences are dealt."""
        return self.count // self.row_ranks

    @property
    def data_rank(self) -> int:
        """The number of this rank, or of its group, in [0, data_count)."""
        return self.rank // self.row_ranks

    @property
    def passes_send(self) -> bool:
        """Whether a pass waits for other ranks."""
        return self.lockstep or self.context is not None

    @property
    def counts_rows(self) -> bool:
        """Whether this rank counts the tokens of its rows: one of those that have them together."""
        return self.context is None or self.context.rank == 0

    @property
    def is_first(self) -> bool:
        """Whether this process writes files, logs and shows the bar."""
        return self.rank == 0

    @property
    def leads_node(self) -> bool:
        """Whether this is the first rank of its machine."""
        return True

    def agree(self, facts: Mapping[str, Any], what: str = "this run") -> None:
        """Raise a ValueError if a fact differs between ranks."""

    def meet(self, what: str) -> None:
        """Wait until all ranks are here."""

    @contextmanager
    def first_on_node(self, what: str) -> Iterator[None]:
        """Run the block on the first rank of each machine, then on its other ranks."""
        yield

    def sums(self, values: Sequence[Float[Tensor, ""]]) -> list[Float[Tensor, ""]]:
        """The sums over ranks, in float64."""
        return [x.double() for x in values]

    def first_text(self, text: str) -> str:
        """The text of the first rank that has one, with its rank."""
        return text

    def signal(self, own: int | None) -> int | None:
        """The signal that ends the run after this step, on every rank alike."""
        return own


ALONE = Ranks()
