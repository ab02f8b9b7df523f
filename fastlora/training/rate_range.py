"""find_learning_rate(): a learning-rate range test (Smith 2017, arXiv:1506.01186, section 3.3).

A trial run raises the rate by the same factor at every step, from far too low to too high. The loss
falls fastest at a rate that suits the whole run, and rises where steps become too large.
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from fastlora.arguments import check_arguments, number, whole_number
from fastlora.data.sources import Data
from fastlora.errors import raise_problems
from fastlora.models.input_checks import MODEL
from fastlora.models.state import ModelState
from fastlora.ops.dispatch import refuse_transforms
from fastlora.text.tokenizer import Tokenizer
from fastlora.training.history import Record
from fastlora.training.logging.figures import draw_rates, smooth
from fastlora.training.logging.open import on_all_ranks
from fastlora.training.loop import train
from fastlora.training.settings import Settings

# As in fastai's lr_find (fastai/callback/schedule.py): the run ends when the smoothed loss is four
# times its lowest value.
_DIVERGED = 4.0

# The weight of old losses in the smoothed one, over 100 steps; other lengths keep the same share.
_SMOOTHING = 0.9

# The arguments of train that the range test sets, or that mean nothing to it.
_OWN = {"max_steps", "num_epochs", "learning_rate", "learning_rates", "lr_scheduler"}
_OWN |= {"lr_scheduler_kwargs", "warmup_ratio", "eval_every", "save_every", "keep", "keep_best"}
_OWN |= {"early_stopping", "sample_prompts", "sample_tokens"}


@dataclass(frozen=True, slots=True, kw_only=True)
class RateRange:
    """The losses of a range test. `suggestion` is a learning rate for `train`."""

    rates: tuple[float, ...]
    """The learning rate of each step."""
    losses: tuple[float, ...]
    """The loss before each step's update."""
    smoothed: tuple[float, ...]
    """Moving averages of the losses."""
    suggestion: float
    """The rate at which the smoothed loss falls fastest over the logarithm of the rate."""

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Write a picture of the loss over the rate; see `History.plot`."""
        draw_rates(path, self.rates, self.losses, self.smoothed, self.suggestion)


class _Diverged(Exception):
    """The loss has risen so far that higher rates show nothing."""


def find_learning_rate(
    model: ModelState,
    tokenizer: Tokenizer | None,
    data: Data,
    *,
    low: float = 1e-6,
    high: float = 1.0,
    steps: int = 100,
    progress: bool = True,
    **settings: Any,
) -> RateRange:
    """Try learning rates from `low` to `high` on a copy of the adapter, and suggest one.

        found = fastlora.find_learning_rate(model, tokenizer, "train.jsonl", batch_size=4)
        found.plot("rates.png")
        model, history = fastlora.train(model, tokenizer, "train.jsonl", batch_size=4,
                                        learning_rate=found.suggestion)

    The suggestion depends on the batch size and the optimizer: give those of the run. It is a
    guess by a factor of about three; look at the picture.

    Args:
        model: with an adapter. It is not changed.
        tokenizer: the model's.
        data: as for `train`.
        low: rate of the first step.
        high: rate of the last step, unless the loss diverges before.
        steps: of the trial run, 20 or more.
        progress: show a bar on stderr.
        settings: more arguments of `train` that change its steps, such as batch_size, optimizer,
            packing or seed.

    Raises:
        ValueError: as `train`; or an argument that the test sets itself was given; or the loss
            did not fall at any rate.
        FloatingPointError: the loss is NaN or infinite within the first fifth of the steps.
    """
    refuse_transforms("fastlora.find_learning_rate")
    given = {f.name for f in fields(Settings)} - _OWN
    check_arguments(
        "fastlora.find_learning_rate",
        model=(model, MODEL),
        low=(low, number(above=0, high=1e30)),
        high=(high, number(above=0, high=1e30)),
        steps=(steps, whole_number(20, 2**31)),
    )
    problems = [
        f"{name}: the range test sets it itself" if name in _OWN else f"{name} is not a setting"
        for name in settings
        if name not in given
    ]
    if low >= high:
        problems.append(f"low={low:g}: expected less than high={high:g}")
    raise_problems(ValueError, "fastlora.find_learning_rate cannot use these arguments:", problems)
    records: list[Record] = []
    smoothing = _SMOOTHING ** (100 / steps)

    def watch(record: Record) -> None:
        records.append(record)
        curve = smooth([r["loss"] for r in records], smoothing)
        if len(records) > steps // 10 and curve[-1] > _DIVERGED * min(curve):
            raise _Diverged

    run = dict(max_steps=steps, learning_rate=high, lr_scheduler=exponential(low, high))
    try:
        log = on_all_ranks(watch)
        train(model, tokenizer, data, log=log, progress=progress, **run, **settings)
    except _Diverged:
        pass
    except FloatingPointError:
        # Rates that overflow are an answer, but not at the beginning.
        if len(records) < steps // 5:
            raise
    return rate_range(records, smoothing)


def exponential(low: float, high: float) -> Callable[[int, int], float]:
    """A schedule from low / high to 1, with a constant ratio of neighbouring steps."""
    return lambda index, steps: (low / high) ** (1 - index / max(1, steps - 1))


def rate_range(records: Sequence[Record], smoothing: float) -> RateRange:
    """The result of a trial run from its records.

    Raises:
        ValueError: the loss did not fall.
    """
    rates = [record["learning_rate"] for record in records]
    losses = [record["loss"] for record in records]
    curve = smooth(losses, smoothing)
    lowest = min(range(len(curve)), key=curve.__getitem__)
    # Before the lowest point: the slope after divergence says nothing. The first steps are left
    # out, because their average is of few losses.
    first = len(curve) // 10
    if lowest <= first + 1:
        raise ValueError(
            f"the loss fell at no rate from {rates[0]:g} to {rates[-1]:g}: lower `low`, or give"
            " more steps or larger batches, whose losses vary less"
        )
    slope = lambda i: (curve[i + 1] - curve[i - 1]) / math.log(rates[i + 1] / rates[i - 1])
    steepest = min(range(first + 1, lowest), key=slope)
    return RateRange(
        rates=tuple(rates),
        losses=tuple(losses),
        smoothed=tuple(curve),
        suggestion=rates[steepest],
    )
