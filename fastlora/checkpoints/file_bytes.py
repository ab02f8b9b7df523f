"""read_bytes(): a file's contents, after its kind and size have been checked."""

import stat
from pathlib import Path

from fastlora.errors import CheckpointError


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """The contents of a regular file that has at most `max_bytes`.

    A sparse file of terabytes, a device or a pipe is refused before anything is read.

    Raises:
        FileNotFoundError, PermissionError: as the system raises them.
        CheckpointError: not a regular file, too long, or unreadable; names the file.
    """
    try:
        check_size(path, max_bytes)
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)  # files in /proc have no size
    except (FileNotFoundError, PermissionError):
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    if len(data) > max_bytes:
        raise CheckpointError(f"{path} has over {max_bytes:,} bytes; expected at most that.")
    return data


def check_size(path: Path, max_bytes: int) -> None:
    """Raise CheckpointError unless `path` is a regular file of at most `max_bytes`."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} is not a regular file.")
    if status.st_size > max_bytes:
        raise CheckpointError(
            f"{path} has {status.st_size:,} bytes; expected at most {max_bytes:,}."
        )
