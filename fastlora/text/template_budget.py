"""Budget: how much work one rendering of a chat template may do.

A template is untrusted code. Jinja's sandbox keeps it from Python's internals but not from loops
and texts without end. The budget counts steps (iterations, calls, filters), characters (and items)
that are made, and the thread's CPU time.
"""

import re
import time
from collections.abc import Collection, Iterable, Mapping
from itertools import chain
from typing import Any

from jinja2.exceptions import SecurityError

# Real templates take about 10 steps a message, or a message squared if they copy lists of messages.
_BASE_STEPS, _STEPS_PER_CHAR = 1_000_000, 20
_BASE_CHARS, _CHARS_PER_CHAR = 100_000_000, 200
_MAX_SECONDS = 3.0
_STEPS_BETWEEN_CLOCKS = 64

_MAX_WIDTH = 10_000  # of padding, columns, digits
_MAX_SLOW_CHARS = 100_000  # for filters whose time is not linear in the length of the text
_MAX_NUMBER_BITS = 20_000
_CHARS_PER_ITEM = 50  # an item of a list takes as much memory and time as so many characters

_WIDE_FILTERS = frozenset("center indent batch slice round tojson wordwrap".split())
_SLOW_FILTERS = frozenset("wordwrap urlize pprint striptags xmlattr".split())
_WIDE_METHODS = frozenset("center ljust rjust zfill expandtabs to_bytes".split())

_SCALARS = (bool, int, float, range)
_CONTAINERS = (list, tuple, dict, set, frozenset)


class Budget:
    """The steps, characters and seconds that one rendering may still use.

    Every method raises SecurityError if the rendering would exceed its budget.
    """

    def __init__(self, variables: Mapping[str, Any]) -> None:
        """The budget grows with the size of `variables`, which the template reads."""
        self._variables: Mapping[str, Any] | None = variables
        self._weights: dict[int, tuple[Any, int]] = {}  # by id; the container is kept alive
        self._steps = _BASE_STEPS
        self._chars = self.most = _BASE_CHARS
        # CPU time of this thread: on a busy machine the same chat must not fail.
        self._deadline = time.thread_time() + _MAX_SECONDS

    def _extend(self) -> None:
        """Add what the size of the variables allows. Few renderings need it, so it comes late."""
        if self._variables is not None:
            size = self.weight(dict(self._variables))
            self._variables = None
            self._steps += _STEPS_PER_CHAR * size
            self._chars += _CHARS_PER_CHAR * size
            self.most += _CHARS_PER_CHAR * size

    def step(self) -> None:
        """One iteration, call or filter."""
        self._steps -= 1
        if self._steps < 0:
            self._extend()
            if self._steps < 0:
                raise SecurityError("it takes too many steps")
        if self._steps % _STEPS_BETWEEN_CLOCKS == 0:
            self._check_clock()

    def spend(self, chars: int) -> None:
        """So many characters are written or made."""
        self._chars -= chars
        if self._chars < 0:
            self._extend()
            if self._chars < 0:
                raise SecurityError("it makes too much text")
        if chars > 10_000:
            self._check_clock()

    def _check_clock(self) -> None:
        if time.thread_time() > self._deadline:
            raise SecurityError(f"it takes more than {_MAX_SECONDS:g} seconds")

    def weight(self, value: Any) -> int:
        """About the length of a value's text: characters and items, at all depths.

        Lists may hold the same list many times, so that their text is exponentially longer than
        the list. Weights of dicts and nested containers are kept, which keeps this fast. Templates
        cannot change a container that exists.
        """
        if isinstance(value, (str, bytes)):
            return len(value)
        if value is None or isinstance(value, _SCALARS) or not isinstance(value, Collection):
            return 8
        known = self._weights.get(id(value))
        if known is not None:
            return known[1]
        parts = chain(value, value.values()) if isinstance(value, Mapping) else value
        total, nested = 1 + len(value), False
        for part in parts:
            if type(part) is str:  # most parts are; a call for each would take most of the time
                total += len(part)
                continue
            entry = self._weights.get(id(part))
            total += self.weight(part) if entry is None else entry[1]
            nested = nested or isinstance(part, _CONTAINERS)
        # Messages are dicts of texts, which a template that copies lists of them weighs again.
        if (nested and isinstance(value, _CONTAINERS)) or type(value) is dict:
            self._weights[id(value)] = (value, total)
        return total

    def made(self, value: Any) -> Any:
        """Count a value that an expression made, and return it."""
        if isinstance(value, (str, bytes)):
            self.spend(len(value))
        elif isinstance(value, _CONTAINERS):
            self.spend(_CHARS_PER_ITEM * len(value))
            self.check(self.weight(value))
        return value

    def check(self, chars: int) -> None:
        """Refuse to make one value of more characters than the rendering may write."""
        if chars > self.most:
            self._extend()
        if chars > self.most:
            raise SecurityError(f"it makes a value of {chars:,} characters")

    def written(self, value: Any) -> Any:
        """Count a value that is written to the text, and return it."""
        self.spend(len(value) if type(value) is str else self.weight(value))
        return value

    # ── operations whose result may be far longer than their arguments ──

    def check_product(self, left: Any, right: Any) -> None:
        """Before left * right."""
        if isinstance(left, int) and isinstance(right, int):
            if left.bit_length() + right.bit_length() > _MAX_NUMBER_BITS:
                raise SecurityError("it makes a number of too many digits")
            return
        for sequence, count in ((left, right), (right, left)):
            if isinstance(sequence, str | bytes | list | tuple) and isinstance(count, int):
                self.check(max(1, self.weight(sequence)) * max(0, count))

    def check_percent(self, text: Any, values: Any) -> None:
        """Before text % values."""
        if not isinstance(text, str | bytes):
            return
        form = text if isinstance(text, str) else text.decode("latin-1")
        specs = re.findall(r"%(?:\([^)]*\))?([-#0 +*.\d]*)", form)
        _check_specs(specs)
        self.check(len(specs) * (self.weight(values) + _MAX_WIDTH // 100))

    def check_format(self, text: str, args: Collection[Any], kwargs: Mapping[str, Any]) -> None:
        """Before text.format(*args, **kwargs)."""
        # "{{" writes a brace; a single one inside a field opens another field, as in "{:{width}}".
        if re.search(r"\{[^{}]*\{", text.replace("{{", "")):
            raise SecurityError("a format takes its width from an argument")
        fields = re.findall(r"\{[^{}]*\}", text)
        _check_specs([field.partition(":")[2] for field in fields])
        self.check(len(fields) * (self.weight(list(args)) + self.weight(dict(kwargs))))

    def check_replace(self, text: str, args: tuple[Any, ...]) -> None:
        """Before text.replace(*args)."""
        if len(args) >= 2 and all(isinstance(x, type(text) | str) for x in args[:2]):
            old, new = args[:2]
            count = text.count(old) if len(old) < len(text) or not old else 1
            self.check(len(text) + count * max(0, len(new) - len(old)))

    def joinable(self, separator: Any, items: Iterable[Any]) -> list[Any]:
        """The items as a list, before they are joined."""
        values = list(items)
        self.check(len(values) * self.weight(separator) + self.weight(values))
        return values

    def check_filter(self, name: str, value: Any, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Before value | name(*args, **kwargs). The filter "join" is `joinable`'s."""
        given = (*args, *kwargs.values())
        if name in _WIDE_FILTERS:
            _check_widths(given)
        if name in _SLOW_FILTERS and self.weight(value) > _MAX_SLOW_CHARS:
            raise SecurityError(f"the filter {name} is given more than {_MAX_SLOW_CHARS:,} chars")
        if name in ("indent", "wordwrap"):  # text may be put before or behind every line
            lines = 1 + (value.count("\n") if name == "indent" and isinstance(value, str) else 0)
            lines = self.weight(value) if name == "wordwrap" else lines
            self.check(lines * max(map(self._inserted, given), default=4))
        elif name == "replace":
            args = tuple(map(str, (*args, *(kwargs[k] for k in ("old", "new") if k in kwargs))))
            self.check(self.weight(value))
            self.check_replace(str(value), args[:2])
        elif name == "format":
            self.check_percent(str(value), dict(kwargs) or args)
        # sum(start=[]) copies all items so far for every list: the time is quadratic.
        elif name == "sum" and any(not isinstance(x, int | float | str) for x in given):
            if not hasattr(value, "__len__") or len(value) > 1000:
                raise SecurityError("a sum of lists")

    def _inserted(self, value: Any) -> int:
        return abs(value) if isinstance(value, int) else self.weight(value)

    def check_method(self, owner: Any, name: str, args: tuple, kwargs: Mapping[str, Any]) -> tuple:
        """Before owner.name(*args, **kwargs) of a text or number. Returns the arguments to use."""
        if name in _WIDE_METHODS:
            _check_widths((*args, *kwargs.values()))
        if not isinstance(owner, str | bytes):
            return args
        if name == "replace":
            self.check_replace(owner, args)  # pyright: ignore[reportArgumentType]
        elif name == "expandtabs":
            size = next(iter((*args, *kwargs.values())), 8)
            tabs = owner.count("\t") if isinstance(owner, str) else owner.count(b"\t")
            self.check(tabs * self._inserted(size))
        elif name == "translate":
            self.check(len(owner) * sum(map(self.weight, args)))
        elif name == "join" and len(args) == 1:
            return (self.joinable(owner, args[0]),)
        return args


def _check_widths(values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, int | float) and abs(value) > _MAX_WIDTH:
            raise SecurityError(f"a width of {value!r:.20}; expected at most {_MAX_WIDTH:,}")


def _check_specs(specs: Iterable[str]) -> None:
    for spec in specs:
        # Widths up to 999 are harmless. "*" takes the width from an argument.
        if "*" in spec or re.search(r"\d{4}", spec):
            raise SecurityError(f"a format with the width {spec!r:.20}")
