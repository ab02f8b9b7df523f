"""evaluate_and_save(): what follows an optimizer step when it is due."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastlora.training.checkpoint import save_checkpoint
from fastlora.training.common_run import compare_adapters
from fastlora.training.history import Record
from fastlora.training.keeping import Best, remove_superseded, stops_early
from fastlora.training.learner import Learner
from fastlora.training.run import Run
from fastlora.training.step import evaluate


def evaluate_and_save(
    run: Run,
    learner: Learner,
    records: list[Record],
    identity: Mapping[str, Any],
    folder: Path | None,
    best: Best,
    eval_loss: float | None = None,
) -> bool:
    """Evaluate, write samples and save after the last step of `records`, if they are due.

    Args:
        run: settings, sequences of eval_data, and the function that writes samples.
        learner: after the step.
        records: of the steps so far; the last one gets "eval_loss" and "samples".
        identity: of the run, for checkpoints.
        folder: output_dir, or None.
        best: gets a copy of the adapter with the lowest eval_loss.
        eval_loss: of this step, if it is known; None: it is computed if it is due.

    Returns:
        Whether the run ends with this step.

    Raises:
        FloatingPointError: the loss of eval_data is NaN or infinite.
        OSError: a checkpoint cannot be written.
    """
    s, step = run.settings, len(records)
    ends = step == run.steps
    due = evaluation_is_due(run, step)
    if run.eval_sequences and due:
        if eval_loss is None:
            eval_loss = evaluate(run, learner.model, step)
        records[-1]["eval_loss"] = eval_loss
        ends = ends or stops_early(records, s.early_stopping)
    if run.samples is not None and due:
        records[-1]["samples"] = run.samples(learner.model)
    save = s.save_every is not None and (ends or _is_due(step, s.save_every))
    if s.keep_best and best.update(learner, records):
        save = True  # a run that resumes needs the best adapter
    if save:
        compare_adapters(run.ranks, learner.model, step)
    if save and folder is not None:
        save_checkpoint(folder / f"checkpoint-{step}", learner, identity, records)
        remove_superseded(folder, records, s)
    return ends


def evaluation_is_due(run: Run, step: int) -> bool:
    """Whether eval_data is evaluated, and samples are written, after a step."""
    return step == run.steps or _is_due(step, run.settings.eval_every)


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
