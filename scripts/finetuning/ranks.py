"""scripts/finetune.py under torchrun: every process runs all of it, and the first one prints."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from typing import Any

from fastlora.distributed.launch import launched


def is_first() -> bool:
    """Whether this process prints and writes: the only one, or rank 0."""
    launch = launched()
    return launch is None or launch.rank == 0


def on_first_rank(work: Callable[..., object], *arguments: Any) -> None:
    """Call a function that writes files in one process."""
    if is_first():
        work(*arguments)


@contextmanager
def silent_unless_first() -> Iterator[None]:
    """Throw away what other ranks print; their errors still reach stderr."""
    if is_first():
        yield
        return
    with redirect_stdout(StringIO()):
        yield


def resumes(options: Any) -> bool:
    """Whether to go on from the newest checkpoint: --resume, or torchrun has started all processes
    again because one of them ended."""
    launch = launched()
    return options.resume or (launch is not None and launch.restarts > 0)


def step_size(options: Any) -> str:
    """How many sequences a step has, for people: twice the ranks are twice the sequences."""
    launch = launched()
    together = max(options.context_parallel, 1)  # train refuses less than 1
    groups = (1 if launch is None else launch.ranks) // together or 1
    size, parts = options.batch_size, options.gradient_accumulation_steps
    who = "ranks" if together == 1 else f"groups of {together} ranks"
    step = f"{groups} {who} x {size} sequences x {parts} micro-batches"
    return f"a step: {step} = {groups * size * parts}"
