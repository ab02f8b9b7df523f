"""output_lock(): one run at a time writes to a folder."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastlora.checkpoints.atomic import sweep_temporary_files

try:
    import fcntl
except ImportError:  # Windows has no flock
    fcntl = None

LOCK_FILE = ".train.lock"


@contextmanager
def output_lock(folder: Path | None) -> Iterator[None]:
    """Create the folder and lock it (flock) until the end of the `with` block.

    The system drops the lock when the process dies, however it dies. The file of the lock holds the
    process id, and is deleted at the end, as is the folder if it is empty and was created here.
    Temporary files that dead runs left in the folder and its checkpoints are deleted.

    Args:
        folder: None locks nothing.

    Raises:
        ValueError: another run, of this process or another, holds the lock; or the folder cannot be
            created.
    """
    if folder is None:
        yield
        return
    created = [p for p in (folder, *folder.absolute().parents) if not p.exists()]
    descriptor = None
    try:
        descriptor = _made_and_locked(folder)
        sweep_temporary_files(folder)
        for checkpoint in folder.glob("checkpoint-*"):
            sweep_temporary_files(checkpoint)
        yield
    finally:
        if descriptor is not None:
            # Deleted before it is unlocked: see `_locked_file`.
            (folder / LOCK_FILE).unlink(missing_ok=True)
            os.close(descriptor)
        for empty in created:
            with suppress(OSError):  # it holds what the run wrote
                empty.rmdir()


def _made_and_locked(folder: Path) -> int | None:
    """`_locked_file` of a folder that is created if it is not there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return _locked_file(folder)
    except OSError as error:
        raise ValueError(
            f"output_dir={os.fspath(folder)!r:.300} cannot be used: {error.strerror}. Choose"
            " another folder."
        ) from error


def _locked_file(folder: Path) -> int | None:
    """The descriptor of the lock's file, locked; None where the file system has no locks."""
    path = folder / LOCK_FILE
    if fcntl is None:
        return None
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 20).decode(errors="replace").strip()
            os.close(descriptor)
            raise ValueError(
                f"output_dir={os.fspath(folder)!r:.300} is in use: process"
                f" {holder if holder.isdecimal() else '?'} trains into it. Wait for its end, or"
                " choose another output_dir."
            ) from None
        except OSError as error:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            warnings.warn(
                f"{folder}: this file system has no locks ({error.strerror}), so fastlora cannot"
                " tell whether another run writes to this folder.",
                stacklevel=4,
            )
            return None
        # The holder before may have deleted the file between our open and our lock. A lock on a
        # deleted file excludes no other run.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                break
        os.close(descriptor)
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"{os.getpid()}\n".encode())
    return descriptor
