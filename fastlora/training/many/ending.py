"""Runs that end because of the other runs' evaluations: `early_stopping` as a function."""

from collections.abc import Sequence

from fastlora.arguments import describe
from fastlora.training.history import Record
from fastlora.training.many.arguments import Ending
from fastlora.training.many.prepare import RunState


def ended_by(
    ending: Ending | None, taken: Sequence[RunState], ended: Sequence[RunState]
) -> list[RunState]:
    """The runs that end after this pass, by the function.

    It is called after passes in which all runs were evaluated. Runs that end anyway are not shown
    to it.

    Args:
        ending: the function; None ends no run.
        taken: the runs that took a step.
        ended: those that end by themselves.

    Raises:
        ValueError: it returned something else than numbers of the runs that it was shown.
    """
    if ending is None or not all("eval_loss" in state.records[-1] for state in taken):
        return []
    shown = [state for state in taken if state not in ended]
    numbers = _asked(ending, {state.number: _losses(state.records) for state in shown})
    return [state for state in shown if state.number in numbers]


def ended_before(states: Sequence[RunState], ending: Ending | None) -> list[RunState]:
    """The runs that the function ended before these runs resumed.

    The evaluations are shown to it again, in their order. Runs that have ended by themselves
    (`RunState.trained`) were not shown to it at their last one.
    """
    losses = {state.number: _losses(state.records) for state in states}
    own_end = {state.number for state in states if state.trained is not None}
    active, gone = set(losses), set()
    for count in range(1, max(map(len, losses.values()), default=0) + 1):
        active -= {i for i in active & own_end if len(losses[i]) <= count}
        if ending is None or any(len(losses[i]) < count for i in active):
            break
        new = _asked(ending, {i: losses[i][:count] for i in sorted(active)})
        gone |= new
        active -= new
    return [state for state in states if state.number in gone]


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
