"""kept_on_failure(): a run that ends by an error or a signal leaves its trained state reachable."""

import os
import secrets
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fastlora.distributed.ranks import ALONE, Ranks
from fastlora.training.checkpoint import (
    complete_checkpoints,
    is_intact,
    newest_intact,
    save_checkpoint,
)
from fastlora.training.history import History, Record
from fastlora.training.learner import Learner
from fastlora.training.optimizers import steps_taken
from fastlora.training.signals import StopRequest, TrainingStopped


@contextmanager
def kept_on_failure(
    folder: Path | None,
    learner: Learner,
    records: list[Record],
    identity: Mapping[str, Any],
    stop: StopRequest,
    ranks: Ranks = ALONE,
) -> Iterator[None]:
    """Save the state after the last finished step if the `with` block raises.

    It is saved as a checkpoint in `folder`; if that fails, in a new temporary folder. Without
    `folder` nothing is saved. In every case the exception gets the attributes `trained_model` and
    `history`, and a note that says where the state is. After a second signal nothing is saved: the
    user wants to stop at once.

    Args:
        folder: of the run.
        learner: of the run.
        records: of the finished steps; the block adds to it.
        identity: of the run.
        stop: the run's.
        ranks: of the run. The first one saves.
    """
    done = len(records)  # by the run that this one resumes
    try:
        yield
    # SystemExit and KeyboardInterrupt are not Exceptions. GeneratorExit is left out: it only means
    # that this context was dropped.
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        if records and not stop.repeated:
            attach(error, learner, records)
        if records and not stop.repeated and ranks.is_first:
            message = keep_state(folder, learner, records, identity, done)
            # The note below appears in a traceback, which Python does not print for a SystemExit.
            if isinstance(error, TrainingStopped):
                print_message(message)
            error.add_note(f"fastlora.train: {message}")
        raise


def attach(error: BaseException, learner: Learner, records: list[Record]) -> None:
    """Give an exception the trained model and the history."""
    holder: Any = error
    try:
        holder.trained_model, holder.history = learner.model, History.of(records)
    except (AttributeError, TypeError):  # a class of the user's may refuse attributes
        return


def print_message(message: str) -> None:
    """Print to stderr: Python shows no message of a SystemExit with a status."""
    sys.stderr.write(f"\nfastlora.train: {message}\n")
    sys.stderr.flush()


def keep_state(
    folder: Path | None,
    learner: Learner,
    records: list[Record],
    identity: Mapping[str, Any],
    done: int,
    attributes: tuple[str, str] = ("trained_model", "history"),
) -> str:
    """Save the state after the last step; returns where it is, as a sentence or more.

    Args:
        folder: of the run; None saves nothing.
        learner: of the run.
        records: of its finished steps.
        identity: of the run.
        done: steps of an earlier run that this one resumes.
        attributes: of the exception, that hold the model and the history.
    """
    step = len(records)
    in_memory = (
        f"The model after step {step} is in this exception's `{attributes[0]}`, its figures in"
        f" `{attributes[1]}`"
    )
    if folder is None:
        return f"{in_memory}. Nothing was saved, because train was given no output_dir."
    name = f"checkpoint-{step}"
    complete = complete_checkpoints(folder)
    if step in complete and is_intact(complete[step]):
        return f"The state after step {step} is in {folder / name}; {_resume_from(folder / name)}"
    if step == done:
        return f"No step was finished since the checkpoint of step {step}, from which it resumed."
    # The optimizer writes to one leaf after the other. An interruption between two of them leaves
    # an adapter that belongs to no step, and that must not be saved as one.
    if any(steps_taken(learner.optimizer, leaf) != step for leaf in learner.leaves.values()):
        return f"The run ended in the middle of an update; {_how_to_resume(folder)}"
    try:
        save_checkpoint(folder / name, learner, identity, records)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).split("\n", 1)[0][:300]
    else:
        return (
            f"The state after step {step} was saved to {folder / name};"
            f" {_resume_from(folder / name)}"
        )
    failed = f"{folder / name} could not be written ({reason})"
    # Usually on another disk, so that a full one does not lose the state.
    elsewhere = Path(tempfile.gettempdir()) / f"fastlora-{secrets.token_hex(4)}" / name
    try:
        save_checkpoint(elsewhere, learner, identity, records)
    except (OSError, ValueError, RuntimeError):
        with suppress(OSError):
            elsewhere.parent.rmdir()
        return f"{failed}. {in_memory}; {_how_to_resume(folder)}"
    return (
        f"{failed}, so the state after step {step} was saved to {elsewhere}: pass"
        f" resume={os.fspath(elsewhere)!r} to continue from it."
    )


def _how_to_resume(folder: Path) -> str:
    newest = newest_intact(folder)
    if newest is None:
        return f"{folder} holds no complete checkpoint."
    return _resume_from(newest)


def _resume_from(newest: Path) -> str:
    return (
        f"pass resume={os.fspath(newest)!r} to continue from {newest.name}, the newest complete"
        " checkpoint."
    )
