"""checkpoint."""

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fastlora.checkpoints.tensors import read_json, read_safetensors, write_json, write_safetensors
from fastlora.errors import CheckpointError, raise_problems
from fastlora.formats.peft.base_tensors import base_tensors_out
from fastlora.formats.peft.expert_layout import unpacked
from fastlora.formats.peft.names import peft_state_dict
from fastlora.formats.peft.writing import WEIGHTS_FILE
from fastlora.model import Model
from fastlora.models.init_offset import fold_offset, unfold_offset, with_offset, without_offset
from fastlora.models.names import projection_path
from fastlora.models.self_contained import unpark_originals
from fastlora.training.history import Record
from fastlora.training.optimizers import fresh_state, restore_state, state_tensors
from fastlora.training.run import Sequences, TrainingPlan
from fastlora.training.step import Learner, leaves_by_name

OPTIMIZER_FILE, STATE_FILE = "optimizer.safetensors", "trainer_state.json"


# ── 4. checkpoints ────────────────────────────────────────────────────────────────────────
def save_checkpoint(
    folder: Path, learner: Learner, identity: Mapping[str, Any], records: Sequence[Record]
) -> None:
    """Adapter, moments, then the history, whose file is the seal: without it, no checkpoint."""
    learner.model.save_pretrained(folder)
    state = {
        f"{name}.{kind}": x
        for name, leaf in leaves_by_name(learner.model.adapter).items()
        for kind, x in state_tensors(learner.optimizer, leaf).items()
    }
    write_safetensors(folder / OPTIMIZER_FILE, state)
    write_json(folder / STATE_FILE, {"settings": identity, "history": list(records)})


def restore_checkpoint(
    folder: Path, learner: Learner, identity: Mapping[str, Any], steps: int
) -> tuple[Learner, list[Record]]:
    """Fill the learner's adapter and optimiser from a checkpoint; gives it, with the start factors
    of the checkpoint where its base has some, and the history.

    Raises:
        ValueError: listing the settings that would make another run of it.
        CheckpointError: if a file is broken, or holds other tensors than this adapter has.
    """
    state = read_json(folder / STATE_FILE)
    settings, records = state.get("settings"), state.get("history")
    if not isinstance(settings, dict) or not isinstance(records, list) or not records:
        raise CheckpointError(f"{folder / STATE_FILE} lacks settings or history; was it edited?")
    _check_same_run(folder, settings, identity)
    if len(records) > steps:
        raise ValueError(f"{folder} is of step {len(records)}, but the run ends at step {steps}.")
    model = learner.model
    leaves = leaves_by_name(model.adapter)
    spec, equal = fold_offset(model.spec, model.base, model.adapter)
    assert model.adapter is not None and equal is not None and spec.lora is not None
    own = peft_state_dict(equal, spec.lora) | base_tensors_out(spec, model.base)
    adapter = _read_as(folder / WEIGHTS_FILE, own)
    fresh = {name: fresh_state(learner.optimizer, leaf) for name, leaf in leaves.items()}
    expected = {f"{name}.{kind}": x for name, of in fresh.items() for kind, x in of.items()}
    saved = _read_as(folder / OPTIMIZER_FILE, expected)
    for name, leaf in leaves.items():
        stored = adapter[name]
        if leaf.dim() == 3:
            stored = unpacked(name, stored, leaf.shape[0])
        leaf.copy_(stored[tuple(slice(n) for n in leaf.shape)])  # larger where it holds a start
        own_state = {kind: saved[f"{name}.{kind}"] for kind in fresh[name]}
        restore_state(learner.optimizer, leaf, own_state)
    if equal is not model.adapter:
        read = {
            id(x): adapter[name].to(x.device, copy=True)
            for name, x in leaves_by_name(equal).items()
        }
        found = unfold_offset(tree_map(lambda x: read[id(x)], equal), model.adapter)
        learner = learner._replace(model=replace(model, base=with_offset(model.base, found)))
    return learner, records


def _read_as(path: Path, likes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors, which must have the names, shapes and dtypes of `likes`."""
    tensors = read_safetensors(path)
    kind = lambda x: None if x is None else (tuple(x.shape), str(x.dtype))
    problems = [
        f"{name}: the file has {kind(tensors.get(name))}, the run {kind(likes.get(name))}"
        for name in sorted(tensors.keys() | likes.keys())
        if kind(tensors.get(name)) != kind(likes.get(name))
    ]
    raise_problems(CheckpointError, f"{path} does not fit this run:", problems)
    return tensors


def run_identity(run: TrainingPlan, model: Model) -> dict[str, Any]:
    """What must be equal for a resumed run to be the same run, as JSON has it.

    Evaluating and saving do not change a run. Device, torch's version and the recompute policy
    change it by rounding only, so they are left to the user.
    """
    lora = model.spec.lora
    assert lora is not None
    settings = asdict(run.settings)
    for name in ("max_steps", "num_epochs", "eval_every", "save_every"):
        del settings[name]
    settings["max_grad_norm"] = run.settings.max_grad_norm or None
    # A constant rate without warm-up is the same however long the run: it may be prolonged.
    constant = run.settings.lr_scheduler == "constant" and not run.settings.warmup_ratio
    extras = lora.extras
    targets = {
        projection_path(i, t.name): {"r": t.r, "scaling": t.scaling}
        for i, layer in enumerate(lora.targets)
        for t in layer
    }
    ends = (extras.embed_tokens, extras.lm_head)
    targets |= {t.name: {"r": t.r, "scaling": t.scaling} for t in ends if t is not None}
    return settings | {
        "steps of the whole run": None if constant else run.steps,
        "hash of the training data": _hash_sequences(run.sequences),
        "hash of the base model": _hash_base(model),
        "adapter dtypes": sorted({str(x.dtype) for x in tree_leaves(model.adapter)}),
        "r": lora.r,
        "lora_dropout": lora.lora_dropout,
        "tensors trained whole": [*extras.replaced],
        "trained rows": {end: [*ids] for end, ids in extras.tokens},
        "embedding and head tied": extras.tied or extras.shared_rows,
        **targets,
    }


def _check_same_run(folder: Path, saved: Mapping[str, Any], present: Mapping[str, Any]) -> None:
    show = lambda settings, name: repr(settings[name]) if name in settings else "absent"
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
            digest.update(len(column).to_bytes(8, "little") + column.tobytes())
    return digest.hexdigest()[:16]


def _hash_base(model: Model) -> str:
    """Of every tensor's first 64 elements: milliseconds, and a merge or fine-tuning shows."""
    base = unpark_originals(without_offset(model.base))
    parts = [leaf.reshape(-1)[:64].double() for leaf in tree_leaves(base)]
    return hashlib.sha256(torch.cat(parts).cpu().numpy().tobytes()).hexdigest()[:16]


def _checkpoints(folder: Path) -> dict[int, Path]:
    """Step -> folder of every whole checkpoint, the newest last."""
    found = {
        int(match[1]): path
        for path in folder.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and (path / STATE_FILE).is_file()
    }
    return dict(sorted(found.items()))


def checkpoint_to_resume(resume: bool | str | os.PathLike[str], folder: Path | None) -> Path | None:
    if isinstance(resume, bool):
        if not resume or folder is None:
            return None
        if not (found := _checkpoints(folder)):
            raise FileNotFoundError(
                f"resume=True, but {folder} holds no whole checkpoint; start with resume=False and "
                "save_every=..."
            )
        return list(found.values())[-1]
    if not (Path(resume) / STATE_FILE).is_file():
        inside = [path.name for path in _checkpoints(Path(resume)).values()]
        cure = f"choose one of {inside}" if inside else "is it a checkpoint-N of fastlora.train?"
        raise FileNotFoundError(f"resume={os.fspath(resume)!r}: no {STATE_FILE} there; {cure}")
    return Path(resume)


def check_not_behind(folder: Path | None, start: int, source: Path | None) -> None:
    """Refuse to write over checkpoints of another run, or later ones of the same."""
    found = {} if folder is None else _checkpoints(folder)
    later = [path.name for step, path in found.items() if step > start]
    if later:
        begin = f"begins after {source}" if source else "begins anew"
        raise ValueError(
            f"{folder} holds {', '.join(later)}, and this run {begin}: pass resume=True to go on "
            "from the newest, or delete them, or choose another output_dir."
        )
