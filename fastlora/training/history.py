"""History: the figures of every step of a run."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fastlora.arguments import (
    Rule,
    check_arguments,
    describe,
    number,
    optional,
    setting,
    setting_problems,
    whole_number,
)
from fastlora.errors import raise_problems
from fastlora.training.logging.figures import draw
from fastlora.training.noise_scale import noise_scale
from fastlora.training.privacy import spent_epsilon

Record = dict[str, Any]  # the figures of one step, with which `log` is called

# What every record must hold. It has "eval_loss" after an evaluation, and norms by group such as
# "grad_norm/A" and "update_norm/B", which checkpoints of older versions lack.
_RECORD_RULES: dict[str, Rule] = {
    "step": whole_number(1, 2**63),
    "loss": number(),
    "learning_rate": number(low=0),
    "tokens": whole_number(0, 2**63),  # 0: a step of a private run that drew no row
    "seconds": number(low=0),
    "grad_norm": number(low=0),
}
_EVAL_LOSS = number()


# What the records of some runs hold too -> the field of History.
_MORE = {
    "gradient_signal": "gradient_signals",
    "gradient_noise": "gradient_noises",
    "sampling_rate": "sampling_rates",
    "noise_multiplier": "noise_multipliers",
}


def _column(rule: Rule, *default: tuple) -> Any:
    """A dataclass field: a tuple whose items all follow a rule."""
    accepts = lambda x: isinstance(x, tuple) and all(map(rule.accepts, x))
    return setting(Rule(accepts, f"a tuple whose items are each {rule.expected}"), *default)


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """The figures of a run, one entry for each optimizer step. A resumed run has its earlier steps
    too.

    Raises:
        ValueError: a field is not a tuple of such numbers.
    """

    steps: tuple[int, ...] = _column(_RECORD_RULES["step"])
    """1, 2, 3, ..."""
    losses: tuple[float, ...] = _column(_RECORD_RULES["loss"])
    """Mean of -log p over the step's trained tokens, before its update."""
    learning_rates: tuple[float, ...] = _column(_RECORD_RULES["learning_rate"])
    tokens: tuple[int, ...] = _column(_RECORD_RULES["tokens"])
    """Trained tokens of the step: the loss is a mean over them."""
    seconds: tuple[float, ...] = _column(_RECORD_RULES["seconds"])
    """Wall time of the step, without evaluation and saving."""
    grad_norms: tuple[float, ...] = _column(_RECORD_RULES["grad_norm"])
    """Euclidean norm of the adapter's gradient, before clipping."""
    eval_steps: tuple[int, ...] = _column(_RECORD_RULES["step"])
    """The steps after which eval_data was evaluated."""
    eval_losses: tuple[float, ...] = _column(_EVAL_LOSS)
    """Mean of -log p over all trained tokens of eval_data, without dropout."""
    gradient_signals: tuple[float, ...] = _column(number(), ())
    """Estimate of the squared norm of the true gradient, of each step with several micro-batches;
    see `noise_scale`."""
    gradient_noises: tuple[float, ...] = _column(number(), ())
    """Estimate of the trace of the covariance of one token's gradient, of the same steps."""
    sampling_rates: tuple[float, ...] = _column(number(low=0), ())
    """Of a private run: the probability of a row in each step; see `epsilon`."""
    noise_multipliers: tuple[float, ...] = _column(number(low=0), ())
    """Of a private run: noise_multiplier of each step."""

    def __post_init__(self) -> None:
        """Check the fields."""
        raise_problems(
            ValueError, "fastlora.History cannot use these arguments:", setting_problems(self)
        )

    @classmethod
    def of(cls, records: Sequence[Record]) -> "History":
        """The history of a run from its records, which `log` was called with.

        Raises:
            ValueError: a record lacks a figure.
        """
        problems = record_problems(records)
        raise_problems(ValueError, "History.of cannot use these records:", problems)
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
            **{
                column: tuple(record[name] for record in records if name in record)
                for name, column in _MORE.items()
            },
        )

    def noise_scale(self, last: int | None = None) -> float:
        """The simple noise scale in tokens (McCandlish et al. 2018, arXiv:1812.06162), or for
        another loss in its items: batches much smaller than it are dominated by noise, and larger
        ones hardly take better steps. NaN if no step had several micro-batches
        (gradient_accumulation_steps=2 with half the batch_size takes the same steps), and for
        private runs.

        Args:
            last: of this many steps that have an estimate; None: of all. It grows during training.

        Raises:
            ValueError: `last` is not a positive whole number.
        """
        given = dict(last=(last, optional(whole_number(1))))
        check_arguments("History.noise_scale", **given)
        first = 0 if last is None else -last
        signals, noises = self.gradient_signals[first:], self.gradient_noises[first:]
        return noise_scale(signals, noises) if signals else float("nan")

    def epsilon(self, delta: float) -> float:
        """Epsilon of the (epsilon, delta)-differential privacy of the trained adapter, after a run
        with clip_per_example and noise_multiplier, for a row of the data that is added or removed.
        It is infinite without noise. This history itself, with its losses, is not private.

        Args:
            delta: in (0, 1), less than 1 / the number of rows.

        Raises:
            ValueError: `delta` is no such number, or the run was not private.
            ModuleNotFoundError: dp-accounting is not installed (extra `privacy`).
        """
        between = Rule(lambda x: number(above=0, high=1).accepts(x) and x < 1, "a number in (0, 1)")
        check_arguments("History.epsilon", delta=(delta, between))
        if not self.steps or len(self.sampling_rates) != len(self.steps):
            raise ValueError(
                "this run was not private; pass train clip_per_example and noise_multiplier"
            )
        return spent_epsilon(self.sampling_rates, self.noise_multipliers, delta)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Write a picture of the loss, the learning rate, the throughput and the gradient's norm.

        Args:
            path: the file; its ending gives the format: .png, .svg, .pdf, ... An existing one is
                replaced.

        Raises:
            ValueError: `path` is not a path, its ending no format, or the history is empty.
            ModuleNotFoundError: matplotlib is not installed (extra `plots`).
        """
        draw(path, {"run": asdict(self)})


def record_problems(records: Any, *, from_first_step: bool = False) -> list[str]:
    """A line for every figure of the records that is missing or is not the number it should be.

    Args:
        records: anything.
        from_first_step: the records must be those of steps 1, 2, 3, ..., one each.
    """
    if not isinstance(records, Sequence) or isinstance(records, str | bytes):
        return [f"records={describe(records)}: expected a list of dicts"]
    # Records may come from a checkpoint that was edited by hand.
    problems = []
    for index, record in enumerate(records):
        if not isinstance(record, Mapping):
            problems.append(f"records[{index}]={describe(record)}: expected a dict")
            continue
        rules = _RECORD_RULES | ({"eval_loss": _EVAL_LOSS} if "eval_loss" in record else {})
        problems += [
            f"records[{index}], {name}={describe(record.get(name))}: expected {rule.expected}"
            for name, rule in rules.items()
            if not rule.accepts(record.get(name))
        ]
        if from_first_step and record.get("step") != index + 1:
            problems.append(
                f"records[{index}] is of step {record.get('step')!r:.80}: expected the"
                f" record of step {index + 1}"
            )
    return problems
