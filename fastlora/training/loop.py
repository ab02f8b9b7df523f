"""train(): check, encode the data, run the steps, save the adapter.

A run is a pure function of its arguments. The order of the data depends on (seed, epoch), dropout
masks depend on (seed, step, micro-batch), and no random generator carries state from one step to
the next. A checkpoint therefore needs nothing but the adapter, the optimizer's state and the
history.

To change the loop, copy `_run_steps`.
"""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from time import perf_counter

from tqdm import tqdm

from fastlora.arguments import settings_from
from fastlora.data.rows import Row
from fastlora.formats.peft.writing import save_adapter
from fastlora.models.state import StateT
from fastlora.text.tokenizer import Tokenizer
from fastlora.training.checkpoint import (
    checkpoint_to_resume,
    refuse_to_overwrite,
    restore_checkpoint,
    run_identity,
    save_checkpoint,
)
from fastlora.training.history import History, Record, progress_figures
from fastlora.training.learner import Learner, make_learner
from fastlora.training.run import Run, prepare_run
from fastlora.training.settings import Settings, check_train_arguments
from fastlora.training.step import evaluate, optimizer_step


def train(
    model: StateT,
    tokenizer: Tokenizer | None,
    data: str | os.PathLike[str] | Iterable[Row],
    *,
    eval_data: str | os.PathLike[str] | Iterable[Row] | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    max_steps: int | None = None,
    num_epochs: float = 1,
    batch_size: int = 8,
    gradient_accumulation_steps: int = 1,
    learning_rate: float = 2e-4,
    lr_scheduler: str = "cosine",
    warmup_ratio: float = 0.03,
    weight_decay: float = 0.0,
    max_grad_norm: float | None = 1.0,
    optimizer: str = "adamw",
    packing: bool = True,
    train_on: str = "responses",
    eval_every: int | None = None,
    save_every: int | None = None,
    resume: bool | str | os.PathLike[str] = False,
    seed: int = 3407,
    log: Callable[[Record], object] | None = None,
    progress: bool = True,
) -> tuple[StateT, History]:
    """The model with a trained adapter, and the history. The given model's tensors are not changed.

    The loss of a step is the mean over the trained tokens of all its micro-batches together, so the
    result depends on batch_size x gradient_accumulation_steps and not on how it is split. The same
    arguments give the same bits on the CPU, whether the run was resumed or not.

    Args:
        model: with an adapter (`fastlora.lora`).
        tokenizer: the model's.
        data: a .jsonl or .json file, or dicts; see `data.read_rows`.
        eval_data: the same; evaluated after the last step, and every `eval_every` steps.
        output_dir: a folder for the trained adapter, in PEFT's format, and for checkpoints.
        max_steps: optimizer steps; overrides `num_epochs`.
        num_epochs: passes over the data; may be a fraction.
        batch_size: sequences in a micro-batch. A full step has `gradient_accumulation_steps` times
            as many.
        gradient_accumulation_steps: micro-batches in a step.
        learning_rate: the highest of the run.
        lr_scheduler: after the warm-up, "cosine" or "linear" decay to 0, or "constant".
        warmup_ratio: share of all steps over which the rate rises from 0, rounded up.
        weight_decay: AdamW's, for A and B alike.
        max_grad_norm: gradients with a larger norm are scaled down to it; None or 0: no clipping.
        optimizer: "adamw": torch's, betas (0.9, 0.999), eps 1e-8. "adamw_8bit": with 8-bit moments,
            from bitsandbytes. "paged_adamw_8bit": with 8-bit moments that CUDA moves to host memory
            when the GPU is full; on CUDA only.
        packing: fill sequences of exactly `model.spec.max_seq_length` tokens with complete rows
            that do not attend to each other; plain text that is too long is split. Where the
            attention kernels do not run (on the CPU, in float32, for head sizes other than 64 and
            128), the attention mask takes batch_size x max_seq_length**2 bytes; train refuses more
            than 8 GiB of it on every device. Lower max_seq_length to a length that your rows fill.
            Without packing, a batch is padded to its longest row.
        train_on: "responses" or "all"; see `data.encode_rows`.
        eval_every: steps.
        save_every: steps. output_dir/checkpoint-N is an adapter folder with the files that `resume`
            needs. The last step is saved too.
        resume: True continues from the newest complete checkpoint in `output_dir`, a path from that
            checkpoint.
        seed: of the order of the data and of dropout.
        log: called after every step with a dict of step, loss, learning_rate, tokens, seconds and
            grad_norm, as in `History`, and eval_loss after an evaluation.
        progress: show a bar on stderr with the loss, tokens (trained or not) per second and peak
            memory.

    Raises:
        ValueError: listing every argument of a wrong type or value, every unusable row, or every
            setting in which a resumed run differs from its checkpoint.
        ModuleNotFoundError: the optimizer belongs to bitsandbytes, which is not installed.
        FileNotFoundError: the file of rows or the checkpoint to resume from does not exist.
        CheckpointError: a file of rows or a checkpoint is broken.
        FloatingPointError: a loss or gradient is NaN or infinite; files stay unchanged.
    """
    # Must come first: locals() may hold nothing but the arguments.
    settings = settings_from(Settings, locals())
    check_train_arguments(
        settings,
        model=model,
        tokenizer=tokenizer,
        data=data,
        eval_data=eval_data,
        output_dir=output_dir,
        resume=resume,
        log=log,
        progress=progress,
    )
    assert tokenizer is not None
    folder = None if output_dir is None else Path(output_dir)

    # Every row is encoded before the first step, so a bad row is reported within seconds.
    run = prepare_run(model.spec, tokenizer, settings, data, eval_data)
    learner, records = make_learner(model, settings), []
    # Restoring compares the run with the checkpoint's, so it needs the encoded data.
    checkpoint = checkpoint_to_resume(resume, folder)
    if checkpoint is not None:
        learner, records = restore_checkpoint(checkpoint, learner, run)
    refuse_to_overwrite(folder, len(records), checkpoint)

    _run_steps(run, learner, records, folder, log, progress)

    if folder is not None:
        save_adapter(learner.model, folder)
    return learner.model, History.of(records)


def _run_steps(
    run: Run,
    learner: Learner,
    records: list[Record],
    folder: Path | None,
    log: Callable[[Record], object] | None,
    progress: bool,
) -> None:
    """Run the steps that `records` does not have yet. Each writes to the learner's tensors and
    appends its figures to `records`; evaluation and checkpoints follow when they are due."""
    s, done = run.settings, len(records)
    # Training changes none of it, so it is computed once for all checkpoints.
    identity = run_identity(run, learner.model) if s.save_every else {}
    # The last step is always due.
    is_due = lambda step, every: step == run.steps or (every is not None and step % every == 0)
    steps = zip(range(done + 1, run.steps + 1), run.micro_batches(done), strict=False)
    with tqdm(total=run.steps, initial=done, disable=not progress, unit="step") as bar:
        started = perf_counter()
        for step, micro_batches in steps:
            record = optimizer_step(run, learner, step, micro_batches)
            # optimizer_step ends with a read from the device, so all its work is done here.
            record["seconds"] = perf_counter() - started
            if run.eval_sequences and is_due(step, s.eval_every):
                record["eval_loss"] = evaluate(run, learner.model, step)
            records.append(record)
            if folder is not None and s.save_every and is_due(step, s.save_every):
                save_checkpoint(folder / f"checkpoint-{step}", learner, identity, records)
            if progress:
                device = learner.model.base["norm"].device
                bar.set_postfix(progress_figures(record, micro_batches, device), refresh=False)
            bar.update()
            if log is not None:
                log(dict(record))  # a copy: log may change it
            # Evaluation, saving and log are not counted; the next step's batch is.
            started = perf_counter()
