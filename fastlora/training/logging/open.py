"""open_log(): one function of a record from all that `log` names."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from fastlora.arguments import Rule
from fastlora.training.history import Record
from fastlora.training.logging import backends
from fastlora.training.logging.backends import RunInfo, Write
from fastlora.training.logging.extras import extra_module

# Name -> its writer, and the module that an extra of the same name installs (None: none).
_WRITERS: dict[str, tuple[Callable[[RunInfo], Any], str | None]] = {
    "jsonl": (backends.jsonl, None),
    "tensorboard": (backends.tensorboard, "torch.utils.tensorboard"),
    "wandb": (backends.wandb, "wandb"),
    "trackio": (backends.trackio, "trackio"),
}

LOGGERS = tuple(_WRITERS)
_NEED_FOLDER = ("jsonl", "tensorboard")

Log = Callable[[Record], object] | str | list[Any] | tuple[Any, ...]


def _accepts(log: Any) -> bool:
    return callable(log) or (type(log) is str and log in LOGGERS)


LOG = Rule(
    lambda x: all(map(_accepts, x)) if isinstance(x, list | tuple) else _accepts(x),
    f"a function, {', '.join(map(repr, LOGGERS))}, or a list of these",
)


def log_entries(log: Log | None) -> list[Any]:
    """The functions and names of `log`, which may be one or a list of them."""
    if log is None:
        return []
    return [*log] if isinstance(log, list | tuple) else [log]


def log_problems(log: Any, output_dir: Any) -> list[str]:
    """Why the loggers cannot write.

    Raises:
        ModuleNotFoundError: an extra is not installed.
    """
    if log is not None and not LOG.accepts(log):
        return []  # its rule reports it
    names = [entry for entry in log_entries(log) if isinstance(entry, str)]
    for name in names:
        if (module := _WRITERS[name][1]) is not None:
            extra_module(module, name, f'log="{name}"')  # raises now, not after the data is read
    problems = [
        f"log={name!r} without output_dir; name a folder"
        for name in names
        if name in _NEED_FOLDER and output_dir is None
    ]
    twice = sorted({name for name in names if names.count(name) > 1})
    return problems + [f"log has {name!r} twice" for name in twice]


def on_all_ranks(function: Callable[[Record], object]) -> Callable[[Record], object]:
    """A function for `log` that may end the run, so that all ranks have to call it.

    Others are called on the first rank only. The figures are the same on all ranks, but not the
    seconds.
    """
    vars(function)["on_all_ranks"] = True
    return function


@contextmanager
def open_log(log: Log | None, info: RunInfo) -> Iterator[Write]:
    """A function that hands a copy of a record to everything that `log` names, in its order."""
    with ExitStack() as stack:
        writes = [
            stack.enter_context(_WRITERS[entry][0](info)) if isinstance(entry, str) else entry
            for entry in log_entries(log)
        ]

        def write(record: Record) -> None:
            for each in writes:
                each(dict(record))  # a copy: a user's function may change it

        yield write
