"""The form for CI: the cases that it runs, and their results in one shared worker."""

import atexit
import shutil
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any
from zlib import crc32

from faults.case import Case
from faults.worker import Worker, run_cases

HANG_SECONDS = 5.0
GOOD = ("refused", "accepted rightly")


@cache
def shared_worker() -> Worker:
    """One server for all tests of a session; it takes seconds to start."""
    scratch = Path(tempfile.mkdtemp(prefix="fastlora-faults-"))
    worker = Worker(scratch)
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    atexit.register(worker.close)
    return worker


def chosen(table: Mapping[str, Case]) -> list[str]:
    """The names of the cases of a table that CI runs, the same ones every time."""
    return [name for name, case in table.items() if crc32(name.encode()) % case.every == 0]


def results(table: Mapping[str, Case]) -> dict[str, dict[str, Any]]:
    """Name -> result of every chosen case of a table."""
    return run_cases(shared_worker(), chosen(table), HANG_SECONDS)


def check(result: Mapping[str, Any]) -> None:
    """Fail unless the case was refused as it must be, or accepted rightly."""
    assert result["outcome"] in GOOD, f"{result['name']}: {result['outcome']}: {result['detail']}"
