"""Points of a training run to try with a library: each is a function that returns what it saw."""

import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fastlora.checkpoints.demo

DEMO = Path(fastlora.checkpoints.demo.__file__).parent
ROWS = [json.loads(line) for line in open(DEMO / "train.jsonl")][:24]
ALL_ERRORS = (Exception, SystemExit)  # an error is a result: the run goes on with the next point


def _chat(row: dict[str, Any]) -> tuple[str, str]:
    user, reply = row["messages"]
    return user["content"], reply["content"]


# The same chats in the forms that data sets have.
FORMS: dict[str, list[dict[str, Any]]] = {
    "messages": [{"messages": row["messages"]} for row in ROWS],
    "prompt and completion": [
        dict(zip(("prompt", "completion"), _chat(row), strict=True)) for row in ROWS
    ],
    "text": [{"text": " ".join(_chat(row))} for row in ROWS],
    "Alpaca": [
        dict(zip(("instruction", "output"), _chat(row), strict=True), input="") for row in ROWS
    ],
    "ShareGPT": [
        {
            "conversations": [
                {"from": name, "value": text}
                for name, text in zip(("human", "gpt"), _chat(row), strict=True)
            ]
        }
        for row in ROWS
    ],
}


def try_points(library: str, points: dict[str, Callable[[], Any]]) -> None:
    """Print a line of JSON for each point: the result or the error."""
    for name, point in points.items():
        try:
            result = point()
        except ALL_ERRORS as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(last.filename).name}:{last.lineno}"
            result = f"{type(error).__name__} at {where}: {str(error)[:300]}"
        print(json.dumps({"library": library, "point": name, "result": result}), flush=True)
