"""The folder of a run: which checkpoint to resume from, what must not be overwritten, free space.

An output folder holds checkpoint-N folders (checkpoint.py), and at the end of the run the trained
adapter with training_run.json: {"settings": run_identity(...), "history": one record per step}.
"""

import errno
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastlora.checkpoints.atomic import free_bytes
from fastlora.checkpoints.tensors import read_json, write_json
from fastlora.errors import CheckpointError
from fastlora.formats.peft.base_tensors import base_tensors_out
from fastlora.formats.peft.writing import CONFIG_FILE, WEIGHTS_FILE
from fastlora.models.state import StateT
from fastlora.training.checkpoint import (
    STATE_FILE,
    complete_checkpoints,
    is_foreign,
    is_intact,
    newest_intact,
    restore_checkpoint,
    step_of,
)
from fastlora.training.history import Record
from fastlora.training.identity import check_same_run
from fastlora.training.learner import Learner
from fastlora.training.logging.backends import RUN_RECORD
from fastlora.training.settings import Settings

RUN_FILE = "training_run.json"

# Configs, README.md and histories, which are not counted one by one.
_SMALL_FILES_BYTES = 2**20


def checked_folder(output_dir: str | os.PathLike[str] | None) -> Path | None:
    """The output folder as a Path; None if there is none.

    Raises:
        ValueError: it holds checkpoints of another program, which this run could overwrite.
    """
    if output_dir is None:
        return None
    found = complete_checkpoints(Path(output_dir)).values()
    if foreign := [path.name for path in found if is_foreign(path)]:
        raise ValueError(
            f"{os.fspath(output_dir)} holds checkpoints that fastlora.train did not write, such as"
            f" those of transformers' Trainer: {', '.join(foreign)}. Choose another output_dir. The"
            " adapter of such a checkpoint can be trained on: fastlora.load(checkpoint) reads it."
        )
    return Path(output_dir)


def checkpoint_to_resume(resume: bool | str | os.PathLike[str], folder: Path | None) -> Path | None:
    """The checkpoint from which `train` continues, or None for a new run.

    Raises:
        FileNotFoundError: `resume` does not lead to a complete checkpoint.
        ValueError: another program wrote it.
    """
    if isinstance(resume, bool) or resume == "auto":
        if not resume or folder is None:
            return None
        if complete := complete_checkpoints(folder):
            return list(complete.values())[-1]
        if resume == "auto":
            return None
        raise FileNotFoundError(
            f"resume=True, but {folder} holds no complete checkpoint; start with resume=False and"
            ' save_every=..., or pass resume="auto", which starts a run if there is none.'
        )
    if not (Path(resume) / STATE_FILE).is_file():
        inside = [path.name for path in complete_checkpoints(Path(resume)).values()]
        cure = f"choose one of {inside}" if inside else "is it a checkpoint-N of fastlora.train?"
        raise FileNotFoundError(f"resume={os.fspath(resume)!r}: no {STATE_FILE} there; {cure}")
    if is_foreign(Path(resume)):
        raise ValueError(
            f"resume={os.fspath(resume)!r}: another program than fastlora.train wrote this"
            " checkpoint, and its optimizer's state cannot be read; start a new run from its"
            " adapter, which fastlora.load reads."
        )
    return Path(resume)


def start_from(
    checkpoint: Path | None, learner: Learner[StateT], identity: Mapping[str, Any], steps: int
) -> tuple[Learner[StateT], list[Record]]:
    """The learner before the first step that is to be run, and the records of the steps before.

    Raises:
        ValueError, CheckpointError: as `restore_checkpoint`.
    """
    if checkpoint is None:
        return learner, []
    try:
        return restore_checkpoint(checkpoint, learner, identity, steps)
    except CheckpointError as error:
        raise add_way_on(error, checkpoint) from error


def add_way_on(error: CheckpointError, checkpoint: Path) -> CheckpointError:
    """The error of a damaged checkpoint, with the newest undamaged one before it."""
    step = step_of(checkpoint)
    earlier = None if step is None else newest_intact(checkpoint.parent, before=step)
    if earlier is None:
        cure = (
            f"{checkpoint.parent} holds no earlier undamaged checkpoint: copy the files again from"
            " where they were saved, or start a new run in another output_dir."
        )
    else:
        cure = (
            f"The newest undamaged checkpoint before it is {earlier.name}: pass"
            f" resume={os.fspath(earlier)!r} to continue from there."
        )
    return CheckpointError(f"{error}\n{cure}")


def refuse_to_overwrite(
    folder: Path | None,
    done: int,
    resumed_from: Path | None,
    identity: Mapping[str, Any],
    initial: str,
) -> None:
    """Refuse a folder that holds another run's results, or a later part of this one's.

    Damaged checkpoints may be overwritten: nothing can continue from them.

    Args:
        folder: of the run.
        done: steps that are done.
        resumed_from: the checkpoint that the run continues from.
        identity: of the run.
        initial: fingerprint of the adapter that the run was given.

    Raises:
        ValueError: the folder has undamaged checkpoints of steps after the first `done` ones, or a
            finished adapter that does not belong to this run.
    """
    if folder is None:
        return
    complete = complete_checkpoints(folder)
    later = [p.name for step, p in complete.items() if step > done and is_intact(p)]
    if later:
        begins = f"continues from {resumed_from}" if resumed_from else "starts at step 1"
        raise ValueError(
            f"{folder} holds {', '.join(later)}, and this run {begins}: pass resume=True to"
            " continue from the newest, or delete them, or choose another output_dir."
        )
    has_adapter = (folder / WEIGHTS_FILE).exists() or (folder / CONFIG_FILE).exists()
    # A run that continues from a checkpoint in this folder made the adapter there, if any.
    continues = resumed_from is not None and resumed_from.resolve().parent == folder.resolve()
    if not has_adapter or continues:
        return
    cure = "Choose another output_dir, or delete that adapter."
    if not (folder / RUN_FILE).is_file():
        raise ValueError(
            f"{folder} holds an adapter that this run did not make (there is no {RUN_FILE} beside"
            f" it). {cure}"
        )
    saved = read_json(folder / RUN_FILE).get("settings")
    heading = f"{folder} holds the finished adapter of another run:"
    # The given adapter is not in the identity, because a run that resumes ignores it.
    began = {"adapter before the first step": _initial_adapter(folder)}
    present = {"adapter before the first step": initial if all(began.values()) else None}
    there = saved if isinstance(saved, dict) else {}
    check_same_run(heading, there | began, {**identity, **present}, cure)


def _initial_adapter(folder: Path) -> str | None:
    """The fingerprint of the adapter that the folder's run was given; None: it is not recorded."""
    if not (folder / RUN_RECORD).is_file():
        return None
    adapter = read_json(folder / RUN_RECORD).get("adapter")
    return adapter.get("initial") if isinstance(adapter, dict) else None


def write_run_file(folder: Path, identity: Mapping[str, Any], records: Sequence[Record]) -> None:
    """Write training_run.json, by which the same run knows its own adapter.

    Call it before the adapter is written: a run that is killed in between may be repeated.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RUN_FILE, {"settings": identity, "history": list(records)})


def run_bytes(learner: Learner, settings: Settings, done: int, steps: int) -> int:
    """About how many bytes a run is still going to write, from the sizes of its tensors.

    Args:
        learner: of the run.
        settings: of the run.
        done: steps that are done.
        steps: of the whole run.
    """
    model, leaves = learner.model, learner.leaves.values()
    beside = base_tensors_out(model.spec, model.base).values()
    adapter = sum(x.nbytes for x in (*leaves, *beside))
    # Two moments, as AdamW's: of the leaf's dtype, or one byte each.
    small = settings.optimizer in ("adamw_8bit", "paged_adamw_8bit")
    moments = sum(2 * x.numel() * (1 if small else x.itemsize) for x in leaves)
    count = 0  # of checkpoints: those due so far are rounded down, the last step's is always due
    if settings.save_every is not None:
        count = -(-steps // settings.save_every) - done // settings.save_every
    if settings.keep is not None:
        count = min(count, settings.keep + 1)  # the new one is complete before the oldest goes
    if settings.keep_best:
        count += 2  # the best one, and the next before it takes its place
    return count * (adapter + moments + _SMALL_FILES_BYTES) + adapter + _SMALL_FILES_BYTES


def check_space(folder: Path, needed: int, what: str) -> None:
    """Raise an OSError (ENOSPC) if the disk of a folder has fewer free bytes than needed.

    Args:
        folder: it need not exist.
        needed: bytes.
        what: what needs them, for the message.
    """
    free = free_bytes(folder)
    if free is None or free >= needed:
        return
    raise OSError(
        errno.ENOSPC,
        f"{os.strerror(errno.ENOSPC)}: {what} needs {needed:,} bytes, and the disk has {free:,}"
        " bytes free. Free some, raise save_every, or choose another output_dir",
        os.fspath(folder),
    )
