"""optimizer_step(): the gradient of all micro-batches, clipping and the update; and evaluate()."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils import get_total_norm

from fastlora.data.batches import spans_of
from fastlora.formats.peft.names import named_leaves
from fastlora.functional import loss_sum
from fastlora.models.state import Batch, ModelState, Seed, require_adapter
from fastlora.training.dealt_batches import Dealt, is_masked
from fastlora.training.history import Record
from fastlora.training.learner import Learner
from fastlora.training.noise_scale import noise_figures
from fastlora.training.nonfinite import nonfinite_cause, nonfinite_cause_of_batches
from fastlora.training.optimizers import update
from fastlora.training.parameter_groups import group_norms, update_differences
from fastlora.training.private_step import private_gradient
from fastlora.training.run import Run
from fastlora.training.schedules import learning_rate_factor
from fastlora.training.settings import Settings
from fastlora.training.step_share import StepShare, begin_step

# (seed, first row) of a micro-batch's masks; see `_seeds`.
_Seeds = tuple[Seed, Int[Tensor, ""] | None]

# A float16 base whose gradient overflows is differentiated again with the next smaller scale. The
# powers of 2 change no digits. 2**-12 allows sums of 4,096 times float16's largest number, 65,504.
FLOAT16_SCALES = (1.0, 2.0**-6, 2.0**-12)


def optimizer_step(run: Run, learner: Learner, step: int, micro_batches: Sequence[Batch]) -> Record:
    """Step number `step` (the first is 1): writes to the learner's adapter and optimizer.

    Reads from the device twice, both at the end. It reads once more on several ranks, and once more
    for each scale that a float16 base tries.

    Returns:
        The step's figures, as in `History`, without the seconds.

    Raises:
        FloatingPointError: the loss or the gradient is NaN or infinite; the message names the
            tensor, or the sequence and the layer. Adapter and optimizer are unchanged.
    """
    settings, model = run.settings, learner.model
    # All copies at once, while the device is idle: a copy waits for the work queued before it.
    placed = [_to_device(model, batch) for batch in micro_batches]
    seeds = _seeds(learner, run, step, micro_batches)
    share = begin_step(run, micro_batches)
    with share.compiling_in_turn(learner):
        if settings.clip_per_example is None:
            sums = _loss_and_gradient(learner, placed, seeds, share)
        else:
            plain, rows = [seed for seed, _ in seeds], len(run.sequences)
            sums = private_gradient(learner, settings, rows, step, placed, plain)
    loss, gradient, found = share.mean(*sums, model.spec.deterministic)
    # Norm and clipping in float32, before the gradient is rounded to the leaves' dtype.
    norm = get_total_norm(gradient)
    more = found
    if settings.clip_per_example is None:
        more = noise_figures(found, norm.square(), share.counts)
    scaled = gradient
    if settings.max_grad_norm:
        scale = (settings.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)  # as clip_grad_norm_
        scaled = [g * scale for g in gradient]
    for leaf, g in zip(learner.leaves.values(), scaled, strict=True):
        leaf.grad = g.to(leaf.dtype)
    learning_rate = rate_of_step(settings, step, run.steps)
    before = [leaf.detach().clone() for leaf in learner.leaves.values()]
    share.wait()
    loss, grad_norm = update(learner.optimizer, learning_rate, loss, norm)
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        plain, own = [seed for seed, _ in seeds], placed[: len(seeds)]
        cause = nonfinite_cause(learner, own, plain, gradient, run.ranks)
        raise nonfinite_error(settings, step, loss, grad_norm, cause)
    figures = dict(step=step, loss=loss, learning_rate=learning_rate)
    figures |= dict(tokens=share.tokens(), grad_norm=grad_norm)
    return share.finish(figures | _read(_norms_by_group(learner, gradient, before) | more))


def nonfinite_error(
    settings: Settings, step: int, loss: float, grad_norm: float, cause: str
) -> FloatingPointError:
    """The error of a step whose loss or gradient is NaN or infinite."""
    return FloatingPointError(
        f"step {step}: the loss is {loss}, the gradient's norm {grad_norm}: {cause}. The step's"
        f" update was not applied. Lower learning_rate={settings.learning_rate:g} or"
        f" max_grad_norm={settings.max_grad_norm}; at step 1, look for NaN in the base or the"
        " adapter."
    )


def _norms_by_group(
    learner: Learner, gradient: Sequence[Tensor], before: Sequence[Tensor]
) -> dict[str, Any]:
    """Norms by group of tensors: "grad_norm/A", "update_norm/A", "grad_norm/B", ...

    The gradient is the one before clipping. The update is the difference that the step made.
    """
    moved = update_differences([*learner.leaves.values()], before)
    return {
        f"{kind}/{group}": norm
        for kind, tensors in (("grad_norm", gradient), ("update_norm", moved))
        for group, norm in group_norms(learner.leaves, tensors).items()
    }


def _read(figures: Mapping[str, Any]) -> dict[str, float]:
    """Figures as numbers, with one read from the device for all that are tensors."""
    tensors = {name: x.double() for name, x in figures.items() if isinstance(x, Tensor)}
    numbers = torch.stack([*tensors.values()]).tolist()
    return {**figures, **dict(zip(tensors, numbers, strict=True))}


def _loss_and_gradient(
    learner: Learner, micro_batches: Sequence[Batch], seeds: Sequence[_Seeds], share: StepShare
) -> tuple[Float[Tensor, ""], list[Tensor], list[Float[Tensor, ""]]]:
    """The mean loss over all micro-batches' tokens, its gradient by leaf, and, of several
    micro-batches, the squared norm of the gradient of each one's mean loss.

    Gradients are summed in float32 or wider, and divided by the tokens after that.

    Args:
        learner: of the run.
        micro_batches: on the model's device.
        seeds: of their dropout masks and noise. Micro-batches after these are run, but do not
            count (`dealt_batches.Dealt`).
        share: this process's part of the step. If it does not divide, the results are sums, and
            there are no squared norms.
    """
    counts, divides = share.counts, share.divides
    tokens, several = sum(counts) if divides else 1, divides and len(counts) > 1
    device, dtype = learner.model.base["norm"].device, learner.model.base["norm"].dtype
    for scale in FLOAT16_SCALES if dtype == torch.float16 else (1.0,):
        losses, gradient, squares = [], [], []
        for batch, seed in zip_longest(micro_batches, seeds):
            factor = torch.full((), scale, dtype=torch.float32, device=device)
            of_batch, grads = _micro_batch(learner, batch, factor, seed or (None, None))
            if seed is None:
                continue
            gradient = [a + b for a, b in zip(gradient, grads, strict=True)] if gradient else grads
            losses.append(of_batch)  # stays on the device
            if several:
                squares.append((get_total_norm(grads) / scale).square())
        if losses:
            loss = torch.stack(losses).sum() / (scale * tokens)
        else:
            loss, gradient = _nothing(learner)
        if dtype != torch.float16 or not share.any_rank(_overflows(loss, gradient)):
            break
    gradient = [g / (scale * tokens) for g in gradient]
    means = [x / max(n, 1) ** 2 for x, n in zip(squares, counts, strict=False)]  # none of one
    return loss, gradient, means


def _nothing(learner: Learner) -> tuple[Float[Tensor, ""], list[Tensor]]:
    """The loss and gradient of no micro-batch."""
    leaves, device = learner.leaves.values(), learner.model.base["norm"].device
    wide = lambda x: torch.promote_types(x.dtype, torch.float32)
    gradient = [torch.zeros_like(x, dtype=wide(x)) for x in leaves]
    return torch.zeros((), dtype=torch.float32, device=device), gradient


def _micro_batch(
    learner: Learner, batch: Batch, scale: Float[Tensor, ""], seeds: _Seeds
) -> tuple[Float[Tensor, ""], list[Tensor]]:
    """`micro_batch_loss` and its gradient by leaf, in float32 or wider.

    `scale` is a tensor, because a Python number would force a new CUDA graph for every value, and a
    new one each time, because a reused tensor would look like an input that does not change.
    """
    model = learner.model
    seed, first_row = seeds
    # An argument only where it is needed: objectives, and users' loops, do not take it.
    row = {} if first_row is None else {"first_row": first_row}
    given = (model.adapter, model.base, learner.spec, batch, scale, seed)
    loss, grads = learner.loss_and_grad(*given, **row)
    wide = lambda g: g.to(torch.promote_types(g.dtype, torch.float32))
    return loss, [wide(g) for g in named_leaves(grads).values()]


def _overflows(loss: Float[Tensor, ""], gradient: list[Tensor]) -> bool:
    """Whether the gradient is not finite although the loss is."""
    return bool(loss.isfinite() & ~get_total_norm(gradient).isfinite())


def rate_of_step(settings: Settings, step: int, steps: int) -> float:
    """The learning rate of step number `step` (the first is 1) of a run of `steps`."""
    warmup, options = _warmup_steps(settings, steps), settings.lr_scheduler_kwargs
    factor = learning_rate_factor(settings.lr_scheduler, step - 1, warmup, steps, options)
    return settings.learning_rate * factor


def _warmup_steps(settings: Settings, steps: int) -> int:
    """Steps over which the learning rate rises from 0.

    The first of them has rate 0, so a run of one step has none: it would train nothing.
    """
    return math.ceil(settings.warmup_ratio * steps) if steps > 1 else 0


def _seeds(
    learner: Learner, run: Run, step: int, micro_batches: Sequence[Batch]
) -> Sequence[_Seeds]:
    """(seed, first row of the masks) of each micro-batch, 0-d tensors on the model's device.

    Nones without dropout and noise. The row is None if the micro-batch is whole. Parts of one have
    its seed and begin at their rows, so masks do not depend on the number of ranks. The rows of an
    objective's batch may be in another order (pairs are), so there each part has its own seed.
    """
    pieces = micro_batches.pieces if isinstance(micro_batches, Dealt) else None
    count = len(micro_batches) if pieces is None else len(pieces)
    if not is_masked(learner.spec):
        return [(None, None)] * count
    numbers, device = list(range(count)), learner.model.base["norm"].device
    rows: Sequence[Any] = [None] * count
    if pieces is not None and run.objective is not None:
        numbers = [piece.number for piece in pieces]
    elif pieces is not None:
        numbers = [piece.micro_batch for piece in pieces]
        lengths = [batch["input_ids"].shape[1] for batch in micro_batches[:count]]
        first = [piece.row * t for piece, t in zip(pieces, lengths, strict=True)]
        rows = torch.tensor(first, device=device).unbind() if first else []
    # Tensors, for the reason given in `_micro_batch`: a CUDA graph reads them when it is replayed.
    seeds = [dropout_seed(run.settings.seed, step, i) for i in numbers]
    placed = torch.tensor(seeds, device=device).unbind() if seeds else []
    return list(zip(placed, rows, strict=True))


def dropout_seed(seed: int, step: int, micro_batch: int) -> int:
    """A 63-bit seed for the masks and noise of one micro-batch: a hash of the three numbers."""
    (word,) = np.random.SeedSequence((seed, step, micro_batch)).generate_state(1, np.uint64)
    return int(word >> 1)  # fits into int64


@torch.no_grad()
def evaluate(run: Run, model: ModelState, step: int) -> float:
    """The run's loss over all of eval_data, without dropout, in the order given: the mean of -log p
    over the trained tokens, or the mean of the objective's losses.

    Raises:
        FloatingPointError: the mean is NaN or infinite; the message names the step.
    """
    sums = [_eval_sum(run, model, batch) for batch in _eval_batches(run, model)]
    if run.ranks.lockstep and len(sums) < _eval_passes(run):
        _eval_sum(run, model, next(_eval_batches(run, model, first=0)))  # it does not count
    # Sums in float64 count tokens exactly and lose no digit of 10**8 losses in float32. They are
    # read once, so that the GPU need not wait.
    # A rank may have no batch.
    none = torch.zeros((), dtype=torch.float32, device=model.base["norm"].device)
    add = lambda part: torch.stack([x.double() for x in part]).sum()
    total, tokens = run.ranks.sums([*map(add, zip(*(sums or [(none, none)]), strict=True))])
    loss = float(total / tokens)
    if not math.isfinite(loss):
        cause = nonfinite_cause_of_batches(model, _eval_batches(run, model), run.ranks)
        raise FloatingPointError(f"after step {step} the loss of eval_data is {loss}: {cause}.")
    return loss


def _eval_sum(run: Run, model: ModelState, batch: Batch) -> tuple[Tensor, Tensor]:
    """(sum of the losses of a batch, their number)."""
    if run.objective is None:
        context = run.ranks.context
        return loss_sum(model.adapter, model.base, model.spec, batch, context=context)
    _, adapter = require_adapter(model)
    total = run.objective.loss_sum(adapter, model.base, model.spec, batch, None)
    return total, torch.tensor(run.objective.count(batch), device=total.device)


def _eval_passes(run: Run) -> int:
    """The most batches of eval_data that a rank has."""
    return -(-len(run.eval_sequences) // (run.settings.batch_size * run.ranks.data_count))


def _eval_batches(run: Run, model: ModelState, first: int | None = None) -> Iterator[Batch]:
    """The batches of eval_data that this rank runs, or another one, in the order given, each on the
    device when it is due."""
    size, count = run.settings.batch_size, len(run.eval_sequences)
    first = run.ranks.data_rank if first is None else first
    spans = list(spans_of(count, size, 0))[first :: run.ranks.data_count]
    for batch in run.batches(run.eval_sequences, size, seed=None, spans=spans):
        yield _to_device(model, batch)


def _to_device(model: ModelState, batch: Batch) -> dict[str, Tensor]:
    return {name: x.to(model.base["norm"].device) for name, x in batch.items()}
