"""Checkpoints: saving a run, restoring it with the same bits, and the checks on the files.

A checkpoint-N folder is a PEFT adapter folder and two more files:

    optimizer.safetensors   "<PEFT's tensor name>.<name in the optimizer's state>" -> tensor
    trainer_state.json      {"settings": run_identity(...), "history": one record per step,
                             "files": {name: {"bytes": ..., "sha256": ...}} of every other file,
                             "sha256": of the three above}

trainer_state.json is written last: a folder without it is incomplete and is ignored.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastlora.checkpoints.tensors import read_json, read_safetensors, write_json, write_safetensors
from fastlora.errors import CheckpointError, raise_problems
from fastlora.formats.peft.restoring import restore_adapter, tensor_differences
from fastlora.formats.peft.writing import save_adapter
from fastlora.models.state import StateT
from fastlora.training.custom_optimizer import count_update, is_custom, make_states
from fastlora.training.history import Record, record_problems
from fastlora.training.identity import check_same_run
from fastlora.training.learner import Learner
from fastlora.training.optimizers import fresh_state, restore_state, state_tensors

OPTIMIZER_FILE, STATE_FILE = "optimizer.safetensors", "trainer_state.json"


def save_checkpoint(
    folder: Path, learner: Learner, identity: Mapping[str, Any], records: Sequence[Record]
) -> None:
    """Write the adapter, then the optimizer's state, then the history with digests of the files.

    A folder that this call created is deleted again if it cannot be written completely.
    """
    created = not folder.exists()
    # A damaged checkpoint is replaced: from here on it counts as incomplete.
    (folder / STATE_FILE).unlink(missing_ok=True)
    try:
        save_adapter(learner.model, folder)
        state = {
            f"{name}.{key}": x
            for name, leaf in learner.leaves.items()
            for key, x in state_tensors(learner.optimizer, leaf).items()
        }
        write_safetensors(folder / OPTIMIZER_FILE, state)
        content = {
            "settings": identity,
            "history": list(records),
            "files": {path.name: file_digest(path) for path in _other_files(folder)},
        }
        # STATE_FILE must stay last: a process that is killed earlier leaves no complete checkpoint.
        write_json(folder / STATE_FILE, content | {"sha256": _json_digest(content)})
    except Exception:
        if created:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _other_files(folder: Path) -> list[Path]:
    """The files that a checkpoint's digests cover; temporary and hidden ones do not count."""
    paths = sorted(folder.iterdir())
    return [p for p in paths if p.is_file() and p.name != STATE_FILE and p.name[0] != "."]


def file_digest(path: Path) -> dict[str, Any]:
    """Bytes and SHA-256 of a file."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        # 4 MiB at a time: the file may not fit into the memory that is left.
        while block := file.read(2**22):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _json_digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of an object's JSON. The spacing of the file does not count."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_state(folder: Path) -> dict[str, Any]:
    """trainer_state.json, checked.

    Raises:
        CheckpointError: it cannot be read, was changed after it was written, or lacks a part; or
            its history is not that of steps 1, 2, 3, ...
    """
    path = folder / STATE_FILE
    try:
        state = read_json(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    settings, records, files = (state.get(name) for name in ("settings", "history", "files"))
    wrong = not isinstance(settings, dict) or not isinstance(records, list) or not records
    if wrong or not isinstance(files, dict):
        raise CheckpointError(f"{path} lacks settings, history or files; was it edited?")
    problems = record_problems(records, from_first_step=True)
    raise_problems(CheckpointError, f"{path} has a broken history:", problems)
    content = {name: state[name] for name in ("settings", "history", "files")}
    if state.get("sha256") != _json_digest(content):
        raise CheckpointError(
            f"{path} was changed after fastlora.train wrote it: its content does not have the"
            " SHA-256 that it names."
        )
    return state


def file_problems(folder: Path, state: Mapping[str, Any]) -> list[str]:
    """One line for each file of a checkpoint that is not as trainer_state.json says it was."""
    problems = []
    for name in dict.fromkeys([OPTIMIZER_FILE, *state["files"]]):
        path, expected = folder / name, state["files"].get(name)
        # A name with a slash would lead to a file outside the checkpoint.
        if Path(name).name != name or not isinstance(expected, dict):
            problems.append(f"{name[:80]!r}: {STATE_FILE} has no digest of a file of this name")
        elif not path.is_file():
            problems.append(f"{name} is not there, or not a file")
        # The size first: it shows a file that was cut off without reading it.
        elif (size := path.stat().st_size) != expected.get("bytes"):
            problems.append(
                f"{name} has {size:,} bytes, and had {expected.get('bytes')} when saved"
            )
        else:
            problems += _content_problems(path, expected)
    return problems


def _content_problems(path: Path, expected: Mapping[str, Any]) -> list[str]:
    try:
        present = file_digest(path)
    except OSError as error:
        return [f"{path.name} cannot be read: {error.strerror}"]
    if present == expected:
        return []
    return [f"{path.name} has other bytes than when it was saved (its SHA-256 differs)"]


def _check_files(folder: Path, state: Mapping[str, Any]) -> None:
    """Raise a CheckpointError that lists every file which has changed since it was saved."""
    raise_problems(
        CheckpointError, f"{folder} is damaged, by {STATE_FILE}:", file_problems(folder, state)
    )


def restore_checkpoint(
    folder: Path, learner: Learner[StateT], identity: Mapping[str, Any], steps: int
) -> tuple[Learner[StateT], list[Record]]:
    """Fill the learner's adapter and optimizer from a checkpoint.

    Args:
        folder: the checkpoint.
        learner: of the run that resumes.
        identity: of that run.
        steps: of that run, in all.

    Returns:
        The learner (with the checkpoint's initial offset, if its base has one) and the records of
        the steps so far.

    Raises:
        ValueError: listing the settings in which this run differs from the checkpoint's.
        CheckpointError: a file is broken, was changed since it was saved, or holds other tensors
            than this adapter has.
    """
    state = read_state(folder)
    cure = "Give train what that run was given, or start a new one in another output_dir."
    heading = f"{folder} is a checkpoint of another run:"
    check_same_run(heading, state["settings"], identity, cure)
    if len(state["history"]) > steps:
        raise ValueError(
            f"{folder} is of step {len(state['history'])}, but the run ends at step {steps}."
            " Raise max_steps or num_epochs, or pass resume=False with another output_dir."
        )
    # After the settings: reading all files of an 8B model with a trained head takes seconds.
    _check_files(folder, state)
    model = restore_adapter(learner.model, folder)
    _restore_optimizer(folder / OPTIMIZER_FILE, learner, len(state["history"]))
    return replace(learner, model=model), state["history"]


def _restore_optimizer(path: Path, learner: Learner, done: int) -> None:
    """Fill the optimizer's state from a file, which must hold exactly the tensors of this state."""
    if is_custom(learner.optimizer):
        make_states(learner.optimizer)
        count_update(learner.optimizer, done)
    fresh = {name: fresh_state(learner.optimizer, leaf) for name, leaf in learner.leaves.items()}
    expected = {f"{name}.{key}": x for name, state in fresh.items() for key, x in state.items()}
    saved = read_safetensors(path)
    problems = tensor_differences(saved, expected, "the run")
    raise_problems(CheckpointError, f"{path} does not fit this run:", problems)
    for name, leaf in learner.leaves.items():
        state = {key: saved[f"{name}.{key}"] for key in fresh[name]}
        restore_state(learner.optimizer, leaf, state)


def complete_checkpoints(folder: Path) -> dict[int, Path]:
    """Step -> folder of every complete checkpoint, the newest last."""
    complete = [path for path in folder.glob("checkpoint-*") if (path / STATE_FILE).is_file()]
    steps = {step: path for path in complete if (step := step_of(path)) is not None}
    return dict(sorted(steps.items()))


def is_foreign(checkpoint: Path) -> bool:
    """Whether another program wrote a checkpoint: transformers' Trainer, and so TRL and Unsloth,
    write a trainer_state.json too."""
    try:
        state = read_json(checkpoint / STATE_FILE)
    except (OSError, CheckpointError):
        return False
    return not {"settings", "history", "files"} & state.keys()


def step_of(checkpoint: Path) -> int | None:
    """The step in a checkpoint's name; None for another name."""
    # At most 18 digits fit into int64. A longer name is not one that `train` wrote.
    match = re.fullmatch(r"checkpoint-(\d{1,18})", checkpoint.name)
    return int(match[1]) if match else None


def is_intact(checkpoint: Path) -> bool:
    """Whether no file of a checkpoint has changed since it was saved. Reads all of them."""
    try:
        _check_files(checkpoint, read_state(checkpoint))
    except CheckpointError:
        return False
    return True


def newest_intact(folder: Path, *, before: int | None = None) -> Path | None:
    """The newest undamaged checkpoint of a folder, of a step < `before`; None: there is none."""
    for step, path in reversed(complete_checkpoints(folder).items()):
        if (before is None or step < before) and is_intact(path):
            return path
    return None
