"""step."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.utils._pytree import tree_map

from fastlora.data.batches import count_trained_tokens
from fastlora.formats.peft.names import named_leaves
from fastlora.functional import loss_sum
from fastlora.model import Model
from fastlora.models.names import projection_shape
from fastlora.models.params import PROJECTIONS, Adapter, Base
from fastlora.models.spec import Extras, Spec
from fastlora.models.state import Batch, Seed
from fastlora.runtime.gradients import value_and_grad
from fastlora.training.history import Record
from fastlora.training.optimizers import make_optimizer
from fastlora.training.run import TrainingPlan
from fastlora.training.settings import Settings


class Learner(NamedTuple):
    """A model whose adapter is memory of its own, the optimiser that writes to it, and `_share`
    with its gradient."""

    model: Model
    optimizer: torch.optim.Optimizer
    share_and_grad: Callable[..., tuple[Tensor, Adapter]]


def make_learner(model: Model, name: str, weight_decay: float, *, cuda_graph: bool) -> Learner:
    """An optimiser over clones of the adapter's leaves, in the order of `named_leaves`."""
    own = model.with_adapter(tree_map(lambda x: x.detach().clone(), model.adapter))
    leaves = list(leaves_by_name(own.adapter).values())
    share_and_grad = value_and_grad(_micro_loss, cuda_graph=cuda_graph)
    return Learner(own, make_optimizer(name, leaves, weight_decay), share_and_grad)


# Parameters of a layer times tokens, up to which the GPU waits for the host: it takes 1.3 ms for
# their products, forward and backward, and the host some 3 ms for their launches (H100, 1B).
_GRAPH_LIMIT_OPERATIONS = 2.5e11


def use_cuda_graph(spec: Spec, device: str, settings: Settings) -> bool:
    """Whether to play micro-batches back from a CUDA graph: small ones, all of one shape, and of a
    model that asks the host nothing: a loop over experts and trained rows do."""
    if device != "cuda" or not settings.packing or spec.recompute == "offload":
        return False
    if any(spec.config.sparse_layers) or spec.extras != Extras() or spec.qat_scheme is not None:
        return False
    of_layer = sum(rows * d for rows, d in (projection_shape(spec.config, n) for n in PROJECTIONS))
    return settings.batch_size * spec.max_seq_length * of_layer < _GRAPH_LIMIT_OPERATIONS


def leaves_by_name(adapter: Adapter | None) -> dict[str, Tensor]:
    assert adapter is not None
    return named_leaves(adapter)


def evaluate(run: TrainingPlan, model: Model, step: int) -> float:
    """Mean of -log p over all trained tokens of `eval_sequences`, in the order given."""
    stream = run.batches(run.eval_sequences, run.settings.batch_size, seed=None)
    with torch.no_grad():
        sums = [
            loss_sum(model.adapter, model.base, model.spec, _to_device(model, b)) for b in stream
        ]
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
def optimizer_step(
    run: TrainingPlan, learner: Learner, step: int, micro_batches: Sequence[Batch]
) -> Record:
    """Gradient, clipping and update number `step`; one read from the device, at the end."""
    s, (model, optimizer, _) = run.settings, learner
    tokens = sum(map(count_trained_tokens, micro_batches))
    # All at once, while the device is idle: a copy to it waits for the work already queued there.
    placed = [_to_device(model, batch) for batch in micro_batches]
    seeds = _mask_seeds(model, s.seed, step, len(placed))
    loss, gradient = _loss_and_gradient(learner, placed, tokens, seeds)
    norm = get_total_norm(gradient)
    if s.max_grad_norm:
        scale = (s.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)  # as clip_grad_norm_
        gradient = [g * scale for g in gradient]
    for leaf, g in zip(leaves_by_name(model.adapter).values(), gradient, strict=True):
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
    learner: Learner, micro_batches: Sequence[Batch], tokens: int, mask_seeds: Sequence[Seed]
) -> tuple[Float[Tensor, ""], list[Tensor]]:
    """Of the mean over all micro-batches' `tokens`; summed in at least float32, leaf by leaf."""
    losses, gradient, model = [], [], learner.model
    base, spec = model.base, model.spec
    for batch, seed in zip(micro_batches, mask_seeds, strict=True):
        # A tensor, or each number would be another recording; its own, or it would seem to stay.
        count = torch.full((), tokens, device=base["norm"].device)
        share, grads = learner.share_and_grad(model.adapter, base, spec, batch, count, seed)
        wide = [
            g.to(torch.promote_types(g.dtype, torch.float32))
            for g in leaves_by_name(grads).values()
        ]
        gradient = [a + b for a, b in zip(gradient, wide, strict=True)] if gradient else wide
        losses.append(share)
    return torch.stack(losses).sum(), gradient


def _micro_loss(
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


def _to_device(model: Model, batch: Batch) -> dict[str, Tensor]:
    return {name: x.to(model.base["norm"].device) for name, x in batch.items()}
