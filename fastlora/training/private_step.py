"""DP-SGD: Poisson sampling, clipping by example, and noise (Abadi et al. 2016, arXiv:1607.00133).

Each step draws every row with probability q = B / N, independently, where N is the number of rows
and B that of the expected batch. The gradient of a row's mean of -log p is scaled down to the norm
C, if it is larger. The step's gradient is

    (sum of the clipped gradients + normal noise of standard deviation noise_multiplier * C) / B

B is a constant: dividing by the number of rows that were drawn would reveal it. A row's own mean is
taken, and not one over the batch's tokens, with which a row would change the others' gradients.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fastlora.formats.peft.names import named_leaves
from fastlora.functional import AnyAdapter, row_losses
from fastlora.models.params import Base
from fastlora.models.spec import Spec
from fastlora.models.state import Batch, Seed
from fastlora.ops.loss.ignore import IGNORE
from fastlora.training.private_checks import expected_batch

# The last words of the seeds of these generators. No other generator of a run has these words.
_ROWS, _NOISE = (0, 1), (0, 2)


def drawn_rows(seed: int, step: int, rows: int, probability: float) -> list[int]:
    """The rows of a step: each with this probability, independently of the others.

    Args:
        seed: of the run.
        step: its number, from 1.
        rows: how many there are.
        probability: of each.
    """
    generator = np.random.default_rng([seed, step, *_ROWS])
    return np.flatnonzero(generator.random(rows) < probability).tolist()


def private_batches(run: Any, done: int) -> Iterator[list[Batch]]:
    """Without end, the micro-batches of each step after the first `done` steps.

    A step without any row has no micro-batch.
    """
    s, rows = run.settings, run.sequences
    probability = expected_batch(s) / len(rows)
    step = done
    while True:
        step += 1
        chosen = [rows[i] for i in drawn_rows(s.seed, step, len(rows), probability)]
        yield [*run.batches(chosen, s.batch_size, seed=None)]


def row_means(
    adapter: AnyAdapter,
    base: Base,
    spec: Spec,
    batch: Batch,
    scale: Float[Tensor, ""],
    seed: Seed,
) -> Float[Tensor, "b"]:
    """Mean of -log p over each row's trained tokens, times `scale`; 0 for a row without any."""
    sums, tokens = row_losses(adapter, base, spec, batch, seed=seed)
    return sums / tokens.clamp(min=1) * scale


class PrivateGradient(NamedTuple):
    """The results of the micro-batches of a private step."""

    loss: Float[Tensor, ""]  # mean over the drawn rows' tokens; 0 without rows
    gradient: list[Tensor]  # by leaf, in float32 or wider
    figures: dict[str, float | Tensor]


def private_gradient(
    learner: Any, settings: Any, rows: int, step: int, batches: Sequence[Batch], seeds: Sequence
) -> PrivateGradient:
    """The noisy gradient of a step.

    Args:
        learner: its `loss_and_grad` is `value_and_grad(row_means, per_example=True)`.
        settings: of the run.
        rows: number of rows of the data.
        step: its number, from 1.
        batches: the step's micro-batches, on the model's device.
        seeds: of their dropout masks.

    Returns:
        The loss, the gradient, and figures for the record: "drawn_rows", "clipped_share" of them,
        "noise_to_signal" (expected norm of the noise over the norm of the clipped sum),
        "sampling_rate" and "noise_multiplier".
    """
    clip, noise = settings.clip_per_example, settings.noise_multiplier
    device = learner.model.base["norm"].device
    wide = [torch.promote_types(x.dtype, torch.float32) for x in learner.leaves.values()]
    shapes = zip(learner.leaves.values(), wide, strict=True)
    total = [torch.zeros(x.shape, dtype=dtype, device=device) for x, dtype in shapes]
    losses, counts, clipped = [torch.zeros((), dtype=torch.float32, device=device)], [], []
    for batch, seed in zip(batches, seeds, strict=True):
        scale = torch.ones((), dtype=torch.float32, device=device)
        model = learner.model
        values, grads = learner.loss_and_grad(
            model.adapter, model.base, learner.spec, batch, scale, seed
        )
        each = [g.to(d) for g, d in zip(named_leaves(grads).values(), wide, strict=True)]
        norms = sum(g.flatten(1).square().sum(1) for g in each).sqrt()  # pyright: ignore
        factors = (clip / norms).clamp(max=1.0)
        total = [
            t + torch.tensordot(factors.to(g.dtype), g, 1) for t, g in zip(total, each, strict=True)
        ]
        tokens = (batch["labels"][:, 1:] != IGNORE).sum(1)
        losses.append((values * tokens).sum())
        counts.append(tokens.sum())
        clipped.append(norms > clip)
    signal = _norm(total)
    noisy = _with_noise(total, noise * clip, settings.seed, step)
    mean = [t / expected_batch(settings) for t in noisy]
    drawn = sum(map(len, clipped))
    numbers = sum(x.numel() for x in total)
    figures: dict[str, float | Tensor] = {
        "drawn_rows": float(drawn),
        "clipped_share": torch.cat(clipped).double().mean() if drawn else 0.0,
        "noise_to_signal": noise * clip * numbers**0.5 / signal.double().clamp(min=1e-30),
        "sampling_rate": expected_batch(settings) / rows,
        "noise_multiplier": float(noise),
    }
    trained = torch.stack(counts).sum().clamp(min=1) if counts else 1
    return PrivateGradient(sum(losses) / trained, mean, figures)  # pyright: ignore


def _norm(tensors: Sequence[Tensor]) -> Float[Tensor, ""]:
    return torch.stack([x.double().square().sum() for x in tensors]).sum().sqrt()


def _with_noise(
    total: Sequence[Tensor], deviation: float, seed: int, step: int
) -> Sequence[Tensor]:
    """The tensors plus independent normal noise, from a generator of this step alone."""
    if not deviation:
        return total
    (word,) = np.random.SeedSequence([seed, step, *_NOISE]).generate_state(1, np.uint64)
    generator = torch.Generator(total[0].device).manual_seed(int(word >> 1))
    draw = lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    return [x + deviation * draw(x) for x in total]
