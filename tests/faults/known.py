"""What fails today. A mark goes, and a name leaves known.json, when its item of issue 16 is done.

    PYTHONPATH=tests python -m faults.full --known tests/faults/known.json

writes the names of all cases that fail into known.json again, with their item and outcome.
"""

import json
from pathlib import Path
from typing import Any

import pytest

PATH = Path(__file__).parent / "known.json"


def open_item(number: str) -> pytest.MarkDecorator:
    """The mark of a test that fails until an item of issue 16 is done."""
    return pytest.mark.xfail(strict=True, reason=f"issue 16, {number}")


def known_cases() -> dict[str, dict[str, Any]]:
    """Name -> item and outcome of every case that fails today."""
    return json.loads(PATH.read_text()) if PATH.exists() else {}


def parameters(names: list[str]) -> list[Any]:
    """pytest's parameters of cases, each that is known to fail with its mark."""
    known = known_cases()
    return [
        pytest.param(name, id=name, marks=[open_item(known[name]["item"])])
        if name in known
        else pytest.param(name, id=name)
        for name in names
    ]
