"""train_runs(): what `train` does with a list of models.

Each run is a pure function of its arguments, as a single run is. The other runs of a pass change it
by rounding only. When a run ends, the next pass has a new stack without it.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from time import perf_counter
from typing import Any

from tqdm import tqdm

from fastlora.models.state import Batch
from fastlora.ops.dispatch import refuse_transforms
from fastlora.text.tokenizer import Tokenizer
from fastlora.training.after_step import evaluate_and_save, evaluation_is_due
from fastlora.training.common_run import refuse_ranks
from fastlora.training.finished import finish_folder
from fastlora.training.history import History, Record
from fastlora.training.keeping import stops_early
from fastlora.training.lock import output_lock
from fastlora.training.logging.backends import RunInfo
from fastlora.training.logging.open import Log, log_entries, open_log
from fastlora.training.many.arguments import Ending, own_arguments
from fastlora.training.many.ending import ended_before, ended_by
from fastlora.training.many.failures import kept, kept_on_failure, raise_failures
from fastlora.training.many.figures import pass_figures
from fastlora.training.many.prepare import RunState, prepare_runs
from fastlora.training.many.stack import RunStack, make_stack
from fastlora.training.many.step import evaluate_runs, step_runs
from fastlora.training.many.update import StackUpdate
from fastlora.training.positions import figures, with_position
from fastlora.training.progress import step_cost
from fastlora.training.run_record import json_settings
from fastlora.training.signals import StopRequest


def train_runs(given: Mapping[str, Any]) -> tuple[list[Any], list[History]]:
    """The trained models and their histories, in the order of the given models.

    Args:
        given: the arguments of `train` by name; "model" is a list.

    Raises:
        FloatingPointError: runs had a loss or gradient that is NaN or infinite. It is raised after
            the other runs have ended, and names these runs.
        ValueError, FileNotFoundError, CheckpointError, OSError, SystemExit: as `train`.
    """
    refuse_transforms("fastlora.train")
    refuse_ranks("train with a list of models")
    own, ending = own_arguments(given)
    tokenizer, progress = given["tokenizer"], given["progress"]
    with ExitStack() as after:
        for arguments in own:
            after.enter_context(output_lock(arguments.output_dir))
        states = prepare_runs(own, tokenizer, progress, after)
        stop = StopRequest()
        with stop.listening(), kept_on_failure(states, stop):
            with ExitStack() as logs:
                for state in states:
                    state.write = logs.enter_context(_log_of(state, given["log"]))
                _run_passes(states, tokenizer, ending, stop, progress)
            if stop.signal is not None:
                raise stop.error()
    raise_failures(states)
    return [state.trained for state in states], [History.of(state.records) for state in states]


@contextmanager
def _log_of(state: RunState, log: Log | None) -> Iterator[Any]:
    """The function that writes the records of a run. Those that users' functions get have the
    number of the run."""

    def numbered(function: Any, record: Record) -> None:
        function({"run": state.number} | record)

    entries = [x if isinstance(x, str) else partial(numbered, x) for x in log_entries(log)]
    start = state.describe(model=state.learner.model, records=state.records, ended=False)
    records = tuple(map(figures, state.records))
    info = RunInfo(state.folder, records, json_settings(state.run.settings), start)
    with open_log(entries, info) as write:
        yield write


def _run_passes(
    states: Sequence[RunState],
    tokenizer: Tokenizer,
    ending: Ending | None,
    stop: StopRequest,
    progress: bool,
) -> None:
    """Run all steps of all runs; in a pass, every run that goes on takes one."""
    _finish([state for state in states if _has_ended(state)], tokenizer)
    _finish(ended_before(states, ending), tokenizer)
    active = [state for state in states if state.trained is None]
    total = max((state.run.steps - len(state.records) for state in active), default=0)
    update = None
    with tqdm(total=total, disable=not progress, unit="step") as bar:
        while active:
            started = perf_counter()
            if update is None or update.stack.n != len(active):
                update = None  # its memory and its stack's are free before the next ones are made
                learners = [state.learner for state in active]
                optimizers = [learner.optimizer for learner in learners]
                update = StackUpdate(make_stack(learners, active[0].run.settings), optimizers)
            taken = _take_steps(update, active, started)
            taken, ended = _after_steps(update.stack, active, taken)
            ended += ended_by(ending, taken, ended)
            if progress:
                bar.set_postfix(pass_figures(taken, len(states)), refresh=False)
            bar.update()
            for state in taken:
                state.write(figures(state.records[-1]))
            _finish(ended, tokenizer)
            active = [state for state in active if state.trained is None]
            if stop.signal is not None and active:
                raise stop.error()


def _has_ended(state: RunState) -> bool:
    """Whether a run that resumes has no step left."""
    early = stops_early(state.records, state.run.settings.early_stopping)
    return early or len(state.records) == state.run.steps


def _take_steps(update: StackUpdate, active: Sequence[RunState], started: float) -> list[RunState]:
    """One step of each run; returns the runs whose step was finite."""
    micro_batches: list[list[Batch]] = [next(state.batches) for state in active]
    results = step_runs(update, active, micro_batches)
    # step_runs ends with a read from the device, so all its work is done here.
    seconds, taken = perf_counter() - started, []
    for state, batches, result in zip(active, micro_batches, results, strict=True):
        if isinstance(result, FloatingPointError):
            _fail(state, result)
            continue
        result["seconds"] = seconds
        result |= step_cost(state.learner.model, batches, seconds)
        state.records.append(with_position(result, state.run, state.records))
        taken.append(state)
    return taken


def _after_steps(
    stack: RunStack, active: Sequence[RunState], taken: Sequence[RunState]
) -> tuple[list[RunState], list[RunState]]:
    """Evaluate and save the runs for which it is due.

    Returns:
        The runs that took a step without any error, and those of them that end.
    """
    due = [s for s in taken if s.run.eval_sequences and evaluation_is_due(s.run, len(s.records))]
    losses: dict[int, float] = {}
    if len(due) == len(active) > 1:
        together = zip(active, evaluate_runs(stack, active), strict=True)
        # Others are evaluated alone below, which finds the cause.
        losses = {state.number: loss for state, loss in together if math.isfinite(loss)}
    finite, ended = [], []
    for state in taken:
        given = (state.run, state.learner, state.records, state.identity, state.folder, state.best)
        try:
            ends = evaluate_and_save(*given, eval_loss=losses.get(state.number))
        except FloatingPointError as error:
            _fail(state, error)
            continue
        finite.append(state)
        if ends:
            ended.append(state)
    return finite, ended


def _fail(state: RunState, error: FloatingPointError) -> None:
    """End a run by an error. Its state is saved; the other runs go on."""
    state.error, state.trained = kept(state, error), state.learner.model


def _finish(ended: Sequence[RunState], tokenizer: Tokenizer) -> None:
    """Set the models that runs return, and write their folders."""
    for state in ended:
        trained = state.best.model(state.learner.model)
        if state.folder is not None:
            end = state.describe(model=trained, records=state.records, ended=True)
            finish_folder(state.folder, trained, tokenizer, state.identity, state.records, end)
        state.trained = trained
