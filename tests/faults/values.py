"""Wrong values by the kind of argument, and `bad_calls`, which makes cases of them."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from faults.case import Case, Context

HUGE = 10**400  # an integer that no float can hold


class Stranger:
    """An object of a class that nothing expects."""

    def __repr__(self) -> str:
        """Short, without an address, so that a case's name is the same in every process."""
        return "Stranger()"


STRANGER = Stranger()
NOT_NUMBERS = ("1", (1,), {}, STRANGER)
WHOLE = (*NOT_NUMBERS, 1.5, math.nan, math.inf, -1, True)
COUNT = (*WHOLE, 0)
SIZE = (*COUNT, HUGE)  # a number of things that are made: too large is wrong as well
NUMBER = (*NOT_NUMBERS, math.nan, math.inf, -math.inf, HUGE, -HUGE, True)
POSITIVE = (*NUMBER, 0, -1.0)
SHARE = (*NUMBER, -0.1, 1.5)
FLAG = (None, 1, 0, "yes", (), 2.5, STRANGER)
CHOICE = (1, "no such", "", (), b"none", {}, STRANGER, "a\0b")
PATH = ("", 5, (), 1.5, "a\0b", b"", {}, STRANGER, True)
TEXT = (5, (), 1.5, b"text", {}, STRANGER)
SEED = ("1", (), 1.5, math.nan, -1, True, HUGE, STRANGER)
FUNCTION = (5, (), {}, STRANGER)
NAMES = (5, {"q_proj": 1}, ("no_such_module",), [1, 2], [], "", ("q_proj\0",), STRANGER, "(")
MODEL = (None, "demo", 5, {}, (), STRANGER)
TOKENIZER = ("demo", 5, {}, (), STRANGER)
TENSOR = ("text", 5, [[1, 2]], {}, (), STRANGER)


def show(value: Any) -> str:
    """A value in a case's name."""
    if isinstance(value, int) and abs(value) > 10**20:
        return f"{'-' if value < 0 else ''}10**{len(str(abs(value))) - 1}"
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype)[6:]}{list(value.shape)}"
    text = ascii(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _spelled(value: Any) -> str:
    """A text that is long enough to be told in a message: naming it is as good as the argument."""
    return ascii(value)[1:-1][:60] if isinstance(value, str) and len(value) > 2 else ""


def _item(item: str, value: Any) -> str:
    """The item of issue 16 that a wrong value belongs to."""
    if value in ("", b"") and isinstance(value, str | bytes):
        return "C14"
    if type(value) is float and value in (1e39, 1e308):
        return "C6"
    return item


Call = Callable[..., Any]  # (context, **changed) -> what the function gives


def bad_calls(
    function: str, call: Call, table: Mapping[str, tuple[Any, ...]], item: str = "C11"
) -> Iterator[Case]:
    """A case for every argument and wrong value; the refusal must name the argument."""
    for argument, values in table.items():
        for value in values:

            def bad(context: Context, argument: str = argument, value: Any = value) -> Any:
                return call(context, **{argument: value})

            others = [_spelled(value), "row 1" if argument.endswith("data") else ""]
            named = ("||".join([argument, *filter(None, others)]),)
            name = f"{function} {argument}={show(value)}"
            yield Case(name, _item(item, value), bad, named, every=2)
    misspelt = lambda context: call(context, no_such_argument=1)
    yield Case(f"{function} no_such_argument=1", item, misspelt, ("no_such_argument",))
