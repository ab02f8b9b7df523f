"""Which checkpoints stay, the best adapter of a run, and when a run stops early.

All of it follows from the evaluations in the history, so a resumed run decides as an uninterrupted
one does.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

from fastlora.checkpoints.atomic import atomic_write
from fastlora.errors import CheckpointError
from fastlora.formats.peft.names import map_named, named_leaves
from fastlora.formats.peft.restoring import restore_adapter
from fastlora.models.state import StateT, require_adapter
from fastlora.training.checkpoint import STATE_FILE, complete_checkpoints, is_intact
from fastlora.training.history import Record
from fastlora.training.learner import Learner
from fastlora.training.settings import Settings


def best_step(records: Sequence[Record]) -> int | None:
    """The step after which eval_data had its lowest loss, the earliest of equal ones; None: no
    evaluation yet."""
    evaluated = [record for record in records if "eval_loss" in record]
    return min(evaluated, key=lambda r: r["eval_loss"])["step"] if evaluated else None


def stops_early(records: Sequence[Record], patience: int | None) -> bool:
    """Whether the last `patience` evaluations were all no better than an earlier one."""
    losses = [record["eval_loss"] for record in records if "eval_loss" in record]
    if patience is None or not losses:
        return False
    return len(losses) - 1 - losses.index(min(losses)) >= patience


class Best:
    """Copies of the adapter's tensors, on the host, after the step with the lowest eval_loss."""

    def __init__(self) -> None:
        """No evaluation yet."""
        self.step: int | None = None
        self._tensors: Mapping[str, Tensor] = {}

    @classmethod
    def before(
        cls,
        settings: Settings,
        learner: Learner,
        records: Sequence[Record],
        checkpoint: Path | None,
        output: Path | None,
    ) -> "Best":
        """The best adapter of the steps so far, if the run keeps it. Arguments: see `read`."""
        best = cls()
        if settings.keep_best:
            best.read(learner, records, checkpoint, output)
        return best

    def update(self, learner: Learner, records: Sequence[Record]) -> bool:
        """Copy the learner's tensors if the last step is the best; returns whether it is."""
        step = best_step(records)
        if step is None or step != len(records) or step == self.step:
            return False
        self.step = step
        self._tensors = {n: x.detach().to("cpu", copy=True) for n, x in learner.leaves.items()}
        return True

    def read(
        self,
        learner: Learner,
        records: Sequence[Record],
        checkpoint: Path | None,
        output: Path | None,
    ) -> None:
        """Fill this from the files of the run that resumes; the learner ends as it was.

        Args:
            learner: restored from `checkpoint`.
            records: of the steps so far.
            checkpoint: the one to resume from; the best one is in the same folder.
            output: output_dir. The best checkpoint is copied to it if it lies elsewhere.

        Raises:
            CheckpointError: the best step's checkpoint is missing or damaged.
        """
        step = best_step(records)
        if step is None or checkpoint is None:
            return
        if step == len(records):
            self.update(learner, records)
            _copy_checkpoint(checkpoint, step, output)
            return
        folder = checkpoint.parent / f"checkpoint-{step}"
        if not (folder / STATE_FILE).is_file() or not is_intact(folder):
            raise CheckpointError(
                f"keep_best=True, but {folder}, of the step with the lowest eval_loss so far, is"
                " missing or damaged. Pass keep_best=False to continue without it."
            )
        # restore_adapter undoes the folding of initial offsets, which named tensors alone do not.
        model = restore_adapter(learner.model, folder)
        leaves = named_leaves(require_adapter(model)[1])
        self.step = step
        self._tensors = {n: x.detach().to("cpu", copy=True) for n, x in leaves.items()}
        restore_adapter(learner.model, checkpoint)
        _copy_checkpoint(folder, step, output)

    def model(self, last: StateT) -> StateT:
        """The best model, given that after the last step; the last one if nothing was evaluated."""
        if self.step is None:
            return last
        device = last.base["norm"].device
        _, adapter = require_adapter(last)
        best = map_named(lambda name, _: self._tensors[name].to(device), adapter)
        return replace(last, adapter=best)


def _copy_checkpoint(checkpoint: Path, step: int, output: Path | None) -> None:
    """Copy the checkpoint of a step to output/checkpoint-N, unless it is there. STATE_FILE comes
    last: a folder without it is incomplete."""
    if output is None or (output / f"checkpoint-{step}" / STATE_FILE).is_file():
        return
    target = output / f"checkpoint-{step}"
    target.mkdir(parents=True, exist_ok=True)
    names = [path.name for path in checkpoint.iterdir() if path.is_file()]
    for name in sorted(names, key=lambda name: name == STATE_FILE):
        with (checkpoint / name).open("rb") as source:
            atomic_write(target / name, partial(shutil.copyfileobj, source))


def remove_superseded(folder: Path, records: Sequence[Record], settings: Settings) -> None:
    """Delete the checkpoints that `keep` does not allow, and that of the best step before.

    Call it after the last step's checkpoint is complete. The best step's checkpoint stays.

    Args:
        folder: of the run.
        records: of the steps so far.
        settings: of the run: `keep`, `keep_best`, and `save_every`, whose checkpoints stay although
            another step is the best now.
    """
    last, keep, every = len(records), settings.keep, settings.save_every
    best, before = (
        best_step(some) if settings.keep_best else None for some in (records, records[:-1])
    )
    complete = complete_checkpoints(folder)
    superseded = set() if keep is None else {*list(complete)[:-keep]}
    if best == last and before is not None and (every is None or before % every):
        superseded.add(before)
    for step in superseded & complete.keys() - {best, last}:
        # First the file that makes it a checkpoint: a process that dies here leaves none that is
        # damaged.
        (complete[step] / STATE_FILE).unlink(missing_ok=True)
        shutil.rmtree(complete[step], ignore_errors=True)
