"""Runs that end because of the other runs' evaluations: `early_stopping` as a function."""

from collections.abc import Sequence

from fastlora.arguments import describe
from fastlora.training.history import Record
from fastlora.training.many.arguments import Ending
from fastlora.training.many.prepare import RunState


def ended_by(
    ending: Ending | None, active: Sequence[RunState], taken: Sequence[RunState], ended: set[int]
) -> set[int]:
    """The numbers of the runs that end after this pass, by the function.

    It is called after passes in which all runs were evaluated. Runs that end anyway are not shown
    to it.

    Args:
        ending: the function; None ends no run.
        active: the runs of the pass.
        taken: those whose step was finite.
        ended: the numbers of those that end by themselves.

    Raises:
        ValueError: it returned something else than numbers of the runs that it was shown.
    """
    evaluated = [s for s in taken if s.records and "eval_loss" in s.records[-1]]
    if ending is None or not evaluated or len(evaluated) < len(taken):
        return set()
    return _asked(ending, {s.number: _losses(s.records) for s in taken if s.number not in ended})


def ended_before(states: Sequence[RunState], ending: Ending | None) -> set[int]:
    """The numbers of the runs that the function ended before this run resumed.

    The evaluations are shown to it again, in their order.
    """
    if ending is None:
        return set()
    losses = {state.number: _losses(state.records) for state in states}
    complete = {s.number for s in states if len(s.records) == s.run.steps}
    active, gone = set(losses), set()
    for count in range(1, max(map(len, losses.values()), default=0) + 1):
        # A run of fewer steps has ended by itself.
        active -= {i for i in active & complete if len(losses[i]) <= count}
        if not active or any(len(losses[i]) < count for i in active):
            break
        new = _asked(ending, {i: losses[i][:count] for i in sorted(active)})
        gone |= new
        active -= new
    return gone


def _losses(records: Sequence[Record]) -> list[float]:
    return [record["eval_loss"] for record in records if "eval_loss" in record]


def _asked(ending: Ending, losses: dict[int, list[float]]) -> set[int]:
    if not losses:
        return set()
    answer = ending({number: [*values] for number, values in losses.items()})
    numbers = [*answer] if isinstance(answer, list | tuple | set | frozenset) else None
    if numbers is None or not all(type(x) is int and x in losses for x in numbers):
        raise ValueError(
            f"early_stopping returned {describe(answer)}: expected a list of the runs that end, of"
            f" {sorted(losses)}"
        )
    return set(numbers)
