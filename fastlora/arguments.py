"""Rules for arguments: each is declared once, beside the argument or setting that it checks.

A rule says which values are accepted and, in words, what is expected. `setting` puts a rule into a
dataclass field, so that a record of settings checks itself; `argument_problems` checks arguments
that belong to no record. Both give lines for `errors.raise_problems`, which shows all at once.
"""

import math
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, Field, field, fields
from typing import Any, NamedTuple, TypeVar

from fastlora.errors import raise_problems


class Rule(NamedTuple):
    """Which values an argument may have."""

    accepts: Callable[[Any], bool]
    expected: str  # completes the sentence "expected ..."


def whole_number(low: int, high: int | None = None) -> Rule:
    """An int (not a bool) of at least `low`, and below `high` if that is given."""
    fits = lambda x: type(x) is int and x >= low and (high is None or x < high)
    if high is None:
        return Rule(fits, f"a whole number >= {low}")
    bound = f"2**{high.bit_length() - 1}" if high >= 2**31 else f"{high:,}"
    return Rule(fits, f"a whole number in [{low}, {bound})")


def number(
    *,
    above: float | None = None,
    low: float | None = None,
    high: float | None = None,
) -> Rule:
    """A finite int or float (not a bool): greater than `above`, from `low`, up to `high`."""

    def fits(x: Any) -> bool:
        if type(x) not in (int, float):
            return False
        if type(x) is int and abs(x) >= 2**1023:  # math.isfinite overflows on larger ints
            return False
        return (
            math.isfinite(x)
            and (above is None or x > above)
            and (low is None or x >= low)
            and (high is None or x <= high)
        )

    if low is not None and high is not None:
        return Rule(fits, f"a number from {low:g} to {high:g}")
    if above is not None and high is not None:
        return Rule(fits, f"a number in ({above:g}, {high:g}]")
    if above is not None:
        return Rule(fits, f"a number > {above:g}")
    return Rule(fits, "a finite number" if low is None else f"a number >= {low:g}")


def one_of(*values: str) -> Rule:
    """One of these texts."""
    return Rule(lambda x: type(x) is str and x in values, " or ".join(map(repr, values)))


def optional(rule: Rule) -> Rule:
    """None, or what `rule` accepts."""
    return Rule(lambda x: x is None or rule.accepts(x), f"None or {rule.expected}")


def instance(cls: type | tuple[type, ...], expected: str) -> Rule:
    """An object of a class."""
    return Rule(lambda x: isinstance(x, cls), expected)


FLAG = Rule(lambda x: type(x) is bool, "True or False")
TEXT = Rule(lambda x: isinstance(x, str), "a text")
RANDOM_SEED = whole_number(0, 2**64)  # what torch.Generator accepts
FUNCTION = Rule(callable, "a function")


def _is_path(value: Any) -> bool:
    if not isinstance(value, str | os.PathLike):
        return False
    path = os.fspath(value)
    return isinstance(path, str) and path != "" and "\0" not in path


PATH = Rule(_is_path, "a path: a text that is not empty, or a pathlib.Path")


def setting(rule: Rule, default: Any = MISSING) -> Any:
    """A field of a dataclass of settings, with the rule that its value must follow."""
    return field(default=default, metadata={"rule": rule})


SettingsT = TypeVar("SettingsT")


def settings_from(cls: type[SettingsT], arguments: Mapping[str, Any]) -> SettingsT:
    """A record of settings from a function's arguments, by name: `settings_from(cls, locals())`."""
    names = [f.name for f in fields(cls)]  # pyright: ignore[reportArgumentType]
    return cls(**{name: arguments[name] for name in names})


def rule_of(setting_field: Field) -> Rule:
    """The rule that `setting` gave a field."""
    return setting_field.metadata["rule"]


def setting_problems(settings: Any, only: Collection[str] | None = None) -> list[str]:
    """A line for every field of a record of settings whose value breaks the field's rule.

    Args:
        settings: an instance of a dataclass whose fields were made by `setting`.
        only: names of the fields to check; None checks all.
    """
    return argument_problems(
        {
            f.name: (getattr(settings, f.name), rule_of(f))
            for f in fields(settings)
            if only is None or f.name in only
        }
    )


def argument_problems(arguments: Mapping[str, tuple[Any, Rule]]) -> list[str]:
    """A line for every argument whose value breaks its rule: name -> (value, rule)."""
    return [
        f"{name}={describe(value)}: expected {rule.expected}"
        for name, (value, rule) in arguments.items()
        if not rule.accepts(value)
    ]


def check_arguments(function: str, **arguments: tuple[Any, Rule]) -> None:
    """Raise a ValueError that lists every argument of `function` whose value breaks its rule."""
    raise_problems(
        ValueError, f"{function} cannot use these arguments:", argument_problems(arguments)
    )


def describe(value: Any) -> str:
    """A value as an error message shows it: short, and with its class where repr hides it."""
    if value is None or isinstance(value, str | bytes | bool | int | float):
        return _short(value)
    name = type(value).__name__
    if isinstance(value, tuple | list):
        classes = ", ".join(type(item).__name__ for item in value[:4])
        simple = all(isinstance(item, str | int | float | None) for item in value)
        return _short(value) if simple else f"a {name} of ({classes})"
    if type(value).__repr__ is object.__repr__ or hasattr(value, "__dataclass_fields__"):
        return f"an object of class {type(value).__module__}.{name}"
    return f"{_short(value)} ({name})"


def _short(value: Any) -> str:
    try:
        shown = repr(value)
    except Exception as error:  # noqa: BLE001  a repr of the user's may raise anything
        return f"an object of class {type(value).__name__} whose repr fails: {error!s:.80}"
    return shown if len(shown) <= 120 else f"{shown[:117]}..."
