"""History: the figures of every step of a run."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fastlora.arguments import Rule, describe, number, setting, setting_problems, whole_number
from fastlora.errors import raise_problems
from fastlora.training.logging.figures import draw

Record = dict[str, Any]  # the figures of one step, with which `log` is called

# What every record must hold. It has "eval_loss" after an evaluation, and norms by group such as
# "grad_norm/A" and "update_norm/B", which checkpoints of older versions lack.
_RECORD_RULES: dict[str, Rule] = {
    "step": whole_number(1, 2**63),
    "loss": number(),
    "learning_rate": number(low=0),
    "tokens": whole_number(1, 2**63),
    "seconds": number(low=0),
    "grad_norm": number(low=0),
}
_EVAL_LOSS = number()


def _column(rule: Rule) -> Any:
    """A dataclass field: a tuple whose items all follow a rule."""
    accepts = lambda x: isinstance(x, tuple) and all(map(rule.accepts, x))
    return setting(Rule(accepts, f"a tuple whose items are each {rule.expected}"))


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
        )

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
