"""Damaged data sets: what row files may hold, and rows that mean nothing.

A bad file is refused by its name, a bad row by its line or number.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from faults.case import Case, Context, right
from faults.damage import SPARSE, WRONG_JSON
from faults.folders import rows

GOOD = [json.dumps(row) for row in rows(4)]
DEEP = "[" * 100_000 + "]" * 100_000
BAD_LINES = {
    "cut off": GOOD[0][:-3],
    "10**400": '{"text": "w1 w2", "id": 1%s}' % ("0" * 400),
    "5,000 digits": '{"text": "w1 w2", "id": %s}' % ("1" * 5000),
    "a name twice": '{"text": "w1 w2", "text": "w3"}',
    "a name twice in a message": '{"messages": [{"role": "user", "role": "assistant", '
    '"content": "w1"}, {"role": "assistant", "content": "w2"}]}',
    "100,000 deep": '{"text": "w1 w2", "more": ' + DEEP + "}",
    "100,000 deep objects": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "a lone surrogate": '{"text": "w1 \\ud800 w2"}',
    "a lone surrogate in a message": '{"messages": [{"role": "user", "content": "\\ud800"}, '
    '{"role": "assistant", "content": "w1"}]}',
    "a number": "5",
    "a list": "[1, 2]",
    "null": "null",
    "no JSON": "text: w1",
    "two objects": "{} {}",
    "a comma behind": GOOD[0] + ",",
    "NaN": '{"text": NaN}',
    "a NUL": '{"text": "w1\0"}',
}
BAD_ROWS: dict[str, Any] = {
    "no known key": {"txt": "w1"},
    "no role": {"messages": [{"content": "w1"}]},
    "an unknown role": {"messages": [{"role": "asistant", "content": "w1"}]},
    "a prompt alone": {"prompt": "w1"},
    "an output alone": {"output": "w1"},
    "too long": {"text": "w1 " * 100},
    "empty text": {"text": ""},
    "an empty reply": {"prompt": "w1", "completion": ""},
}


def _train(context: Context, path: Path) -> Any:
    return context.train(data=path)


def _line(bad: str, suffix: str) -> Any:
    def call(context: Context) -> Any:
        path = context.cwd / f"rows{suffix}"
        if suffix == ".jsonl":
            text = "\n".join([GOOD[0], bad, GOOD[1]])
        else:
            text = f"[{GOOD[0]}, {bad}, {GOOD[1]}]"
        path.write_text(text)
        return _train(context, path)

    return call


def _rows(row: Any) -> Any:
    return lambda context: context.train(data=[*rows(1), row])


def _value(key: str, value: Any) -> Any:
    def row(context: Context) -> Any:
        good: dict[str, Any] = {
            "text": {"text": "w1 w2"},
            "prompt": {"prompt": "w1", "completion": "w2"},
            "completion": {"prompt": "w1", "completion": "w2"},
            "instruction": {"instruction": "w1", "input": "", "output": "w2"},
            "output": {"instruction": "w1", "input": "", "output": "w2"},
            "messages": {"messages": []},
            "role": {"messages": [{"role": "user", "content": "w1"}]},
        }[key]
        if key == "role":
            good = {"messages": [{"role": value, "content": "w1"}]}
        return context.train(data=[*rows(1), good | ({} if key == "role" else {key: value})])

    return row


def _sparse(name: str) -> Any:
    def call(context: Context) -> Any:
        path = context.cwd / name
        path.write_text(GOOD[0])
        os.truncate(path, SPARSE)
        return _train(context, path)

    return call


def cases() -> Iterator[Case]:
    """All of them."""
    yield from _line_cases()
    for what, row in BAD_ROWS.items():
        yield Case(f"a row, {what}", "B7", _rows(row), ("row 2",))
    for key in ("text", "prompt", "completion", "instruction", "output", "messages", "role"):
        for what, value in WRONG_JSON.items():
            if not _may_be_right(key, what):
                item = "B7" if "surrogate" in what else "C11"
                yield Case(f"a row, {key} is {what}", item, _value(key, value), ("row 2",))
    links = {"itself": "rows.jsonl", "nothing": "no-such", "a folder": "/tmp"}
    for what, target in links.items():

        def call(context: Context, target: str = target) -> Any:
            path = context.cwd / "rows.jsonl"
            path.symlink_to(target)
            return _train(context, path)

        yield Case(f"rows.jsonl, a link to {what}", "C12", call, ("rows.jsonl",))
    device = lambda context: _train(context, Path("/dev/zero"))
    yield Case("rows, /dev/zero", "C8", device, ("/dev/zero",))
    ends = lambda context: _train(context, _written(context, "\ufeff" + "\r\n".join(GOOD)))
    yield Case("rows.jsonl, Windows' marks", "C12", ends, ("rows",), right)


def _line_cases() -> Iterator[Case]:
    for what, line in BAD_LINES.items():
        # The error may name the row instead of the line if only its use shows that it is wrong.
        of_value = "surrogate" in what or what in ("NaN", "a number", "a list", "null")
        named = ("line 2||row 2",) if of_value else ("rows.jsonl", "line 2")
        yield Case(f"rows.jsonl, {what}", "C12", _line(line, ".jsonl"), named)
        if what not in ("a comma behind", "two objects"):
            named = ("rows.json||row 2",) if of_value else ("rows.json",)
            yield Case(f"rows.json, {what}", "C12", _line(line, ".json"), named)
    for name in ("rows.jsonl", "rows.json"):
        yield Case(f"{name}, 50 GB", "C8", _sparse(name), (name,))


def _may_be_right(key: str, what: str) -> bool:
    """The suite's word-level tokenizer reads any text, so that mostly types can be wrong."""
    if what in ("a text", "a control character"):
        return key != "messages"
    if what == "an empty text":
        return key in ("prompt", "instruction", "output")
    return key == "prompt" and "list" in what  # a chat


def _written(context: Context, text: str) -> Path:
    path = context.cwd / "rows.jsonl"
    path.write_text(text, newline="")
    return path
