"""Schedules of the learning rate: the share of the highest rate that each step has.

A schedule is computed from the step's number and the length of the run, so a resumed run needs no
state of it.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

from fastlora.arguments import Rule, argument_problems, describe, number, one_of, whole_number

# (index of the step, the first is 0; steps of the whole run) -> share of the highest rate, >= 0.
Schedule = Callable[[int, int], float]

_SHARE = number(low=0, high=1)

# Scheduler -> the keys that lr_scheduler_kwargs may have for it. Names as in transformers.
_OPTIONS: dict[str, dict[str, Rule]] = {
    "cosine": {"min_lr_rate": _SHARE},
    "linear": {},
    "constant": {},
    "cosine_with_restarts": {"num_cycles": whole_number(1, 2**31)},
    "wsd": {
        "num_decay_steps": whole_number(0, 2**31),
        "decay_type": one_of("cosine", "linear", "1-sqrt"),
        "min_lr_ratio": _SHARE,
    },
}
_OPTIONS["warmup_stable_decay"] = _OPTIONS["wsd"]  # transformers' long name of "wsd"

SCHEDULERS = tuple(_OPTIONS)

# Without num_decay_steps, "wsd" decays over a tenth of the steps: shorter decays gave a higher loss
# (Hägele et al. 2024, arXiv:2405.18392, section 4).
_DECAY_SHARE = 0.1

# Values of a callable schedule that tell it from another one, evenly spread over the run.
_SAMPLES = 1000


def schedule_problems(scheduler: Any, options: Any) -> list[str]:
    """A line for each entry of lr_scheduler_kwargs that the scheduler does not take.

    Args:
        scheduler: if it is not one of `SCHEDULERS`, its own rule reports that.
        options: lr_scheduler_kwargs.
    """
    if not isinstance(options, Mapping):  # None, or its rule reports it
        return []
    if type(scheduler) is not str or scheduler not in _OPTIONS:
        if callable(scheduler) and options:
            return ["lr_scheduler_kwargs means nothing to a function lr_scheduler; leave it out"]
        return []
    rules, problems = _OPTIONS[scheduler], []
    if unknown := [name for name in options if name not in rules]:
        known = ", ".join(rules) or "nothing"
        problems.append(
            f"lr_scheduler_kwargs has {unknown!r:.100}: expected for {scheduler!r}: {known}"
        )
    given = {name: (options[name], rule) for name, rule in rules.items() if name in options}
    return problems + [f"lr_scheduler_kwargs: {line}" for line in argument_problems(given)]


def learning_rate_factor(
    scheduler: str | Schedule,
    index: int,
    warmup_steps: int,
    steps: int,
    options: Mapping[str, Any] | None = None,
) -> float:
    """Share of the highest learning rate at the step with this index (the first is 0).

    The schedules are those of huggingface/transformers (optimization.py, v5.23,
    get_*_schedule_with_warmup): the first step of a warm-up has rate 0, and a decay would reach its
    end at the step after the last one.

    Args:
        scheduler: one of `SCHEDULERS`, or a function, which replaces the warm-up too.
        index: of the step.
        warmup_steps: steps over which the rate rises.
        steps: of the whole run.
        options: lr_scheduler_kwargs, checked.

    Raises:
        ValueError: a function returned something else than a number >= 0.
    """
    if not isinstance(scheduler, str):
        return _called(scheduler, index, steps)
    options = options or {}
    low = options.get("min_lr_ratio", 0.0)
    if index < warmup_steps:
        return index / warmup_steps * (1 - low) + low
    progress = (index - warmup_steps) / max(1, steps - warmup_steps)
    match scheduler:
        case "cosine":
            low = options.get("min_lr_rate", 0.0)
            return 0.5 * (1 + math.cos(math.pi * progress)) * (1 - low) + low
        case "linear":
            return (steps - index) / max(1, steps - warmup_steps)
        case "cosine_with_restarts":
            cycles = options.get("num_cycles", 1)
            return 0.5 * (1 + math.cos(math.pi * (cycles * progress % 1.0)))
        case "wsd" | "warmup_stable_decay":
            decay = options.get("num_decay_steps", math.ceil(_DECAY_SHARE * steps))
            # A decay longer than the rest of the run would start within the warm-up.
            decay = min(decay, steps - warmup_steps)
            done = index - (steps - decay)
            kind = options.get("decay_type", "cosine")
            return 1.0 if done < 0 else _decay(kind, done / max(1, decay)) * (1 - low) + low
        case _:
            return 1.0


def _decay(kind: Literal["cosine", "linear", "1-sqrt"], progress: float) -> float:
    """From 1 at progress 0 to 0 at progress 1."""
    if kind == "linear":
        return 1 - progress
    return 1 - math.sqrt(progress) if kind == "1-sqrt" else 0.5 * (1 + math.cos(math.pi * progress))


def _called(schedule: Schedule, index: int, steps: int) -> float:
    """The value of a user's schedule, checked."""
    factor = schedule(index, steps)
    rule = number(low=0, high=1e30)
    if not rule.accepts(factor):
        raise ValueError(
            f"lr_scheduler({index}, {steps}) returned {describe(factor)}: expected a number >= 0,"
            " the share of learning_rate at the step with this index"
        )
    return float(factor)


def schedule_identity(scheduler: str | Schedule, steps: int) -> str:
    """A text by which two runs tell whether they have the same schedule.

    A function has no name that tells it from others (lambdas do not), so its values are hashed.
    """
    if isinstance(scheduler, str):
        return scheduler
    indices = sorted({i * (steps - 1) // max(1, _SAMPLES - 1) for i in range(_SAMPLES)} | {0})
    values = [_called(scheduler, i, steps) for i in indices]
    digest = hashlib.sha256(repr(values).encode()).hexdigest()
    return f"a function with values of hash {digest[:16]}"
