"""The form for CI: which cases run in it, and the session's results of them."""

from pathlib import Path
from typing import Any

from faults.cases import CASES
from faults.known import known_cases
from faults.worker import Worker, run_cases

HANG_SECONDS = 4.0
_HANGS = 2  # of the cases that hang today: each costs HANG_SECONDS
GOOD = ("refused", "accepted rightly")


def chosen(table: dict[str, Any]) -> list[str]:
    """The names of the cheap cases of a table, and a few of those that hang today."""
    known = known_cases()
    hangs = [n for n in table if known.get(n, {}).get("outcome") == "hung"]
    left_out = set(hangs[_HANGS:])
    return [name for name, case in table.items() if case.bounded and name not in left_out]


def results(scratch: Path, table: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Name -> result of every chosen case of a table, in one worker."""
    worker = Worker(scratch)
    try:
        return run_cases(worker, chosen(table), HANG_SECONDS)
    finally:
        worker.close()


def check(result: dict[str, Any]) -> None:
    """Fail unless the case came out as it must."""
    case = CASES[result["name"]]
    assert result["outcome"] in GOOD, f"{case.name}: {result['outcome']}: {result['detail']}"
