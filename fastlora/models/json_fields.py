"""Fields: reads a JSON object field by field and collects what is wrong with it."""

import math
from collections.abc import Callable, Sequence
from typing import Any


# The default upper bound keeps the product of two sizes below 2**63, the largest that torch counts.
def is_int(low: int, high: int = 2**31 - 1) -> Callable[[Any], bool]:
    """A test for integers from `low` to `high`. JSON's true and false are not integers."""
    return lambda x: type(x) is int and low <= x <= high


def _is_positive(x: Any) -> bool:
    # The upper bound keeps math.isfinite from overflowing on an integer of 400 digits.
    return type(x) in (int, float) and 0 < x < 2**63 and math.isfinite(x)


_LONGEST_LIST = 4096  # numbers: one for each pair of a head's dimensions

_EXPECTED: dict[str, Callable[[Any], bool]] = {
    "a positive integer": is_int(1),
    "a positive integer or null": lambda x: x is None or is_int(1)(x),
    "an integer from 1 to 1000": is_int(1, 1000),
    "an integer from 0 to 10000": is_int(0, 10_000),
    "an integer, 0 or more": is_int(0),
    "a positive number": _is_positive,
    "a positive number or null": lambda x: x is None or _is_positive(x),
    "a list of positive numbers": lambda x: (
        isinstance(x, list) and 0 < len(x) <= _LONGEST_LIST and all(map(_is_positive, x))
    ),
    "true or false": lambda x: type(x) is bool,
}

_DTYPES = ("float32", "bfloat16", "float16", "float64")


class Fields:
    """A JSON object whose fields are checked when they are read.

    `problems` collects a line for everything that is wrong, so that the caller can report all at
    once.
    """

    def __init__(
        self, raw: dict[str, Any], prefix: str = "", problems: list[str] | None = None
    ) -> None:
        """Wrap an object.

        Args:
            raw: the parsed object. Its values may be of any JSON type.
            prefix: written before field names in problems: "rope_parameters.".
            problems: list to add to; None starts a new one.
        """
        self.raw = raw
        self.prefix = prefix
        self.problems = [] if problems is None else problems

    def read(self, name: str, expected: str) -> Any:
        """The field's value, or None (and a problem) if it is missing or not `expected`.

        Numbers are returned as float, integers as int, lists as tuples.
        """
        if name not in self.raw:
            self.problems.append(f"{self.prefix}{name} is missing; expected {expected}")
            return None
        value = self.raw[name]
        if not _EXPECTED[expected](value):
            self.problems.append(f"{self.prefix}{name} is {show(value)}; expected {expected}")
            return None
        if isinstance(value, list):
            return tuple(map(float, value))
        return float(value) if value is not None and "number" in expected else value

    def refuse_unsupported(
        self, activation: tuple[str, str] = ("hidden_act", "silu"), untrue: Sequence[str] = ()
    ) -> None:
        """Add a problem for each setting that asks for a computation that fastlora lacks.

        Args:
            activation: the field of the MLP's activation, and its only supported value.
            untrue: fields that must be absent, null or false.
        """
        field, only = activation
        if (act := self.raw[field]) != only:
            self.problems.append(f"{field} is {show(act)}; only {only!r} is supported")
        self.problems += [
            f"{name} is {show(self.raw[name])}; only false is supported"
            for name in untrue
            if self.raw.get(name) not in (None, False)
        ]
        self.refuse_partial_rotary()
        if problem := _quantization_problem(self.raw.get("quantization_config")):
            self.problems.append(problem)

    def refuse_partial_rotary(self) -> None:
        """Add a problem if RoPE rotates only a part of each head."""
        if (factor := self.raw.get("partial_rotary_factor")) not in (None, 1):
            self.problems.append(
                f"{self.prefix}partial_rotary_factor is {show(factor)}; only 1 is supported"
            )

    def dtype(self) -> str:
        """The config's dtype without the prefix "torch."; "float32" if the file has none."""
        # transformers 5 writes "dtype", 4 wrote "torch_dtype". A file with both is read as by 5.
        name = next((v for k in ("dtype", "torch_dtype") if (v := self.raw.get(k))), "float32")
        if isinstance(name, str) and (short := name.removeprefix("torch.")) in _DTYPES:
            return short
        self.problems.append(f"dtype is {show(name)}; expected one of {', '.join(_DTYPES)}")
        return "float32"


def show(value: Any) -> str:
    """A value's repr, cut to 60 characters."""
    # A field of an untrusted file may be megabytes long, and an error lists many fields.
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _quantization_problem(quantization: Any) -> str | None:
    """Why a quantization_config is refused; None if it is absent or of bitsandbytes.

    The details of bitsandbytes' formats are read from the weights. Old files of transformers lack
    its quant_method.
    """
    settings = quantization if isinstance(quantization, dict) else {}
    method = settings.get("quant_method")
    of_bitsandbytes = any(settings.get(key) is True for key in ("load_in_4bit", "load_in_8bit"))
    if quantization is None or (of_bitsandbytes and method in (None, "bitsandbytes")):
        return None
    if method == "bitsandbytes":
        return "quantization_config of bitsandbytes has neither load_in_4bit nor load_in_8bit"
    return f"quantization_config: quant_method {show(method)} is not supported; 'bitsandbytes' is"
