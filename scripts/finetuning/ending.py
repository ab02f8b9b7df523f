"""exit_code(): how scripts/finetune.py ends after an error."""

import errno

import torch

UNUSABLE, NOT_FINITE, FULL, OTHER_BITS = 2, 3, 4, 5


def exit_code(error: Exception) -> int | None:
    """The exit code for an error; None: an unexpected one, whose traceback is to be shown."""
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
        return FULL
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return FULL
    if isinstance(error, FloatingPointError):
        return NOT_FINITE
    # ValueError includes fastlora.CheckpointError.
    kinds = (ValueError, FileNotFoundError, ModuleNotFoundError, PermissionError, ConnectionError)
    return UNUSABLE if isinstance(error, kinds) else None
