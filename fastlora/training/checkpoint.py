"""Checkpoints: saving a run, restoring it with the same bits, and the checks on both.

A checkpoint-N folder is a PEFT adapter folder and two more files:

    optimizer.safetensors   "<PEFT's tensor name>.<name in the optimizer's state>" -> tensor
    trainer_state.json      {"settings": run_identity(...), "history": one record per step}

trainer_state.json is written last: a folder without it is incomplete and is ignored.
"""

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from fastlora.checkpoints.tensors import read_json, read_safetensors, write_json, write_safetensors
from fastlora.errors import CheckpointError, raise_problems
from fastlora.formats.peft.restoring import restore_adapter
from fastlora.formats.peft.writing import save_adapter
from fastlora.models.names import projection_path
from fastlora.models.self_contained import self_contained
from fastlora.models.state import ModelState, StateT, require_adapter
from fastlora.training.history import Record, record_problems
from fastlora.training.learner import Learner
from fastlora.training.optimizers import fresh_state, restore_state, state_tensors
from fastlora.training.run import Run, Sequences

OPTIMIZER_FILE, STATE_FILE = "optimizer.safetensors", "trainer_state.json"


def save_checkpoint(
    folder: Path, learner: Learner, identity: Mapping[str, Any], records: Sequence[Record]
) -> None:
    """Write the adapter, then the optimizer's state, then the history."""
    # STATE_FILE must stay last: a process that is killed earlier leaves no complete checkpoint.
    save_adapter(learner.model, folder)
    state = {
        f"{name}.{key}": x
        for name, leaf in learner.leaves.items()
        for key, x in state_tensors(learner.optimizer, leaf).items()
    }
    write_safetensors(folder / OPTIMIZER_FILE, state)
    write_json(folder / STATE_FILE, {"settings": identity, "history": list(records)})


def restore_checkpoint(
    folder: Path, learner: Learner[StateT], run: Run
) -> tuple[Learner[StateT], list[Record]]:
    """Fill the learner's adapter and optimizer from a checkpoint.

    Returns:
        The learner (with the checkpoint's initial offset, if its base has one) and the records of
        the steps so far.

    Raises:
        ValueError: listing the settings in which this run differs from the checkpoint's.
        CheckpointError: a file is broken, or holds other tensors than this adapter has.
    """
    state = read_json(folder / STATE_FILE)
    settings, records = state.get("settings"), state.get("history")
    if not isinstance(settings, dict) or not isinstance(records, list) or not records:
        raise CheckpointError(f"{folder / STATE_FILE} lacks settings or history; was it edited?")
    raise_problems(
        CheckpointError, f"{folder / STATE_FILE} has a broken history:", record_problems(records)
    )
    _check_same_run(folder, settings, run_identity(run, learner.model))
    if len(records) > run.steps:
        raise ValueError(
            f"{folder} is of step {len(records)}, but the run ends at step {run.steps}."
        )
    learner = replace(learner, model=restore_adapter(learner.model, folder))
    _restore_optimizer(folder / OPTIMIZER_FILE, learner)
    return learner, records


def _restore_optimizer(path: Path, learner: Learner) -> None:
    """Fill the optimizer's state from a file, which must hold exactly the tensors of this state."""
    fresh = {name: fresh_state(learner.optimizer, leaf) for name, leaf in learner.leaves.items()}
    expected = {f"{name}.{key}": x for name, state in fresh.items() for key, x in state.items()}
    saved = read_safetensors(path)
    form = lambda x: "no such tensor" if x is None else f"{tuple(x.shape)} {x.dtype}"
    problems = [
        f"{name}: the file has {form(saved.get(name))}, the run {form(expected.get(name))}"
        for name in sorted(saved.keys() | expected.keys())
        if form(saved.get(name)) != form(expected.get(name))
    ]
    raise_problems(CheckpointError, f"{path} does not fit this run:", problems)
    for name, leaf in learner.leaves.items():
        state = {key: saved[f"{name}.{key}"] for key in fresh[name]}
        restore_state(learner.optimizer, leaf, state)


def run_identity(run: Run, model: ModelState) -> dict[str, Any]:
    """What must be equal for a resumed run to be the same run, as JSON values.

    Evaluating and saving do not change a run. Device, torch's version and the recompute policy
    change it by rounding only, so users may change them. The keys are part of the file format.
    """
    lora, adapter = require_adapter(model)
    settings = asdict(run.settings)
    # max_steps and num_epochs count by the number of steps that they lead to, which is below.
    for name in ("max_steps", "num_epochs", "eval_every", "save_every"):
        del settings[name]
    settings["max_grad_norm"] = run.settings.max_grad_norm or None  # 0 and None mean the same
    # With a constant rate and no warm-up, a step does not depend on the length of the run: such a
    # run may be extended.
    constant = run.settings.lr_scheduler == "constant" and not run.settings.warmup_ratio
    extras = lora.extras
    targets = {
        projection_path(i, t.name): {"r": t.r, "scaling": t.scaling}
        for i, layer in enumerate(lora.targets)
        for t in layer
    }
    edge_targets = (extras.embed_tokens, extras.lm_head)
    targets |= {t.name: {"r": t.r, "scaling": t.scaling} for t in edge_targets if t is not None}
    return settings | {
        "steps of the whole run": None if constant else run.steps,
        "hash of the training data": _hash_sequences(run.sequences),
        "hash of the base model": _hash_base(model),
        "adapter dtypes": sorted({str(x.dtype) for x in tree_leaves(adapter)}),
        "r": lora.r,
        "lora_dropout": lora.lora_dropout,
        "tensors trained whole": [*extras.replaced],
        "trained rows": {module: [*ids] for module, ids in extras.tokens},
        "embedding and head tied": extras.tied or extras.shared_rows,
        **targets,
    }


def _check_same_run(folder: Path, saved: Mapping[str, Any], present: Mapping[str, Any]) -> None:
    show = lambda settings, name: repr(settings[name]) if name in settings else "absent"
    # A setting that only one of the two has counts as None in the other.
    problems = [
        f"{name}: {show(saved, name)} there, {show(present, name)} now"
        for name in dict.fromkeys([*present, *saved])  # settings before the many projections
        if saved.get(name) != present.get(name)
    ]
    cure = "Give train what that run was given, or start a new one in another output_dir."
    raise_problems(
        ValueError, f"{folder} is a checkpoint of another run:", problems, cure, shown=20
    )


def _hash_sequences(sequences: Sequences) -> str:
    digest = hashlib.sha256()
    for sequence in sequences:
        for column in (getattr(sequence, field.name) for field in fields(sequence)):
            # The length first, so that two columns cannot be mistaken for one.
            digest.update(len(column).to_bytes(8, "little") + column.tobytes())
    return digest.hexdigest()[:16]


def _hash_base(model: ModelState) -> str:
    """A hash of the first 64 elements of every tensor.

    Takes milliseconds, and changes when the base is merged or fine-tuned.
    """
    base = self_contained(model, unpark=False).base
    # To the CPU one by one: parked originals are there already, the other tensors on the GPU.
    parts = [leaf.reshape(-1)[:64].double().cpu() for leaf in tree_leaves(base)]
    return hashlib.sha256(torch.cat(parts).numpy().tobytes()).hexdigest()[:16]


def complete_checkpoints(folder: Path) -> dict[int, Path]:
    """Step -> folder of every complete checkpoint, the newest last."""
    complete = {
        int(match[1]): path
        for path in folder.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and (path / STATE_FILE).is_file()
    }
    return dict(sorted(complete.items()))


def checkpoint_to_resume(resume: bool | str | os.PathLike[str], folder: Path | None) -> Path | None:
    """The checkpoint from which `train` continues, or None for a new run.

    Raises:
        FileNotFoundError: `resume` does not lead to a complete checkpoint.
    """
    if isinstance(resume, bool):
        if not resume or folder is None:
            return None
        if not (complete := complete_checkpoints(folder)):
            raise FileNotFoundError(
                f"resume=True, but {folder} holds no complete checkpoint; start with resume=False"
                " and save_every=..."
            )
        return list(complete.values())[-1]
    if not (Path(resume) / STATE_FILE).is_file():
        inside = [path.name for path in complete_checkpoints(Path(resume)).values()]
        cure = f"choose one of {inside}" if inside else "is it a checkpoint-N of fastlora.train?"
        raise FileNotFoundError(f"resume={os.fspath(resume)!r}: no {STATE_FILE} there; {cure}")
    return Path(resume)


def refuse_to_overwrite(folder: Path | None, done: int, resumed_from: Path | None) -> None:
    """Raise a ValueError if the folder has checkpoints of steps after the first `done` ones: they
    belong to another run, or to a later part of this one."""
    complete = {} if folder is None else complete_checkpoints(folder)
    later = [path.name for step, path in complete.items() if step > done]
    if later:
        begins = f"continues from {resumed_from}" if resumed_from else "starts at step 1"
        raise ValueError(
            f"{folder} holds {', '.join(later)}, and this run {begins}: pass resume=True to"
            " continue from the newest, or delete them, or choose another output_dir."
        )
