"""Runs a function where calls of Python cost no system calls.

CPython 3.11 keeps the frames of a thread in chunks of 16 KiB. It maps a chunk when a call does not
fit in the last one, and unmaps it when that call returns. A loop whose calls cross the border of
a chunk does both each time, and pytest, pluggy and the checks of shapes make deep stacks: a quarter
of the time of the tests of generation went there. A chunk is as large as its first frame
demands; `run` demands 800 kB for a frame that needs 100 bytes, which leaves 200 kB for its callees.
"""

from collections.abc import Callable
from typing import Any


def run(function: Callable, *args: Any) -> Any:
    """function(*args)"""
    return function(*args)


run.__code__ = run.__code__.replace(co_stacksize=100_000)
