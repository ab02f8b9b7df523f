"""step_runs(): one optimizer step of several runs; and evaluate_runs()."""

import math
from collections.abc import Iterator, Sequence
from itertools import zip_longest

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.linalg import vector_norm

from fastlora.data.batches import count_trained_tokens
from fastlora.formats.peft.names import named_leaves
from fastlora.models.state import Batch
from fastlora.training.history import Record
from fastlora.training.many.batches import Joined, join
from fastlora.training.many.prepare import RunState
from fastlora.training.many.stack import RunStack, run_losses
from fastlora.training.many.update import StackUpdate, Updated, leaf_norms
from fastlora.training.noise_scale import noise_figures
from fastlora.training.nonfinite import nonfinite_cause
from fastlora.training.run import Run
from fastlora.training.step import FLOAT16_SCALES, dropout_seed, nonfinite_error, rate_of_step

Seeds = Sequence[Int[Tensor, "n"] | None]  # of each micro-batch: one for each run
Figures = dict[str, Float[Tensor, ""]]


def step_runs(
    update: StackUpdate, runs: Sequence[RunState], micro_batches: Sequence[Sequence[Batch]]
) -> list[Record | FloatingPointError]:
    """The next step of each run: writes to its adapter and optimizer, and to the stack.

    As `step.optimizer_step` does for one run: the loss is the mean over a run's own tokens, the
    gradient is clipped by its own norm.

    Args:
        update: of the stack of these runs, in this order.
        runs: before the step.
        micro_batches: of each run. A run with fewer than another has no rows in the last ones.

    Returns:
        The figures of each run's step; an error where its loss or gradient is NaN or infinite. Such
        a run's adapter and optimizer are unchanged.
    """
    stack = update.stack
    device = stack.base["norm"].device
    joined = [_placed(join(column), device) for column in zip_longest(*micro_batches)]
    seeds = _seeds(stack, runs, len(joined))
    parts = [[*map(count_trained_tokens, batches)] for batches in micro_batches]
    counts = [*map(sum, parts)]
    wide = torch.promote_types(stack.base["norm"].dtype, torch.float32)
    tokens = torch.tensor(counts, dtype=wide, device=device)
    limits = [run.run.settings.max_grad_norm or math.inf for run in runs]
    limit = torch.tensor(limits, dtype=wide, device=device)
    sums, scales, gradient, squares = _sums_and_gradient(stack, joined, seeds)
    rates = [rate_of_step(run.run.settings, run.step, run.run.steps) for run in runs]
    done = update(gradient, sums, scales, tokens, limit, rates)
    norms = {"grad_norm": done.of_gradient, "update_norm": done.of_change}
    more = _read(
        [a | b for a, b in zip(_by_group(stack, norms), _noise(done, squares, parts), strict=True)]
    )
    results: list[Record | FloatingPointError] = []
    figures_of = zip(runs, done.losses, done.norms, strict=True)
    for i, (run, loss, size) in enumerate(figures_of):
        if math.isfinite(loss) and math.isfinite(size):
            figures = dict(loss=loss, learning_rate=rates[i], tokens=counts[i], grad_norm=size)
            results.append({"step": run.step} | figures | more[i])
            continue
        own = [{k: x.to(device) for k, x in batch.items()} for batch in micro_batches[i]]
        own_seeds = [None if s is None else s[i] for s in seeds[: len(own)]]
        cause = nonfinite_cause(run.learner, own, own_seeds, _gradient_of(stack, run, i, gradient))
        results.append(nonfinite_error(run.run.settings, run.step, loss, size, cause))
    return results


def _placed(joined: Joined, device: torch.device) -> Joined:
    batch = {name: x.to(device) for name, x in joined.batch.items()}
    return Joined(batch, None if joined.widths is None else joined.widths.to(device))


def _seeds(stack: RunStack, runs: Sequence[RunState], micro_batches: int) -> Seeds:
    """Those that each run has alone; None without dropout and noise."""
    lora = stack.spec.lora
    if (lora is None or lora.lora_dropout == 0) and stack.spec.neftune_alpha is None:
        return [None] * micro_batches
    seeds = [
        [dropout_seed(run.run.settings.seed, run.step, i) for run in runs]
        for i in range(micro_batches)
    ]
    return torch.tensor(seeds, device=stack.base["norm"].device).unbind()


def _sums_and_gradient(
    stack: RunStack, joined: Sequence[Joined], seeds: Seeds
) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"], list[Tensor], list[Float[Tensor, "n"]]]:
    """(each run's sum of losses, the scales, the gradient of the scaled sums by leaf, squares).

    The squares are the squared norms of the gradients of each micro-batch's sums, if there are
    several.

    Over a float16 base, a run whose gradient overflows is differentiated again with a smaller
    scale, as in a single run.
    """
    norm = stack.base["norm"]
    wide = torch.promote_types(norm.dtype, torch.float32)
    scales = torch.ones(stack.n, dtype=wide, device=norm.device)
    smaller = FLOAT16_SCALES[1:] if norm.dtype == torch.float16 else ()
    for scale in (*smaller, None):
        sums, gradient, squares = _pass(stack, joined, seeds, scales)
        if scale is None:
            break
        overflows = sums.isfinite() & ~vector_norm(leaf_norms(gradient), dim=0).isfinite()
        if not bool(overflows.any()):
            break
        scales = torch.where(overflows, scale, scales)
    return sums, scales, gradient, [(x / scales).square() for x in squares]


def _pass(
    stack: RunStack, joined: Sequence[Joined], seeds: Seeds, scales: Float[Tensor, "n"]
) -> tuple[Float[Tensor, "n"], list[Tensor], list[Float[Tensor, "n"]]]:
    """(sums of losses, gradient of the scaled sums) over all micro-batches; and of several ones the
    norm of each one's gradient."""
    sums, gradient, sizes = torch.zeros_like(scales), [], []
    for (batch, widths), seed in zip(joined, seeds, strict=True):
        # A new tensor each time: a CUDA graph takes one that is reused for a constant.
        trained = {"adapters": stack.adapters, "weights": scales.clone()}
        _, grads = stack.loss_and_grad(trained, stack.base, stack.spec, batch, widths, seed)
        parts = [_wide(x) for x in named_leaves(grads["adapters"]).values()]
        if len(joined) > 1:
            sizes.append(vector_norm(leaf_norms(parts), dim=0))
        gradient = [a + b for a, b in zip(gradient, parts, strict=True)] if gradient else parts
        sums = sums + grads["weights"]
    return sums, gradient, sizes


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _gradient_of(stack: RunStack, run: RunState, i: int, gradient: list[Tensor]) -> list[Tensor]:
    """The gradient of run i, in the order of its learner's leaves."""
    parts = {
        id(own[i]): part[i] for own, part in zip(stack.own, stack.parts(gradient), strict=True)
    }
    return [parts[id(leaf)] for leaf in run.learner.leaves.values()]  # pyright: ignore


def _by_group(stack: RunStack, norms: dict[str, Float[Tensor, "leaves n"]]) -> list[Figures]:
    """For each run "grad_norm/A", "update_norm/A", "grad_norm/B", ..."""
    found: list[Figures] = [{} for _ in range(stack.n)]
    for kind, of_leaves in norms.items():
        for group in sorted(set(stack.groups)):
            mine = [i for i, other in enumerate(stack.groups) if other == group]
            for figures, norm in zip(found, vector_norm(of_leaves[mine], dim=0), strict=True):
                figures[f"{kind}/{group}"] = norm
    return found


def _noise(
    done: Updated, squares: Sequence[Float[Tensor, "n"]], counts: Sequence[Sequence[int]]
) -> list[Figures]:
    """Each run's `noise_figures`, from the squared norms of its micro-batches' gradients.

    Args:
        done: the update.
        squares: of the gradients of the sums of each micro-batch; none of a single one.
        counts: tokens of each run's micro-batches. A run may have fewer than another.
    """
    wholes = vector_norm(done.of_gradient, dim=0).square()
    found = []
    for i, of_run in enumerate(counts):
        means = [x[i] / max(n, 1) ** 2 for x, n in zip(squares, of_run, strict=False)]
        found.append(noise_figures(means, wholes[i], of_run))
    return found


def _read(figures: Sequence[Figures]) -> list[Record]:
    """The runs' figures as numbers, with one read from the device for all."""
    numbers = iter(torch.stack([x for row in figures for x in row.values()]).tolist())
    return [{name: next(numbers) for name in row} for row in figures]


@torch.no_grad()
def evaluate_runs(stack: RunStack, runs: Sequence[RunState]) -> list[float]:
    """`step.evaluate` for each of the stack's runs, in one pass. A loss may be NaN."""
    model, device, n = (stack.adapters, stack.base, stack.spec), stack.base["norm"].device, stack.n
    sums, tokens = [], torch.zeros(n, dtype=torch.int64, device="cpu")
    for column in zip_longest(*(_eval_batches(run.run) for run in runs)):
        batch, widths = _placed(join(column), device)
        sums.append(run_losses(*model, batch, n, widths).double())
        counts = [0 if b is None else count_trained_tokens(b) for b in column]
        tokens += torch.tensor(counts, device="cpu")
    return (torch.stack(sums).sum(0).cpu() / tokens).tolist()


def _eval_batches(run: Run) -> Iterator[Batch]:
    return iter(run.batches(run.eval_sequences, run.settings.batch_size, seed=None))
