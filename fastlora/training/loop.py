"""train(): check, encode the data, run the steps, save the adapter.

A run is a pure function of its arguments. The order of the data depends on (seed, epoch), dropout
masks depend on (seed, step, micro-batch), and no random generator carries state from one step to
the next. A checkpoint therefore needs nothing but the adapter, the optimizer's state and the
history.

To change the loop, copy `_run_steps`.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

from tqdm import tqdm

from fastlora.arguments import settings_from
from fastlora.data.rows import Row
from fastlora.errors import CheckpointError
from fastlora.formats.peft.writing import save_adapter
from fastlora.models.state import StateT
from fastlora.text.tokenizer import Tokenizer
from fastlora.training.checkpoint import restore_checkpoint, save_checkpoint
from fastlora.training.history import History, Record, progress_figures
from fastlora.training.identity import run_identity
from fastlora.training.learner import Learner, make_learner
from fastlora.training.lock import output_lock
from fastlora.training.output_folder import (
    add_way_on,
    check_space,
    checkpoint_to_resume,
    refuse_to_overwrite,
    run_bytes,
    write_run_file,
)
from fastlora.training.recovery import kept_on_failure
from fastlora.training.run import Run, prepare_run
from fastlora.training.settings import Settings, check_train_arguments
from fastlora.training.signals import StopRequest
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
    result depends on batch_size x gradient_accumulation_steps and not on how it is split. The mean
    is taken after the backward pass, so a float16 base loses no digits in large steps. The same
    arguments give the same bits on the CPU, whether the run was resumed or not.

    Ctrl-C (SIGINT) and SIGTERM end a run in the main thread after its step: the state is saved to
    output_dir/checkpoint-N, and a SystemExit with status 130 or 143 is raised (after Ctrl-C it is a
    KeyboardInterrupt too). A second signal ends it at once, without saving. The state is also saved
    if `log` raises, a loss is NaN or a save fails; if output_dir cannot be written, in a new folder
    fastlora-... of the system's temporary folder. A note of the exception says where. Its
    attributes `trained_model` and `history` hold the state too, also without output_dir.

    Args:
        model: with an adapter (`fastlora.lora`).
        tokenizer: the model's.
        data: a .jsonl or .json file, or dicts; see `data.read_rows`.
        eval_data: the same; evaluated after the last step, and every `eval_every` steps.
        output_dir: a folder for the trained adapter, in PEFT's format, and for checkpoints. It is
            locked during the run: a second run is refused. An adapter or checkpoints of another run
            in it are refused too, before the first step. training_run.json tells which run the
            adapter is of.
        max_steps: optimizer steps; overrides `num_epochs`.
        num_epochs: passes over the data; may be a fraction.
        batch_size: sequences in a micro-batch. A full step has `gradient_accumulation_steps` times
            as many.
        gradient_accumulation_steps: micro-batches in a step.
        learning_rate: the highest of the run.
        lr_scheduler: after the warm-up, "cosine" or "linear" decay to 0, or "constant".
        warmup_ratio: share of all steps over which the rate rises from 0, rounded up. The first
            step of a warm-up has rate 0; a run of one step has no warm-up.
        weight_decay: AdamW's, for A, B and other matrices. Norms, biases and DoRA's magnitudes have
            none.
        max_grad_norm: gradients with a larger norm are scaled down to it; None or 0: no clipping.
        optimizer: "adamw": torch's, betas (0.9, 0.999), eps 1e-8. "adamw_8bit": with 8-bit moments,
            from bitsandbytes. "paged_adamw_8bit": with 8-bit moments that CUDA moves to host memory
            when the GPU is full; on CUDA only.
        packing: fill sequences of exactly `model.spec.max_seq_length` tokens with complete rows
            that do not attend to each other; plain text that is too long is split. Where the
            attention kernels do not run (on the CPU, in float32, for head sizes other than 64 and
            128), the attention mask takes batch_size x max_seq_length**2 bytes; train refuses more
            than 8 GiB of it. Lower max_seq_length to a length that your rows fill. Without packing,
            a batch is padded to its longest row.
        train_on: "responses" or "all"; see `data.encode_rows`.
        eval_every: steps.
        save_every: steps. output_dir/checkpoint-N is an adapter folder with the files that `resume`
            needs. The last step is saved too.
        resume: True continues from the newest complete checkpoint in `output_dir`, "auto" does so
            if there is one and else starts a run, a path continues from that checkpoint. The files
            of a checkpoint must have the SHA-256 that they had when they were saved. If the newest
            is damaged, the error names the one to continue from, which replaces the damaged ones
            after it.
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
        OSError: the disk is too full for the run's checkpoints and adapter (found before the first
            step), or a file cannot be written. The message names the path and the bytes.
        FloatingPointError: a loss or gradient is NaN or infinite. The message names the tensor, or
            the sequence and the layer. The step's update is not applied.
        SystemExit: SIGINT or SIGTERM ended the run; see above.
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

    with output_lock(folder):
        # Every row is encoded before the first step, so a bad row is reported within seconds.
        run = prepare_run(model.spec, tokenizer, settings, data, eval_data)
        learner = make_learner(model, settings)
        checkpoint = checkpoint_to_resume(resume, folder)
        # Training changes none of it, so it is computed once for all checkpoints.
        saves = folder is not None or checkpoint is not None
        identity = run_identity(run, learner.model) if saves else {}
        learner, records = _start(checkpoint, learner, identity, run.steps)
        refuse_to_overwrite(folder, len(records), checkpoint, identity)
        if folder is not None:
            needed = run_bytes(learner, settings, len(records), run.steps)
            check_space(folder, needed, "the run, with all its checkpoints,")
        stop = StopRequest()
        with stop.listening(), kept_on_failure(folder, learner, records, identity, stop):
            _run_steps(run, learner, records, identity, folder, stop, log, progress)
            if folder is not None:
                write_run_file(folder, identity, records)
                save_adapter(learner.model, folder)
            # A signal during the last step or save: the run has finished.
            if stop.signal is not None:
                raise stop.error()
    return learner.model, History.of(records)


def _start(
    checkpoint: Path | None, learner: Learner[StateT], identity: Mapping[str, Any], steps: int
) -> tuple[Learner[StateT], list[Record]]:
    """The learner before the first step that is to be run, and the records of the steps before."""
    if checkpoint is None:
        return learner, []
    try:
        return restore_checkpoint(checkpoint, learner, identity, steps)
    except CheckpointError as error:
        raise add_way_on(error, checkpoint) from error


def _run_steps(
    run: Run,
    learner: Learner,
    records: list[Record],
    identity: Mapping[str, Any],
    folder: Path | None,
    stop: StopRequest,
    log: Callable[[Record], object] | None,
    progress: bool,
) -> None:
    """Run the steps that `records` does not have yet. Each writes to the learner's tensors and
    appends its figures to `records`; evaluation and checkpoints follow when they are due."""
    s, done = run.settings, len(records)
    # The last step is always due.
    is_due = lambda step, every: step == run.steps or (every is not None and step % every == 0)
    steps = zip(range(done + 1, run.steps + 1), run.micro_batches(done), strict=False)
    with tqdm(total=run.steps, initial=done, disable=not progress, unit="step") as bar:
        started = perf_counter()
        for step, micro_batches in steps:
            record = optimizer_step(run, learner, step, micro_batches)
            # optimizer_step ends with a read from the device, so all its work is done here.
            record["seconds"] = perf_counter() - started
            records.append(record)
            if run.eval_sequences and is_due(step, s.eval_every):
                record["eval_loss"] = evaluate(run, learner.model, step)
            if folder is not None and s.save_every and is_due(step, s.save_every):
                save_checkpoint(folder / f"checkpoint-{step}", learner, identity, records)
            if progress:
                device = learner.model.base["norm"].device
                bar.set_postfix(progress_figures(record, micro_batches, device), refresh=False)
            bar.update()
            # Last, so that an error in the user's function finds the step's checkpoint written.
            if log is not None:
                log(dict(record))  # a copy: log may change it
            if stop.signal is not None and step < run.steps:
                raise stop.error()
            # Evaluation, saving and log are not counted; the next step's batch is.
            started = perf_counter()
