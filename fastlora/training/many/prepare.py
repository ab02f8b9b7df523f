"""RunState: one of several runs; and prepare_runs(), which makes them all before the first step."""

import os
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fastlora.data.left_out import report
from fastlora.data.sources import Data
from fastlora.models.state import Batch
from fastlora.text.tokenizer import Tokenizer
from fastlora.training.finished import tokenizer_bytes
from fastlora.training.first_step import preparing_training
from fastlora.training.history import Record
from fastlora.training.identity import hash_adapter, run_identity
from fastlora.training.keeping import Best
from fastlora.training.learner import Learner, make_learner
from fastlora.training.many.arguments import OwnArguments
from fastlora.training.output_folder import (
    check_space,
    checked_folder,
    checkpoint_to_resume,
    refuse_to_overwrite,
    run_bytes,
    start_from,
)
from fastlora.training.positions import finish_stream
from fastlora.training.run import Run, prepare_run
from fastlora.training.run_record import run_record


@dataclass(slots=True, eq=False)
class RunState:
    """One of several runs: what `train` has for a single one."""

    number: int
    run: Run
    learner: Learner
    records: list[Record]  # of the finished steps
    folder: Path | None
    identity: dict[str, Any]
    describe: Callable[..., dict[str, Any]]  # the content of run.json
    best: Best
    resumed: int  # steps that were done before
    batches: Generator[list[Batch], None, None]
    write: Callable[[Record], object] = lambda record: None
    trained: Any = None  # the model that the run returns; None: it has not ended
    error: FloatingPointError | None = None  # why it ended early

    @property
    def step(self) -> int:
        """The number of the step that comes next."""
        return len(self.records) + 1


def prepare_runs(
    own: Sequence[OwnArguments], tokenizer: Tokenizer, progress: bool, after: ExitStack
) -> list[RunState]:
    """Read the data of every run, and restore the checkpoints that runs resume from.

    Args:
        own: the arguments of each run.
        tokenizer: of all runs.
        progress: show a bar on stderr while rows are encoded.
        after: gets what must be closed after the runs.

    Raises:
        FileNotFoundError, CheckpointError, ValueError, OSError: as `train`.
    """
    for given in own:
        checked_folder(given.output_dir)
    with preparing_training(own[0].model):
        runs = _runs(own, tokenizer, progress, after)
    states = []
    for number, (given, run) in enumerate(zip(own, runs, strict=True)):
        states.append(_state(number, given, run))
        after.callback(states[-1].batches.close)
    _check_space(states, tokenizer)
    _report(states)
    return states


def _runs(
    own: Sequence[OwnArguments], tokenizer: Tokenizer, progress: bool, after: ExitStack
) -> list[Run]:
    """The run of each model. Runs over the same data share its sequences."""
    shared: dict[Any, Run] = {}
    runs = []
    for given in own:
        data, eval_data, s = given.data, given.eval_data, given.settings
        # The sample that weights of sources ask for depends on the seed.
        weighted = isinstance(data, dict) or isinstance(eval_data, dict)
        key = _key(data), _key(eval_data), s.seed if weighted else None
        if key in shared:
            run = shared[key]._replace(settings=s, left_out=())
        else:
            run = prepare_run(given.model.spec, tokenizer, s, data, eval_data, progress)
            after.callback(finish_stream, run, given.output_dir)
            if run.stream is None:  # each run reads a stream on its own
                shared[key] = run
        runs.append(run)
    return runs


def _key(data: Data | None) -> Any:
    return os.fspath(data) if isinstance(data, str | os.PathLike) else id(data)


def _state(number: int, given: OwnArguments, run: Run) -> RunState:
    """A run before its first step, which may be one that resumes."""
    folder, learner = given.output_dir, make_learner(given.model, given.settings)
    checkpoint = checkpoint_to_resume(given.resume, folder)
    saves = folder is not None or checkpoint is not None
    identity = run_identity(run, learner.model) if saves else {}
    initial = hash_adapter(learner.model) if saves else ""
    learner, records = start_from(checkpoint, learner, identity, run.steps)
    refuse_to_overwrite(folder, len(records), checkpoint, identity, initial)
    best = Best.before(given.settings, learner, records, checkpoint, folder)
    describe = partial(
        run_record,
        run,
        data=given.data,
        eval_data=given.eval_data,
        identity=identity,
        initial=initial,
    )
    return RunState(
        number,
        run,
        learner,
        records,
        folder,
        identity,
        describe if saves else (lambda **_: {}),
        best,
        len(records),
        run.batches_after(records),
    )


def _check_space(states: Sequence[RunState], tokenizer: Tokenizer) -> None:
    """Raise an OSError if the runs together need more bytes than a disk has."""
    needed: dict[int, int] = {}
    folders = [(state, state.folder) for state in states if state.folder is not None]
    for state, folder in folders:
        settings, steps = state.run.settings, state.run.steps
        size = run_bytes(state.learner, settings, len(state.records), steps)
        disk = folder.stat().st_dev
        needed[disk] = needed.get(disk, 0) + size + tokenizer_bytes(tokenizer)
    for disk, folder in {folder.stat().st_dev: folder for _, folder in folders}.items():
        check_space(folder, needed[disk], "the runs, with all their checkpoints,")


def _report(states: Iterable[RunState]) -> None:
    """Write what was left out of data that are not streamed, once for runs that share them."""
    for state in states:
        if state.run.stream is None and state.run.left_out:
            report(state.run.left_out, state.folder)
