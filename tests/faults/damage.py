"""Ways to damage a file: bits, blocks, lengths, JSON of other types, links."""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from faults.values import HUGE

Damage = Callable[[Path], None]
SPARSE = 50 * 10**9  # bytes that a sparse file claims; it takes none of the disk

WRONG_JSON: dict[str, Any] = {
    "null": None,
    "a text": "text",
    "an empty text": "",
    "a list": [],
    "a nested list": [[1], {}],
    "an object": {},
    "minus one": -1,
    "a half": 0.5,
    "true": True,
    "10**400": HUGE,
    "NaN": float("nan"),
    "infinity": float("inf"),
    "a control character": "a\x1b[31mb",
    "a lone surrogate": "\ud800",
}


def flip(position: float) -> Damage:
    """One bit, at a share of the file's length."""

    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[min(len(data) - 1, int(position * len(data)))] ^= 16
        path.write_bytes(data)

    return damage


def zero(position: float, length: int = 32) -> Damage:
    """A block of zeros."""

    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        start = min(max(0, len(data) - length), int(position * len(data)))
        data[start : start + length] = bytes(len(data[start : start + length]))
        path.write_bytes(data)

    return damage


def cut(share: float, minus: int = 0) -> Damage:
    """Only the beginning is left."""

    def damage(path: Path) -> None:
        data = path.read_bytes()
        path.write_bytes(data[: max(0, int(share * len(data)) - minus)])

    return damage


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _sparse(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data)
    os.truncate(path, SPARSE)


def _dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("/no/such/file")


def _loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def _unreadable(path: Path) -> None:
    path.unlink()
    path.symlink_to("/proc/self/mem")


BYTES: dict[str, Damage] = {
    **{f"a bit flipped at {share:g}": flip(share) for share in (0, 0.13, 0.37, 0.61, 0.87, 1)},
    **{f"zeros at {share:g}": zero(share) for share in (0, 0.23, 0.5, 0.71, 1)},
    "empty": cut(0),
    "half": cut(0.5),
    "one byte short": cut(1, 1),
    "one byte more": lambda path: path.write_bytes(path.read_bytes() + b"\1"),
    "noise": lambda path: path.write_bytes(random.Random(0).randbytes(4096)),
    "a folder": _folder,
    "50 GB": _sparse,
    "a dangling link": _dangling,
    "a link to itself": _loop,
    "a link to a device": _unreadable,
    "absent": lambda path: path.unlink(),
}


def _text(text: str) -> Damage:
    return lambda path: path.write_bytes(text.encode("utf-8", "surrogatepass"))


def _inserted(pair: str) -> Damage:
    """Put one more pair of name and value, a piece of JSON text, in front of the file's own."""

    def damage(path: Path) -> None:
        text = path.read_text()
        path.write_text(f"{{{pair}, {text.lstrip()[1:]}")

    return damage


def _twice(path: Path) -> None:
    """The first name given again, with another value."""
    text = path.read_text()
    name = json.dumps(next(iter(json.loads(text))))
    path.write_text(f"{text.rstrip()[:-1]}, {name}: 1}}")


JSON_FILE: dict[str, Damage] = {
    "a list": _text("[1]"),
    "a number": _text("1"),
    "null": _text("null"),
    "an empty object": _text("{}"),
    "10,000 deep": _inserted('"deep": ' + "[" * 10_000 + "]" * 10_000),
    "100,000 deep": _inserted('"deep": ' + '{"a":' * 100_000 + "1" + "}" * 100_000),
    "5,000 digits": _inserted('"digits": ' + "1" * 5000),
    "a name twice": _twice,
    "a lone surrogate": _inserted('"text": "\\ud800"'),
    "bad UTF-8": lambda path: path.write_bytes(path.read_bytes()[:-2] + b', "a": "\xff"}'),
    "NUL": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "two objects": lambda path: path.write_bytes(path.read_bytes() * 2),
}


def replaced(*keys: Any, value: Any) -> Damage:
    """A JSON file with the value under `keys` replaced."""

    def damage(path: Path) -> None:
        whole = json.loads(path.read_text())
        inner = whole
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        path.write_text(json.dumps(whole))

    return damage


def fields(keys: list[str]) -> Iterator[tuple[str, str, Damage]]:
    """(key, what, damage) for every key of a JSON object and every wrong value."""
    for key in keys:
        for what, value in WRONG_JSON.items():
            yield key, what, replaced(key, value=value)


def another(path: Path) -> Damage:
    """Another file in its place."""
    return lambda target: shutil.copyfile(path, target)
