"""train(): check, encode the data, run the steps, save the adapter.

A run is a pure function of its arguments. The order of the data depends on (seed, epoch), dropout
masks depend on (seed, step, micro-batch), and no random generator carries state from one step to
the next. A checkpoint therefore needs nothing but the adapter, the optimizer's state and the
history.

To change the loop, copy `_run_steps`.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from tqdm import tqdm

from fastlora.arguments import settings_from
from fastlora.data.sources import Data
from fastlora.generation.text import Prompt
from fastlora.losses.loss_argument import objective_of
from fastlora.losses.objectives import Objective
from fastlora.models.state import ModelState
from fastlora.text.tokenizer import Tokenizer
from fastlora.training.after_step import evaluate_and_save
from fastlora.training.common_run import (
    agree_before_training,
    end_together,
    joined_ranks,
    log_of,
    shared_run,
    stop_request,
    stop_together,
)
from fastlora.training.custom_optimizer import OptimizerFactory
from fastlora.training.finished import check_run_space, finish_folder
from fastlora.training.first_step import preparing_training
from fastlora.training.history import History, Record
from fastlora.training.identity import hash_adapter, run_identity
from fastlora.training.keeping import Best, stops_early
from fastlora.training.learner import Learner, make_learner
from fastlora.training.lock import output_lock
from fastlora.training.logging.backends import RunInfo
from fastlora.training.logging.open import Log, open_log
from fastlora.training.many.arguments import Ending, are_several
from fastlora.training.many.loop import train_runs
from fastlora.training.output_folder import (
    checked_folder,
    checkpoint_to_resume,
    refuse_to_overwrite,
    start_from,
)
from fastlora.training.positions import (
    encoded_rows,
    figures,
    finish_stream,
    report_rows,
    with_position,
)
from fastlora.training.progress import bar_figures, step_cost
from fastlora.training.recovery import kept_on_failure
from fastlora.training.run import Run, prepare_run
from fastlora.training.run_record import json_settings, run_record
from fastlora.training.schedules import Schedule
from fastlora.training.settings import Settings, check_train_arguments
from fastlora.training.signals import StopRequest
from fastlora.training.step import optimizer_step

# Arguments of one run; with a list of models, a list has one each.
Folder = str | os.PathLike[str] | None
Rates = Mapping[str, float] | None
Options = Mapping[str, Any] | None
Resume = bool | str | os.PathLike[str]


def train(
    model: ModelState | Sequence[ModelState],
    tokenizer: Tokenizer | None,
    data: Data,
    *,
    eval_data: Data | None = None,
    output_dir: Folder | Sequence[Folder] = None,
    max_steps: int | Sequence[int | None] | None = None,
    num_epochs: float | Sequence[float] = 1,
    batch_size: int = 8,
    gradient_accumulation_steps: int = 1,
    learning_rate: float | Sequence[float] = 2e-4,
    learning_rates: Rates | Sequence[Rates] = None,
    lr_scheduler: str | Schedule | Sequence[str | Schedule] = "cosine",
    lr_scheduler_kwargs: Options | Sequence[Options] = None,
    warmup_ratio: float | Sequence[float] = 0.03,
    weight_decay: float | Sequence[float] = 0.0,
    max_grad_norm: float | Sequence[float | None] | None = 1.0,
    optimizer: str | OptimizerFactory | Sequence[str | OptimizerFactory] = "adamw",
    neftune_alpha: float | None = None,
    loss: str | Objective | Callable[..., Any] = "sft",
    packing: bool = True,
    train_on: str = "responses",
    too_long: str = "error",
    on_bad_row: str = "error",
    columns: Mapping[str, str] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    eval_every: int | Sequence[int | None] | None = None,
    sample_prompts: Sequence[Prompt] | None = None,
    sample_tokens: int = 64,
    save_every: int | Sequence[int | None] | None = None,
    keep: int | Sequence[int | None] | None = None,
    keep_best: bool | Sequence[bool] = False,
    early_stopping: int | Ending | Sequence[int | None] | None = None,
    clip_per_example: float | None = None,
    noise_multiplier: float | None = None,
    context_parallel: int = 1,
    resume: Resume | Sequence[Resume] = False,
    seed: int | Sequence[int] = 3407,
    log: Log | None = None,
    progress: bool = True,
) -> tuple[Any, Any]:
    """The model with a trained adapter, and the history. The given model's tensors are not changed.

    A list of models over one base is trained in one pass, a run each; the result is then a list of
    models and a list of histories. See "Several runs" below.

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
        data: a file (JSONL, JSON, Parquet, Arrow, CSV), a folder or a glob of them, an iterable of
            dicts, such as a Hugging Face data set, a list of these, or a dict {source: weight}. An
            epoch over weighted sources has as many examples as they have together: sources with
            fewer than their share are repeated, and of the others a sample is drawn with `seed`.
            A Hugging Face stream (IterableDataset) and files of more than 8 GiB are streamed: read,
            shuffled and packed in blocks of a million tokens, in the background. They need
            max_steps; bad rows are then reported when they are reached, and a run that resumes
            reads on behind the last row that was used. Other data are encoded before the first
            step, and cached in ~/.cache/fastlora (8 bytes a token; may be deleted at any time).
            Kinds of rows: `data.rows.ROW_KINDS`; with messages also "tools" (a list, or its JSON).
        eval_data: the same, but read before the first step, streams too. Evaluated after the last
            step, and every `eval_every` steps.
        output_dir: a folder for the trained adapter, in PEFT's format, and for checkpoints. It is
            locked during the run: a second run is refused. An adapter or checkpoints of another run
            in it are refused too, before the first step. training_run.json tells which run the
            adapter is of.
        max_steps: optimizer steps; overrides `num_epochs`.
        num_epochs: passes over the data; may be a fraction.
        batch_size: sequences in a micro-batch of one rank. A full step has
            `gradient_accumulation_steps` times as many, on each rank.
        gradient_accumulation_steps: micro-batches in a step.
        learning_rate: the highest of the run.
        learning_rates: highest rates of groups of tensors: "B" (LoRA+ of Hayou et al. 2024 is
            {"B": ratio * learning_rate}), "embeddings" (LoRA, copies and rows of the embedding
            and of the head) and "norms". All follow the same schedule.
        lr_scheduler: after the warm-up, "cosine" or "linear" decay to 0, "constant",
            "cosine_with_restarts", or "wsd", which is constant and decays in the last tenth of the
            steps (warm-up, stable, decay). Or a function of a step's index (from 0) and the number
            of steps, which returns the share of learning_rate; it replaces the warm-up too.
        lr_scheduler_kwargs: as in transformers: min_lr_rate (the floor, a share) for "cosine",
            num_cycles for "cosine_with_restarts", num_decay_steps, decay_type ("cosine", "linear",
            "1-sqrt") and min_lr_ratio for "wsd".
        warmup_ratio: share of all steps over which the rate rises from 0, rounded up. The first
            step of a warm-up has rate 0; a run of one step has no warm-up.
        weight_decay: AdamW's, for A, B and other matrices. Norms, biases and DoRA's magnitudes have
            none.
        max_grad_norm: gradients with a larger norm are scaled down to it; None or 0: no clipping.
        optimizer: "adamw": torch's, betas (0.9, 0.999), eps 1e-8. "adamw_8bit": with 8-bit moments,
            from bitsandbytes. "paged_adamw_8bit": with 8-bit moments that CUDA moves to host memory
            when the GPU is full; on CUDA only. Or a function that makes a torch.optim.Optimizer of
            the parameter groups that it is given, such as torch.optim.NAdam or
            functools.partial(torch.optim.SGD, momentum=0.9). The rate and weight_decay are set in
            the groups.
        neftune_alpha: NEFTune: uniform noise of at most alpha / sqrt(tokens * hidden_size) on the
            embedded tokens, in training only (Jain et al. 2023); 5 is common.
        loss: "sft" (the mean of -log p), "dft", "dpo", "orpo", "simpo", "kto", a record with
            settings, such as losses.DPO(beta=0.2) or losses.Distill(teacher=model), or a function
            (adapter, base, spec, batch, *, seed) that returns a sum over a batch's trained tokens.
            "dpo", "orpo" and "simpo" need rows {"prompt", "chosen", "rejected"}, "kto" {"prompt",
            "completion", "label"}; these are never packed, and batch_size counts them. The
            reference of "dpo" and "kto" is the given model, at no memory.
        packing: fill sequences of exactly `model.spec.max_seq_length` tokens with complete rows
            that do not attend to each other; plain text that is too long is split. Where the
            attention kernels do not run (on the CPU, in float32, for head sizes other than 64, 128
            and 256), the attention mask takes batch_size x max_seq_length**2 bytes; train refuses
            more than 8 GiB of it, and, with recompute="offload", more pinned memory than the host
            has free. Lower max_seq_length to a length that your rows fill. Without packing, a batch
            is padded to its longest row.
        train_on: "responses", "last_response" or "all"; see `data.encode_rows`.
        too_long: rows of more than `model.spec.max_seq_length` tokens are an error; "drop" leaves
            them out, "truncate" keeps their first tokens, "split" splits them.
        on_bad_row: rows that cannot be trained on are an error; "skip" leaves them out. Rows that
            are left out or cut are counted on stderr and in output_dir/rows_left_out.jsonl.
        columns: standard names of columns to those of the data: {"prompt": "question"}. Each must
            be in a row.
        template_kwargs: variables of the chat template: {"enable_thinking": False}. To generate,
            use `tokenizer.with_template_kwargs(...)`.
        eval_every: steps.
        sample_prompts: texts or chats that the model continues, greedily, whenever eval_data is
            evaluated (also without eval_data), for "samples" in the record for `log`.
        sample_tokens: tokens of each of these texts at most.
        save_every: steps. output_dir/checkpoint-N is an adapter folder with the files that `resume`
            needs. The last step is saved too.
        keep: newest checkpoints that stay; older ones are deleted when a newer one is complete.
        keep_best: return and save the adapter after the step with the lowest loss of eval_data, not
            that after the last step. The checkpoint of that step is saved, and `keep` spares it.
        early_stopping: end the run after this many evaluations without a lower loss than before.
        clip_per_example: DP-SGD (Abadi et al. 2016): each row's gradient is scaled down to this
            norm, if it is larger. A step draws each row with probability batch_size x
            gradient_accumulation_steps / rows; batch_size rows are in memory, with a gradient each.
            Needs packing=False. `history.epsilon(delta)` is the privacy of the adapter alone.
        noise_multiplier: standard deviation of the noise over clip_per_example; 0: no privacy. The
            noise depends on `seed`, which must stay secret.
        context_parallel: ranks that have each row together, if rows do not fit one card.
        resume: True continues from the newest complete checkpoint in `output_dir`, "auto" does so
            if there is one and else starts a run, a path continues from that checkpoint. Its files
            must have the SHA-256 that they had when it was saved. If the newest is damaged, the
            error names the one to continue from, which replaces the damaged ones after it.
        seed: of the order of the data and of dropout.
        log: a function, called after every step with a dict of step, loss, learning_rate, tokens,
            seconds and grad_norm, as in `History`, eval_loss after an evaluation, norms by group of
            tensors ("grad_norm/A", "update_norm/B", ...), and figures of `progress.step_cost`.
            "jsonl" writes these to output_dir/log.jsonl, "tensorboard" to output_dir/tensorboard,
            "wandb" and "trackio" to these services (each an extra). Or a list of these.
        progress: show a bar on stderr with the loss, tokens (trained or not) per second, the time
            left, and on CUDA the share of the card's peak and the memory.

    Several runs:
        `model` is a list of n models with LoRA in the layers, over the same base tensors; ranks,
        alphas and targets may differ. data, eval_data, output_dir, resume, seed and all settings of
        optimizer, rate, length, evaluation and saving may be lists of n values, one for each run.
        A list of sources is one for each run; a list of rows is for all. One output_dir gets the
        subfolders run-0, run-1, ... Each run equals a single one up to rounding, and has the same
        files. Functions in `log` get each run's records, with its number under "run".
        early_stopping may be a function of all runs' evaluations. A run whose loss is NaN ends, and
        the FloatingPointError is raised after the others' end. See training/many/README.md.

    Several ranks:
        Under torchrun, N ranks are one rank with N x batch_size, up to rounding. All get the same
        result; rank 0 writes files and calls `log`. See distributed/README.md.

    Raises:
        ValueError: listing every argument of a wrong type or value, every unusable row, or every
            setting in which a resumed run differs from its checkpoint.
        ModuleNotFoundError: bitsandbytes or an extra that `log` names is not installed.
        FileNotFoundError: the file of rows or the checkpoint to resume from does not exist.
        CheckpointError: a file of rows or a checkpoint is broken.
        OSError: the disk is too full for the run's checkpoints and adapter (found before the first
            step), or a file cannot be written. The message names the path and the bytes.
        FloatingPointError: a loss or gradient is NaN or infinite. The message names the tensor, or
            the sequence and the layer. The step's update is not applied.
        SystemExit: SIGINT or SIGTERM ended the run; see above.
    """
    # Must come first: locals() may hold nothing but the arguments.
    given = dict(locals())
    if are_several(model):
        return train_runs(given)
    settings = settings_from(Settings, given)
    beside = ("model", "tokenizer", "data", "eval_data", "output_dir", "resume", "log", "progress")
    check_train_arguments(settings, **{name: given[name] for name in beside})
    assert tokenizer is not None and isinstance(model, ModelState)
    folder = checked_folder(given["output_dir"])

    with ExitStack() as after:
        ranks = after.enter_context(joined_ranks(model, settings.context_parallel))
        # Every rank reads checkpoints; the first one writes, and shows the bar.
        found, (folder, progress) = folder, (folder, progress) if ranks.is_first else (None, False)
        after.enter_context(output_lock(folder))
        # Every row is encoded before the first step, so a bad row is reported within seconds. Of
        # data that are streamed, it is the first block.
        objective = objective_of(loss, model)
        with preparing_training(model, ranks.leads_node), ranks.first_on_node("encoding"):
            run = prepare_run(model.spec, tokenizer, settings, data, eval_data, progress, objective)
        after.callback(finish_stream, run, folder, ranks.is_first)
        learner = make_learner(model, settings, objective, ranks.context)
        checkpoint = checkpoint_to_resume(given["resume"], found)
        run = shared_run(run, ranks, learner.model, checkpoint)
        # Training changes none of it, so it is computed once for all checkpoints.
        saves = found is not None or checkpoint is not None
        identity = run_identity(run, learner.model) if saves or ranks.several else {}
        initial = hash_adapter(learner.model) if saves else ""
        agree_before_training(run, learner.model, identity, checkpoint)
        learner, records = start_from(checkpoint, learner, identity, run.steps)
        refuse_to_overwrite(folder, len(records), checkpoint, identity, initial)
        check_run_space(folder, run, learner, len(records), tokenizer)
        report_rows(run, folder, ranks.is_first)
        describe_run = partial(
            run_record, run, data=data, eval_data=eval_data, identity=identity, initial=initial
        )
        best = Best.before(settings, learner, records, checkpoint, folder)
        stop = stop_request(ranks)
        start = describe_run(model=learner.model, records=records, ended=False) if saves else {}
        info = RunInfo(folder, tuple(map(figures, records)), json_settings(settings), start)
        with stop.listening(), kept_on_failure(folder, learner, records, identity, stop, ranks):
            with open_log(log_of(ranks, log), info) as write:
                _run_steps(run, learner, records, identity, folder, stop, best, write, progress)
            trained = best.model(learner.model)
            if folder is not None:
                end = describe_run(model=trained, records=records, ended=True)
                finish_folder(folder, trained, tokenizer, identity, records, end)
            end_together(ranks, trained, stop)
    return trained, History.of(records)


def _run_steps(
    run: Run,
    learner: Learner,
    records: list[Record],
    identity: Mapping[str, Any],
    folder: Path | None,
    stop: StopRequest,
    best: Best,
    log: Callable[[Record], object],
    progress: bool,
) -> None:
    """Run the steps that `records` does not have yet. Each writes to the learner's tensors and
    appends its figures to `records`; evaluation and checkpoints follow when they are due."""
    done = len(records)
    if stops_early(records, run.settings.early_stopping):  # it resumes after its end
        return
    bar = tqdm(total=run.steps, initial=done, disable=not progress, unit="step")
    with bar, closing(run.batches_after(records)) as batches:
        started = perf_counter()
        for step, micro_batches in zip(range(done + 1, run.steps + 1), batches, strict=False):
            record = optimizer_step(run, learner, step, micro_batches)
            # optimizer_step ends with a read from the device, so all its work is done here.
            record["seconds"] = seconds = perf_counter() - started
            record = step_cost(learner.model, micro_batches, seconds, run.ranks.row_ranks) | record
            records.append(with_position(record, run, records))
            ends = evaluate_and_save(run, learner, records, identity, folder, best)
            if progress:
                bar.set_postfix(bar_figures(record, encoded=encoded_rows(run)), refresh=False)
            bar.update()
            # Last, so that an error in the user's function finds the step's checkpoint written.
            log(figures(record))
            if ends:
                break
            stop_together(run.ranks, stop)
            # Evaluation, saving and log are not counted; the next step's batch is.
            started = perf_counter()
