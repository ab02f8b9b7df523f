"""train(): rows in, a trained adapter and its history out.

Read downward: what a run is made of; the run; one optimiser step; checkpoints; what is refused.
A run is a pure function of its arguments. The order of the data comes from (seed, epoch), the
dropout masks from (seed, step, micro-batch), and no generator has a state that could be lost: that
is why a checkpoint needs nothing but the adapter, the optimiser's moments and the history.
"""

import hashlib
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import count, islice
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.utils._pytree import tree_leaves, tree_map
from tqdm import tqdm

from fastlora.checkpoint import read_json, read_safetensors, write_json, write_safetensors
from fastlora.checks import CheckpointError, raise_problems
from fastlora.data import (
    Example,
    Packed,
    Row,
    batches,
    count_batches,
    count_trained_tokens,
    encode_rows,
    pack,
    read_rows,
)
from fastlora.expert_keys import unpacked
from fastlora.export import WEIGHTS_FILE, folder_error
from fastlora.functional import Batch, Seed, loss_sum
from fastlora.gradients import value_and_grad
from fastlora.llama.params import (
    PROJECTIONS,
    Adapter,
    Base,
    projection_path,
    projection_shape,
)
from fastlora.llama.spec import Outside, Spec
from fastlora.llama.start import equivalent, remainders, with_start, without_start
from fastlora.model import Model
from fastlora.optimizers import (
    OPTIMIZERS,
    fresh_state,
    make_optimizer,
    optimizer_problems,
    restore_state,
    state_tensors,
)
from fastlora.originals import with_originals
from fastlora.peft_keys import base_tensors_out, named_leaves, peft_state_dict
from fastlora.tokenizer import Tokenizer

OPTIMIZER_FILE, STATE_FILE = "optimizer.safetensors", "trainer_state.json"
SCHEDULERS = ("cosine", "linear", "constant")
_LARGEST_MASK_GIB = 8

Record = dict[str, Any]  # one step of the history: what `log` is called with

# ── 1. what a run is made of ──────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """What happened, one entry per optimiser step, a resumed run's earlier steps included."""

    steps: tuple[int, ...]  # 1, 2, 3, ...
    losses: tuple[float, ...]  # mean of -log p over the step's trained tokens, before its update
    learning_rates: tuple[float, ...]
    tokens: tuple[int, ...]  # trained tokens: what the loss is a mean over
    seconds: tuple[float, ...]  # wall time, without evaluation and saving
    grad_norms: tuple[float, ...]  # Euclidean, of the whole gradient, before clipping
    eval_steps: tuple[int, ...]  # the steps after which eval_data was evaluated
    eval_losses: tuple[float, ...]  # mean of -log p over all its trained tokens, no dropout

    @classmethod
    def of(cls, records: Sequence[Record]) -> "History":
        """The columns of what `log` was called with."""
        column = lambda name: tuple(record[name] for record in records)
        evaluated = [record for record in records if "eval_loss" in record]
        return cls(
            steps=column("step"),
            losses=column("loss"),
            learning_rates=column("learning_rate"),
            tokens=column("tokens"),
            seconds=column("seconds"),
            grad_norms=column("grad_norm"),
            eval_steps=tuple(record["step"] for record in evaluated),
            eval_losses=tuple(record["eval_loss"] for record in evaluated),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The arguments of `train` that are numbers and choices, under their names there."""

    max_steps: int | None
    num_epochs: float
    batch_size: int
    gradient_accumulation_steps: int
    learning_rate: float
    lr_scheduler: str
    warmup_ratio: float
    weight_decay: float
    max_grad_norm: float | None
    optimizer: str
    packing: bool
    train_on: str
    eval_every: int | None
    save_every: int | None
    seed: int


Sequences = list[Example] | list[Packed]


class _Run(NamedTuple):
    """Settings and encoded data: with the model, all that the result depends on."""

    settings: Settings
    sequences: Sequences
    eval_sequences: Sequences
    batches: Callable[..., Iterator[Batch]]  # data.batches, with the padding settled

    @property
    def steps_per_epoch(self) -> int:
        """An epoch's last step may be smaller; none reaches into the next epoch."""
        s = self.settings
        return count_batches(self.sequences, s.batch_size * s.gradient_accumulation_steps)

    @property
    def steps(self) -> int:
        s = self.settings
        return s.max_steps or math.ceil(s.num_epochs * self.steps_per_epoch)

    def micro_batches(self, start: int) -> Iterator[list[Batch]]:
        """Endlessly, the micro-batches of each step after the first `start` ones."""
        s = self.settings
        epoch, done = divmod(start, self.steps_per_epoch)
        for e in count(epoch):
            first = done * s.gradient_accumulation_steps if e == epoch else 0
            stream = self.batches(self.sequences, s.batch_size, seed=s.seed, epoch=e, start=first)
            while step := list(islice(stream, s.gradient_accumulation_steps)):
                yield step


class _Learner(NamedTuple):
    """A model whose adapter is memory of its own, the optimiser that writes to it, and `_share`
    with its gradient."""

    model: Model
    optimizer: torch.optim.Optimizer
    share_and_grad: Callable[..., tuple[Tensor, Adapter]]


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
    problems = _setting_problems(settings) + _model_problems(model, tokenizer)
    problems += _companion_problems(settings, eval_data, folder, resume)
    if optimizer in OPTIMIZERS:
        problems += optimizer_problems(optimizer, tree_leaves(model.adapter or {}))
    if folder is not None and (error := folder_error(folder, model.spec)):
        problems.append(f"output_dir: {error}")  # found out before training and not after it
    problems += _mask_problems(settings, model.spec.max_seq_length)
    if log is not None and not callable(log):
        problems.append(f"log={log!r}: expected None or a function of one dict")
    raise_problems(ValueError, "fastlora.train cannot do this:", problems, shown=20)
    run = _prepare(model, tokenizer, settings, data, eval_data)
    cuda_graph = _records(model.spec, model.base["norm"].device.type, settings)
    learner = _learner(model, optimizer, weight_decay, cuda_graph=cuda_graph)
    source = _checkpoint_to_resume(resume, folder)
    records: list[Record] = []
    if source is not None:
        learner, records = _restore(source, learner, _identity(run, model), run.steps)
    _check_not_behind(folder, len(records), source)

    _fit(run, learner, records, folder, log, progress)
    if folder is not None:
        learner.model.save_pretrained(folder)
    return learner.model, History.of(records)


def _prepare(model: Model, tokenizer: Any, settings: Settings, data: Any, eval_data: Any) -> _Run:
    spec = model.spec
    padding = dict(pad_token_id=tokenizer.pad_token_id, max_seq_length=spec.max_seq_length)

    def sequences(data: Any) -> Sequences:
        examples = encode_rows(
            read_rows(data),
            tokenizer,
            train_on=settings.train_on,  # pyright: ignore[reportArgumentType]  (checked)
            max_seq_length=spec.max_seq_length,
            split_text=settings.packing,
        )
        _check_vocabulary(examples, spec.config.vocab_size)
        if not settings.packing:
            return examples
        return pack(examples, spec.max_seq_length, pad_token_id=padding["pad_token_id"])

    held_out = [] if eval_data is None else sequences(eval_data)
    return _Run(settings, sequences(data), held_out, partial(batches, **padding))


def _learner(model: Model, name: str, weight_decay: float, *, cuda_graph: bool) -> _Learner:
    """An optimiser over clones of the adapter's leaves, in the order of `named_leaves`."""
    own = model.with_adapter(tree_map(lambda x: x.detach().clone(), model.adapter))
    leaves = list(_named(own.adapter).values())
    share_and_grad = value_and_grad(_share, cuda_graph=cuda_graph)
    return _Learner(own, make_optimizer(name, leaves, weight_decay), share_and_grad)


# Parameters of a layer times tokens, up to which the GPU waits for the host: it takes 1.3 ms for
# their products, forward and backward, and the host some 3 ms for their launches (H100, 1B).
_SMALL = 2.5e11


def _records(spec: Spec, device: str, settings: Settings) -> bool:
    """Whether to play micro-batches back from a CUDA graph: small ones, all of one shape, and of a
    model that asks the host nothing: a loop over experts and trained rows do."""
    if device != "cuda" or not settings.packing or spec.recompute == "offload":
        return False
    if any(spec.config.sparse_layers) or spec.outside != Outside() or spec.qat_scheme is not None:
        return False
    of_layer = sum(rows * d for rows, d in (projection_shape(spec.config, n) for n in PROJECTIONS))
    return settings.batch_size * spec.max_seq_length * of_layer < _SMALL


def _named(adapter: Adapter | None) -> dict[str, Tensor]:
    assert adapter is not None
    return named_leaves(adapter)


def _fit(
    run: _Run,
    learner: _Learner,
    records: list[Record],
    folder: Path | None,
    log: Callable[[Record], object] | None,
    progress: bool,
) -> None:
    """The steps that `records` lacks: appends to it, and writes to the learner's tensors."""
    s, done, total = run.settings, len(records), run.steps
    identity = _identity(run, learner.model) if s.save_every else {}
    due = lambda step, every: step == total or (every is not None and step % every == 0)
    with tqdm(total=total, initial=done, disable=not progress, unit="step") as bar:
        started = perf_counter()
        for step, micro in zip(range(done + 1, total + 1), run.micro_batches(done), strict=False):
            record = _step(run, learner, step, micro)
            record["seconds"] = perf_counter() - started
            if run.eval_sequences and due(step, s.eval_every):
                record["eval_loss"] = _evaluate(run, learner.model, step)
            records.append(record)
            if folder is not None and s.save_every and due(step, s.save_every):
                _save(folder / f"checkpoint-{step}", learner, identity, records)
            if progress:
                bar.set_postfix(_postfix(record, micro, learner.model), refresh=False)
            bar.update()
            if log is not None:
                log(dict(record))
            started = perf_counter()


def _postfix(record: Record, micro_batches: Sequence[Batch], model: Model) -> dict[str, str]:
    """What the bar shows beside the step. Tokens are all but the padding: what the model reads."""
    real = sum(
        int((b["attention_mask" if "attention_mask" in b else "segment_ids"] > 0).sum())
        for b in micro_batches
    )
    shown = {"loss": f"{record['loss']:.4f}", "tokens/s": f"{real / record['seconds']:.0f}"}
    if "eval_loss" in record:
        shown["eval"] = f"{record['eval_loss']:.4f}"
    if (device := model.base["norm"].device).type == "cuda":
        shown["peak"] = f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB"
    return shown


def _evaluate(run: _Run, model: Model, step: int) -> float:
    """Mean of -log p over all trained tokens of `eval_sequences`, in the order given."""
    stream = run.batches(run.eval_sequences, run.settings.batch_size, seed=None)
    with torch.no_grad():
        sums = [loss_sum(model.adapter, model.base, model.spec, _on(model, b)) for b in stream]
    # float64, and read once: 10**8 tokens lose no digit, and the GPU does not wait for the host.
    total, tokens = (
        torch.stack([x.double() for x in part]).sum() for part in zip(*sums, strict=True)
    )
    loss = float(total / tokens)
    if not math.isfinite(loss):
        raise FloatingPointError(f"after step {step} the loss of eval_data is {loss}.")
    return loss


def learning_rate_factor(scheduler: str, index: int, warmup_steps: int, steps: int) -> float:
    """Share of the highest learning rate at the step with this index (the first is 0), in [0, 1].

    As huggingface/transformers has it (optimization.py, v5.23: get_*_schedule_with_warmup): the
    first step of a warm-up has rate 0, the step after the last one would have it again.
    """
    if index < warmup_steps:
        return index / warmup_steps
    progress = (index - warmup_steps) / max(1, steps - warmup_steps)
    match scheduler:
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        case "linear":
            return (steps - index) / max(1, steps - warmup_steps)
        case _:
            return 1.0


# ── 3. one optimiser step ─────────────────────────────────────────────────────────────────


def _step(run: _Run, learner: _Learner, step: int, micro_batches: Sequence[Batch]) -> Record:
    """Gradient, clipping and update number `step`; one read from the device, at the end."""
    s, (model, optimizer, _) = run.settings, learner
    tokens = sum(map(count_trained_tokens, micro_batches))
    # All at once, while the device is idle: a copy to it waits for the work already queued there.
    placed = [_on(model, batch) for batch in micro_batches]
    seeds = _mask_seeds(model, s.seed, step, len(placed))
    loss, gradient = _loss_and_gradient(learner, placed, tokens, seeds)
    norm = get_total_norm(gradient)
    if s.max_grad_norm:
        scale = (s.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)  # as clip_grad_norm_
        gradient = [g * scale for g in gradient]
    for leaf, g in zip(_named(model.adapter).values(), gradient, strict=True):
        leaf.grad = g.to(leaf.dtype)
    warmup_steps = math.ceil(s.warmup_ratio * run.steps)
    factor = learning_rate_factor(s.lr_scheduler, step - 1, warmup_steps, run.steps)
    rate = optimizer.param_groups[0]["lr"] = s.learning_rate * factor
    optimizer.step()
    optimizer.zero_grad()
    seen, length = torch.stack([loss.double(), norm.double()]).tolist()
    if not (math.isfinite(seen) and math.isfinite(length)):
        raise FloatingPointError(
            f"step {step}: the loss is {seen}, the gradient's norm {length}. What is on disk stays "
            f"as it was. Lower learning_rate={s.learning_rate:g} or max_grad_norm="
            f"{s.max_grad_norm}; at step 1, look for NaN in the base or the adapter."
        )
    return dict(step=step, loss=seen, learning_rate=rate, tokens=tokens, grad_norm=length)


def _loss_and_gradient(
    learner: _Learner, micro_batches: Sequence[Batch], tokens: int, mask_seeds: Sequence[Seed]
) -> tuple[Float[Tensor, ""], list[Tensor]]:
    """Of the mean over all micro-batches' `tokens`; summed in at least float32, leaf by leaf."""
    losses, gradient, model = [], [], learner.model
    base, spec = model.base, model.spec
    for batch, seed in zip(micro_batches, mask_seeds, strict=True):
        # A tensor, or each number would be another recording; its own, or it would seem to stay.
        count = torch.full((), tokens, device=base["norm"].device)
        share, grads = learner.share_and_grad(model.adapter, base, spec, batch, count, seed)
        wide = [g.to(torch.promote_types(g.dtype, torch.float32)) for g in _named(grads).values()]
        gradient = [a + b for a, b in zip(gradient, wide, strict=True)] if gradient else wide
        losses.append(share)
    return torch.stack(losses).sum(), gradient


def _share(
    adapter: Adapter,
    base: Base,
    spec: Spec,
    batch: Batch,
    tokens: Int[Tensor, ""],
    seed: Seed,
) -> Float[Tensor, ""]:
    """A micro-batch's part of the step's loss; the parts add up to the mean over `tokens`."""
    return loss_sum(adapter, base, spec, batch, seed=seed)[0] / tokens


def _mask_seeds(model: Model, seed: int, step: int, micro_batches: int) -> Sequence[Seed]:
    """One 0-d tensor for each micro-batch, on the model's device; None where nothing is dropped."""
    if model.spec.lora is None or model.spec.lora.lora_dropout == 0:
        return [None] * micro_batches
    seeds = [dropout_seed(seed, step, i) for i in range(micro_batches)]
    return torch.tensor(seeds, device=model.base["norm"].device).unbind()


def dropout_seed(seed: int, step: int, micro_batch: int) -> int:
    """A 63-bit seed for one micro-batch's masks: a hash of the three numbers."""
    (word,) = np.random.SeedSequence((seed, step, micro_batch)).generate_state(1, np.uint64)
    return int(word >> 1)


def _on(model: Model, batch: Batch) -> dict[str, Tensor]:
    return {name: x.to(model.base["norm"].device) for name, x in batch.items()}


# ── 4. checkpoints ────────────────────────────────────────────────────────────────────────


def _save(
    folder: Path, learner: _Learner, identity: Mapping[str, Any], records: Sequence[Record]
) -> None:
    """Adapter, moments, then the history, whose file is the seal: without it, no checkpoint."""
    learner.model.save_pretrained(folder)
    state = {
        f"{name}.{kind}": x
        for name, leaf in _named(learner.model.adapter).items()
        for kind, x in state_tensors(learner.optimizer, leaf).items()
    }
    write_safetensors(folder / OPTIMIZER_FILE, state)
    write_json(folder / STATE_FILE, {"settings": identity, "history": list(records)})


def _restore(
    folder: Path, learner: _Learner, identity: Mapping[str, Any], steps: int
) -> tuple[_Learner, list[Record]]:
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
    leaves = _named(model.adapter)
    spec, equal = equivalent(model.spec, model.base, model.adapter)
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
        read = {id(x): adapter[name].to(x.device, copy=True) for name, x in _named(equal).items()}
        found = remainders(tree_map(lambda x: read[id(x)], equal), model.adapter)
        learner = learner._replace(model=replace(model, base=with_start(model.base, found)))
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


def _identity(run: _Run, model: Model) -> dict[str, Any]:
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
    outside = lora.outside
    targets = {
        projection_path(i, t.name): {"r": t.r, "scaling": t.scaling}
        for i, layer in enumerate(lora.targets)
        for t in layer
    }
    ends = (outside.embed_tokens, outside.lm_head)
    targets |= {t.name: {"r": t.r, "scaling": t.scaling} for t in ends if t is not None}
    return settings | {
        "steps of the whole run": None if constant else run.steps,
        "hash of the training data": _hash_sequences(run.sequences),
        "hash of the base model": _hash_base(model),
        "adapter dtypes": sorted({str(x.dtype) for x in tree_leaves(model.adapter)}),
        "r": lora.r,
        "lora_dropout": lora.lora_dropout,
        "tensors trained whole": [*outside.replaced],
        "trained rows": {end: [*ids] for end, ids in outside.tokens},
        "embedding and head tied": outside.tied or outside.shared_rows,
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
    base = with_originals(without_start(model.base))
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


def _checkpoint_to_resume(
    resume: bool | str | os.PathLike[str], folder: Path | None
) -> Path | None:
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


def _check_not_behind(folder: Path | None, start: int, source: Path | None) -> None:
    """Refuse to write over checkpoints of another run, or later ones of the same."""
    found = {} if folder is None else _checkpoints(folder)
    later = [path.name for step, path in found.items() if step > start]
    if later:
        begin = f"begins after {source}" if source else "begins anew"
        raise ValueError(
            f"{folder} holds {', '.join(later)}, and this run {begin}: pass resume=True to go on "
            "from the newest, or delete them, or choose another output_dir."
        )


# ── 5. what is refused ────────────────────────────────────────────────────────────────────


def _is_whole(x: Any, low: int) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x >= low


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


_OPTIONAL_COUNT = (lambda x: x is None or _is_whole(x, 1), "None or a whole number >= 1")
_COUNT = (lambda x: _is_whole(x, 1), "a whole number >= 1")
_POSITIVE = (lambda x: _is_number(x) and x > 0, "a number > 0")

# Argument -> (whether a value can be, what is expected).
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_steps": _OPTIONAL_COUNT,
    "num_epochs": _POSITIVE,
    "batch_size": _COUNT,
    "gradient_accumulation_steps": _COUNT,
    "learning_rate": _POSITIVE,
    "lr_scheduler": (lambda x: x in SCHEDULERS, " or ".join(map(repr, SCHEDULERS))),
    "warmup_ratio": (lambda x: _is_number(x) and 0 <= x <= 1, "a number from 0 to 1"),
    "weight_decay": (lambda x: _is_number(x) and x >= 0, "a number >= 0"),
    "max_grad_norm": (
        lambda x: x is None or (_is_number(x) and x >= 0),
        "a number > 0; or None or 0 for no clipping",
    ),
    "optimizer": (lambda x: x in OPTIMIZERS, " or ".join(map(repr, OPTIMIZERS))),
    "packing": (lambda x: isinstance(x, bool), "True or False"),
    "train_on": (lambda x: x in ("responses", "all"), "'responses' or 'all'"),
    "eval_every": _OPTIONAL_COUNT,
    "save_every": _OPTIONAL_COUNT,
    "seed": (lambda x: _is_whole(x, 0), "a whole number >= 0"),
}


def _setting_problems(settings: Settings) -> list[str]:
    return [
        f"{name}={value!r}: expected {_RULES[name][1]}"
        for name, value in asdict(settings).items()
        if not _RULES[name][0](value)
    ]


def _model_problems(model: Model, tokenizer: Tokenizer | None) -> list[str]:
    problems = []
    if model.adapter is None:
        problems.append("model has no adapter to train; call fastlora.lora(model) first")
    elif any(x.dtype == torch.float16 for x in tree_leaves(model.adapter)):
        # B starts at zero, so A's first gradient is zero, and 0 / (sqrt(0) + eps) is NaN.
        problems.append(
            "model's adapter is float16, or copies of a float16 base, where AdamW's eps = 1e-8 is "
            "0; expected fastlora.lora(..., adapter_dtype='float32') and a bfloat16 base"
        )
    if tokenizer is None:
        problems.append(
            "tokenizer is None; rows cannot become tokens without one. Has the model's folder a "
            "tokenizer.json?"
        )
    return problems


def _companion_problems(
    settings: Settings, eval_data: Any, folder: Path | None, resume: Any
) -> list[str]:
    """Arguments that mean nothing without another."""
    problems = []
    if settings.eval_every is not None and eval_data is None:
        problems.append(f"eval_every={settings.eval_every!r} without eval_data")
    if settings.save_every is not None and folder is None:
        problems.append(f"save_every={settings.save_every!r} without output_dir")
    if resume is True and folder is None:
        problems.append("resume=True without output_dir; name it, or the checkpoint in resume=...")
    if not isinstance(resume, bool | str | os.PathLike):
        problems.append(f"resume={resume!r}: expected True, False or the path of a checkpoint")
    return problems


def _mask_problems(settings: Settings, length: int) -> list[str]:
    """A context of 131,072 tokens, never lowered, would ask for a mask of 16 GiB a sequence."""
    if settings.packing is not True or not _is_whole(settings.batch_size, 1):
        return []
    gib = settings.batch_size * length**2 / 2**30
    if gib <= _LARGEST_MASK_GIB:
        return []
    return [
        f"packing to max_seq_length={length} at batch_size={settings.batch_size} needs an attention"
        f" mask of {gib:.0f} GiB; pass fastlora.load a max_seq_length that your rows fill, such as"
        " 2048, or packing=False"
    ]


def _check_vocabulary(examples: Sequence[Example], vocab_size: int) -> None:
    largest = max(int(example.input_ids.max()) for example in examples)
    if largest >= vocab_size:
        raise ValueError(
            f"the tokenizer gives id {largest}, but the model's vocabulary is [0, {vocab_size}); "
            "do model and tokenizer come from the same folder?"
        )
