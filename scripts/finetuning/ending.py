"""How scripts end after an error: exit codes, and messages without a traceback."""

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

UNUSABLE, NOT_FINITE, FULL, OTHER_BITS = 2, 3, 4, 5

_UNUSABLE_KINDS = (
    ValueError,  # includes fastlora.CheckpointError
    FileNotFoundError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
    ModuleNotFoundError,
    PermissionError,
    ConnectionError,
)


def exit_code(error: Exception) -> int | None:
    """The exit code for an error; None: an unexpected one, whose traceback is to be shown."""
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
        return FULL
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return FULL
    if isinstance(error, FloatingPointError):
        return NOT_FINITE
    return UNUSABLE if isinstance(error, _UNUSABLE_KINDS) else None


@contextmanager
def user_errors() -> Iterator[None]:
    """Print an error that has an exit code to stderr, without a traceback, and exit with the code.

    Also a decorator: `@user_errors()` before `def main()`.
    """
    try:
        yield
    except Exception as error:
        if (code := exit_code(error)) is None:
            raise
        notes = "\n".join(getattr(error, "__notes__", []))
        print(f"error: {error}\n{notes}".rstrip(), file=sys.stderr)
        raise SystemExit(code) from error
