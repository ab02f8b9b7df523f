"""Rules for arguments: each is declared once, beside the argument or setting that it checks.

A rule is a test of a value and the words for the error message. Settings records hold their rules
in their fields: `setting` declares one, `setting_problems` checks them. `check_arguments` checks
arguments that belong to no record. All problems of a call are reported together.
"""

import argparse
import math
import operator
import os
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import MISSING, Field, field, fields
from typing import Any, NamedTuple, TypeVar

from fastlora.errors import raise_problems


class Rule(NamedTuple):
    """Which values an argument accepts."""

    accepts: Callable[[Any], bool]
    expected: str  # completes the sentence "expected ..."


def whole_number(low: int, high: int | None = None) -> Rule:
    """Rule: an int (not a bool) x with low <= x, and x < high if `high` is given."""
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
    """Rule: a finite int or float (not a bool) x with above < x and low <= x <= high."""

    def fits(x: Any) -> bool:
        if not isinstance(x, int | float) or isinstance(x, bool):  # numpy.float64 is a float
            return False
        if isinstance(x, int) and abs(x) >= 2**1023:  # math.isfinite overflows on larger ints
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
    """Rule: one of these texts."""
    return Rule(lambda x: type(x) is str and x in values, " or ".join(map(repr, values)))


def optional(rule: Rule) -> Rule:
    """Rule: None, or a value that `rule` accepts."""
    return Rule(lambda x: x is None or rule.accepts(x), f"None or {rule.expected}")


def instance(cls: type | tuple[type, ...], expected: str) -> Rule:
    """Rule: an instance of a class. `expected` names the class in the user's words."""
    return Rule(lambda x: isinstance(x, cls), expected)


def iterable(expected: str) -> Rule:
    """Rule: anything to iterate over whose items are values of their kind.

    Texts, dicts and tensors are refused: iterating would give letters, keys or rows.
    """

    def accepts(value: Any) -> bool:
        refused = isinstance(value, str | bytes | Mapping) or is_tensor(value)
        return isinstance(value, Iterable) and not refused

    return Rule(accepts, expected)


def is_tensor(value: Any) -> bool:
    """Whether a value is a tensor. This does not import torch, which takes a second."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


FLAG = Rule(lambda x: type(x) is bool, "True or False")
TEXT = Rule(lambda x: isinstance(x, str), "a text")
ENCODABLE_TEXT = Rule(  # a str may hold half of a surrogate pair, which UTF-8 does not encode
    lambda x: isinstance(x, str) and x == x.encode(errors="replace").decode(),
    "a text (without unpaired surrogates)",
)
RANDOM_SEED = whole_number(0, 2**64)  # what torch.Generator accepts
PORT = whole_number(0, 2**16)  # of TCP; getaddrinfo takes larger ones modulo 2**16
FUNCTION = Rule(callable, "a function")


def _is_path(value: Any) -> bool:
    if not isinstance(value, str | os.PathLike):
        return False
    path = os.fspath(value)
    if not isinstance(path, str) or path == "" or "\0" in path:
        return False
    # Only shells replace "~": Python would make a folder of that name.
    return not path.startswith("~")


PATH = Rule(
    _is_path,
    "a path: a text that is not empty, or a pathlib.Path; without a leading ~ (./~ is allowed)",
)


def option(convert: Callable[[str], Any], rule: Rule) -> Callable[[str], Any]:
    """A `type` for argparse's add_argument: converts a text and refuses what breaks the rule."""

    def parse(text: str) -> Any:
        try:
            value = convert(text)
        except ValueError:
            value = None
        if value is None or not rule.accepts(value):
            raise argparse.ArgumentTypeError(f"got {text!r}, expected {rule.expected}")
        return value

    return parse


def setting(rule: Rule, default: Any = MISSING) -> Any:
    """A dataclass field with a default and the rule for its values. Without default: required."""
    return field(default=default, metadata={"rule": rule})


SettingsT = TypeVar("SettingsT")


def settings_from(cls: type[SettingsT], arguments: Mapping[str, Any]) -> SettingsT:
    """A settings record, filled by name from arguments: `settings_from(cls, locals())`.

    The values are not checked yet; `setting_problems` does that.
    """
    # Not through __init__: our tests check the types of all calls, and would refuse bad values
    # there, before `setting_problems` can report them.
    record = object.__new__(cls)
    for f in fields(cls):  # pyright: ignore[reportArgumentType]
        object.__setattr__(record, f.name, arguments[f.name])
    return record


def rule_of(setting_field: Field) -> Rule:
    """The rule of a field that was made by `setting`."""
    return setting_field.metadata["rule"]


def setting_problems(settings: Any, only: Collection[str] | None = None) -> list[str]:
    """One line for each field of a settings record whose value breaks the field's rule.

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


def method_problems(method: Any, settings: Any, used: Mapping[str, Collection[str]]) -> list[str]:
    """Problems with a method and with settings that mean something to some methods only.

    A setting that the method does not use must keep its default.

    Args:
        method: expected: a key of `used`.
        settings: an instance of a dataclass whose fields were made by `setting`, with defaults.
        used: method -> names of the fields that it uses.
    """
    changed = [f.name for f in fields(settings) if not _is_default(getattr(settings, f.name), f)]
    problems = argument_problems({"method": (method, one_of(*used))})
    if problems:
        return problems + setting_problems(settings, changed)
    unused = [name for name in changed if name not in used[method]]
    problems = [
        f"{name}={describe(getattr(settings, name))} means nothing to method={method!r}; leave it"
        " out"
        for name in unused
    ]
    return problems + setting_problems(settings, used[method])


def _is_default(value: Any, setting_field: Field) -> bool:
    default = setting_field.default
    return value is default or (rule_of(setting_field).accepts(value) and value == default)


def argument_problems(arguments: Mapping[str, tuple[Any, Rule]]) -> list[str]:
    """One line for each argument that breaks its rule. `arguments`: name -> (value, rule)."""
    return [
        f"{name}={describe(value)}: expected {rule.expected}"
        for name, (value, rule) in arguments.items()
        if not rule.accepts(value)
    ]


def check_arguments(function: str, **arguments: tuple[Any, Rule]) -> None:
    """Check arguments given as name=(value, rule).

    Raises:
        ValueError: names `function` and lists every argument that breaks its rule.
    """
    raise_problems(
        ValueError, f"{function} cannot use these arguments:", argument_problems(arguments)
    )


def describe(value: Any) -> str:
    """A value as error messages show it: short, with its class if repr does not tell it."""
    if value is None or isinstance(value, str | bytes | bool | int | float):
        return _short(value)
    name = type(value).__name__
    if isinstance(value, tuple | list):
        classes = ", ".join(type(item).__name__ for item in value[:4])
        simple = all(isinstance(item, str | int | float | None) for item in value)
        return _short(value) if simple else f"a {name} of ({classes})"
    if hasattr(value, "shape") and hasattr(value, "dtype"):  # a tensor or an array
        return f"a {name} {list(value.shape)} of {value.dtype}"
    if type(value).__repr__ is object.__repr__ or hasattr(value, "__dataclass_fields__"):
        return f"an object of class {type(value).__module__}.{name}"
    return f"{_short(value)} ({name})"


def _short(value: Any) -> str:
    try:
        shown = repr(value)
    except Exception as error:  # noqa: BLE001  a repr of the user's may raise anything
        return f"an object of class {type(value).__name__} whose repr fails: {error!s:.80}"
    return shown if len(shown) <= 120 else f"{shown[:117]}..."


def int_list(value: Any) -> Any:
    """A row of whole numbers as a list of ints; anything else is returned unchanged.

    Rows are iterables of ints (Python's or NumPy's), and arrays and tensors of one dimension.
    """
    if isinstance(value, str | bytes | Mapping):
        return value
    try:
        items = value.tolist() if hasattr(value, "tolist") else list(value)
        if any(isinstance(x, bool) for x in items):
            return value
        return [operator.index(x) for x in items]
    except TypeError:
        return value
