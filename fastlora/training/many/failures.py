"""What stays of several runs when one of them, or all, end by an error or a signal."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fastlora.training.history import History
from fastlora.training.many.prepare import RunState
from fastlora.training.recovery import keep_state, print_message
from fastlora.training.signals import StopRequest, TrainingStopped

_ATTRIBUTES = ("trained_models", "histories")


@contextmanager
def kept_on_failure(states: Sequence[RunState], stop: StopRequest) -> Iterator[None]:
    """Save the state of every run if the `with` block raises, as `recovery.kept_on_failure` does.

    The exception gets the attributes `trained_models` and `histories`, with one entry for each run,
    and a note for each run that says where its state is.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        if any(state.records for state in states) and not stop.repeated:
            _attach(error, states)
            for state in states:
                if state.records:
                    message = f"run {state.number}: {_keep(state)}"
                    if isinstance(error, TrainingStopped):
                        print_message(message)
                    error.add_note(f"fastlora.train: {message}")
        raise


def kept(state: RunState, error: FloatingPointError) -> FloatingPointError:
    """The error of one run, with its number, after the run's state was saved."""
    named = FloatingPointError(f"run {state.number}: {error}")
    if state.records:
        named.add_note(f"fastlora.train: run {state.number}: {_keep(state)}")
    return named


def raise_failures(states: Sequence[RunState]) -> None:
    """Raise one FloatingPointError for all runs that ended by one.

    Its attributes `trained_models` and `histories` hold those of all runs, also of the others.
    """
    errors = [state.error for state in states if state.error is not None]
    if not errors:
        return
    others = len(states) - len(errors)
    lines = [*map(str, errors)]
    if others:
        lines.append(
            f"The other {others} of {len(states)} runs went on to their end. This exception's"
            " `trained_models` and `histories` hold all runs."
        )
    error = FloatingPointError("\n".join(lines))
    for each in errors:
        for note in getattr(each, "__notes__", ()):
            error.add_note(note)
    _attach(error, states)
    raise error


def _keep(state: RunState) -> str:
    given = (state.folder, state.learner, state.records, state.identity, state.resumed)
    return keep_state(*given, attributes=_ATTRIBUTES)


def _attach(error: BaseException, states: Sequence[RunState]) -> None:
    holder: Any = error
    try:
        holder.trained_models = [
            s.learner.model if s.trained is None else s.trained for s in states
        ]
        holder.histories = [History.of(state.records) for state in states]
    except (AttributeError, TypeError):  # a class of the user's may refuse attributes
        return
