"""training_points(): the checkpoints of a run, as the points at which influence is measured."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map

from fastlora.arguments import PATH, check_arguments
from fastlora.checkpoints.tensors import read_safetensors
from fastlora.errors import CheckpointError, raise_problems
from fastlora.formats.peft.names import map_named
from fastlora.formats.peft.restoring import restore_adapter
from fastlora.models.init_offset import has_offset
from fastlora.models.input_checks import MODEL
from fastlora.models.stacks import check_one_adapter
from fastlora.models.state import ModelState, require_adapter
from fastlora.ops.dispatch import refuse_transforms
from fastlora.training.checkpoint import (
    OPTIMIZER_FILE,
    complete_checkpoints,
    file_problems,
    read_state,
)


@dataclass(frozen=True, eq=False, kw_only=True)
class TrainingPoint:
    """The state of a training run after some step."""

    adapter: Any
    learning_rate: float  # mean over the steps since the point before
    step: int = 0  # updates so far
    exp_avg: Any = None  # Adam's moments, trees like the adapter; None: unknown
    exp_avg_sq: Any = None


def training_points(model: ModelState, output_dir: str | os.PathLike[str]) -> list[TrainingPoint]:
    """The complete checkpoints of a run of `fastlora.train`, oldest first.

    A point counts with the mean learning rate of the steps since the checkpoint before it. Adam's
    moments are read if the run's optimizer was "adamw"; "less" needs them.

    Args:
        model: with the run's base and adapter settings; its adapter's values are not read.
        output_dir: of the run, which was given `save_every`. `keep=None` keeps all checkpoints.

    Raises:
        ValueError: an argument is wrong, the adapter is a stack, or the base has an initial
            offset (PiSSA, OLoRA, ...), which each checkpoint folds into its adapter.
        CheckpointError: there is no complete checkpoint, or one is damaged or of another model.
        RuntimeError: a torch.func transform is active.
    """
    refuse_transforms("research.training_points")
    rules = {"model": (model, MODEL), "output_dir": (output_dir, PATH)}
    check_arguments("research.training_points", **rules)
    _, adapter = require_adapter(model)
    check_one_adapter(model)
    if has_offset(model.base):
        raise ValueError(
            "research.training_points: the base has an initial offset; use an adapter that starts"
            " from init_lora_weights=True."
        )
    folders = complete_checkpoints(Path(output_dir))
    if not folders:
        raise CheckpointError(
            f"{os.fspath(output_dir)} has no complete checkpoint; pass save_every to train."
        )
    points, first = [], 0
    for step, folder in folders.items():
        points.append(_read(replace(model, adapter=tree_map(Tensor.clone, adapter)), folder, first))
        first = step
    return points


def _read(model: ModelState, folder: Path, first: int) -> TrainingPoint:
    """The point of a checkpoint, whose values are copied into the model's adapter."""
    state = read_state(folder)
    heading = f"{folder} is damaged, by its trainer_state.json:"
    raise_problems(CheckpointError, heading, file_problems(folder, state))
    _, adapter = require_adapter(restore_adapter(model, folder))
    records: Sequence[Mapping[str, Any]] = state["history"]
    rates = [record["learning_rate"] for record in records[first:]]
    moments: dict[str, Any] = {}
    if state["settings"].get("optimizer") == "adamw":
        saved = read_safetensors(folder / OPTIMIZER_FILE)
        for name in ("exp_avg", "exp_avg_sq"):
            take = lambda key, x, name=name: saved[f"{key}.{name}"].to(x.device, copy=True)
            moments[name] = map_named(take, adapter)
    return TrainingPoint(
        adapter=adapter, learning_rate=sum(rates) / len(rates), step=len(records), **moments
    )
