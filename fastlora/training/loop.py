"""train(): rows in, a trained adapter and its history out.

Read downward: what a run is made of; the run; one optimiser step; checkpoints; what is refused.
A run is a pure function of its arguments. The order of the data comes from (seed, epoch), the
dropout masks from (seed, step, micro-batch), and no generator has a state that could be lost: that
is why a checkpoint needs nothing but the adapter, the optimiser's moments and the history.
"""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from time import perf_counter

from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from fastlora.checkpoints.output_folders import folder_error
from fastlora.data.rows import Row
from fastlora.errors import raise_problems
from fastlora.model import Model
from fastlora.text.tokenizer import Tokenizer
from fastlora.training.checkpoint import (
    check_not_behind,
    checkpoint_to_resume,
    restore_checkpoint,
    run_identity,
    save_checkpoint,
)
from fastlora.training.history import History, Record, bar_postfix
from fastlora.training.optimizers import OPTIMIZERS, optimizer_problems
from fastlora.training.run import TrainingPlan, make_plan
from fastlora.training.settings import (
    Settings,
    companion_problems,
    mask_problems,
    model_problems,
    setting_problems,
)
from fastlora.training.step import Learner, evaluate, make_learner, optimizer_step, use_cuda_graph


# ── 2. the run ────────────────────────────────────────────────────────────────────────────
def train(
    model: Model,
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
) -> tuple[Model, History]:
    """(The model with a trained adapter, the history); the given model's tensors are not written.

    The loss of a step is the mean over the trained tokens of all its micro-batches together, so
    that batch_size x gradient_accumulation_steps counts and not how it is split. The same arguments
    give the same bits on the CPU, resumed or not.

    Args:
        model: with an adapter (`fastlora.lora`).
        tokenizer: the model's.
        data: a .jsonl or .json file or dicts; see `data.read_rows`.
        eval_data: the same; evaluated after the last step, and every `eval_every` steps.
        output_dir: gets the adapter at the end, as a PEFT folder, and the checkpoints.
        max_steps: optimiser steps; goes before `num_epochs`.
        num_epochs: passes over the data; may be a fraction.
        batch_size: sequences in a micro-batch; a full step has `gradient_accumulation_steps` times
            as many.
        gradient_accumulation_steps: micro-batches in a step.
        learning_rate: the highest of the run.
        lr_scheduler: "cosine" or "linear" down to 0, or "constant", after the warm-up.
        warmup_ratio: share of all steps over which the rate rises from 0, rounded up.
        weight_decay: AdamW's, of A and B alike.
        max_grad_norm: longer gradients are scaled down to it; None or 0 is never.
        optimizer: "adamw": torch's, betas (0.9, 0.999), eps 1e-8. "adamw_8bit": its moments in 8
            bits, through bitsandbytes. "paged_adamw_8bit": those in memory that CUDA moves to the
            host when the GPU is full; on CUDA only.
        packing: fill sequences of exactly `model.spec.max_seq_length` tokens with whole rows that
            do not see each other; over-long plain text is split. Attention's mask takes
            batch_size x max_seq_length**2 bytes: lower max_seq_length to what is to be trained on.
            Without packing a batch is padded to its longest row.
        train_on: "responses" or "all"; see `data.encode_rows`.
        eval_every: steps.
        save_every: steps; output_dir/checkpoint-N is an adapter folder with what `resume` needs.
            The last step is saved too.
        resume: True goes on from the newest whole checkpoint in `output_dir`, a path from that one.
        seed: of the data's order and the dropout masks.
        log: called after every step with a dict of step, loss, learning_rate, tokens, seconds and
            grad_norm, as in `History`, and eval_loss where there was an evaluation.
        progress: a bar on stderr, with loss, tokens (trained or not) per second and peak memory.

    Raises:
        ValueError: listing every argument that cannot be, every row that cannot be trained on, or
            every setting in which a resumed run differs from its checkpoint.
        ModuleNotFoundError: an optimiser of bitsandbytes, which is not installed.
        FileNotFoundError: no such data, or nothing to resume from.
        CheckpointError: a file of rows or a checkpoint that is broken.
        FloatingPointError: if a loss or gradient is NaN or infinite; files stay as they are.
    """
    settings = Settings(
        max_steps=max_steps,
        num_epochs=num_epochs,
        batch_size=batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        learning_rate=learning_rate,
        lr_scheduler=lr_scheduler,
        warmup_ratio=warmup_ratio,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        optimizer=optimizer,
        packing=packing,
        train_on=train_on,
        eval_every=eval_every,
        save_every=save_every,
        seed=seed,
    )
    folder = None if output_dir is None else Path(output_dir)
    problems = setting_problems(settings) + model_problems(model, tokenizer)
    problems += companion_problems(settings, eval_data, folder, resume)
    if optimizer in OPTIMIZERS:
        problems += optimizer_problems(optimizer, tree_leaves(model.adapter or {}))
    if folder is not None and (error := folder_error(folder, model.spec)):
        problems.append(f"output_dir: {error}")  # found out before training and not after it
    problems += mask_problems(settings, model.spec.max_seq_length)
    if log is not None and not callable(log):
        problems.append(f"log={log!r}: expected None or a function of one dict")
    raise_problems(ValueError, "fastlora.train cannot do this:", problems, shown=20)
    run = make_plan(model, tokenizer, settings, data, eval_data)
    cuda_graph = use_cuda_graph(model.spec, model.base["norm"].device.type, settings)
    learner = make_learner(model, optimizer, weight_decay, cuda_graph=cuda_graph)
    source = checkpoint_to_resume(resume, folder)
    records: list[Record] = []
    if source is not None:
        learner, records = restore_checkpoint(source, learner, run_identity(run, model), run.steps)
    check_not_behind(folder, len(records), source)

    _run_steps(run, learner, records, folder, log, progress)
    if folder is not None:
        learner.model.save_pretrained(folder)
    return learner.model, History.of(records)


def _run_steps(
    run: TrainingPlan,
    learner: Learner,
    records: list[Record],
    folder: Path | None,
    log: Callable[[Record], object] | None,
    progress: bool,
) -> None:
    """The steps that `records` lacks: appends to it, and writes to the learner's tensors."""
    s, done, total = run.settings, len(records), run.steps
    identity = run_identity(run, learner.model) if s.save_every else {}
    due = lambda step, every: step == total or (every is not None and step % every == 0)
    with tqdm(total=total, initial=done, disable=not progress, unit="step") as bar:
        started = perf_counter()
        for step, micro in zip(range(done + 1, total + 1), run.micro_batches(done), strict=False):
            record = optimizer_step(run, learner, step, micro)
            record["seconds"] = perf_counter() - started
            if run.eval_sequences and due(step, s.eval_every):
                record["eval_loss"] = evaluate(run, learner.model, step)
            records.append(record)
            if folder is not None and s.save_every and due(step, s.save_every):
                save_checkpoint(folder / f"checkpoint-{step}", learner, identity, records)
            if progress:
                bar.set_postfix(bar_postfix(record, micro, learner.model), refresh=False)
            bar.update()
            if log is not None:
                log(dict(record))
            started = perf_counter()
