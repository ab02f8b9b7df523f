"""atomic_write(): writes a file completely, or leaves the old one unchanged."""

import errno
import os
import re
import secrets
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

# ".adapter_model.safetensors.4711-90125.5f3a0c1d.tmp": the process that writes it, the time at
# which that process started, and eight random digits.
_TEMPORARY = re.compile(r"\..+\.(\d+)-(\d+)\.[0-9a-f]{8}\.tmp")


def atomic_write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Replace the file `path` by what `write` puts into the file object that it is given.

    The bytes go to a temporary file in the same folder, are flushed to the disk, and only then get
    the final name. If `write` raises or the process dies, the old file is unchanged. Temporary
    files that dead processes left in the folder are deleted first, because they take space.

    Raises:
        OSError: the file cannot be written. The message names the path and the cure; of a full
            disk, also the bytes that were written and that are free.
    """
    sweep_temporary_files(path.parent)
    owner = f"{os.getpid()}-{_start_time(os.getpid()) or 0}"
    temporary = path.with_name(f".{path.name}.{owner}.{secrets.token_hex(4)}.tmp")
    written = 0
    try:
        with temporary.open("xb") as file:
            try:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            finally:
                # What reached the disk: a write that failed may have been cut short.
                written = os.fstat(file.fileno()).st_size
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):  # the path itself may be impossible; `error` says so
            temporary.unlink()
        # `write` may read other files, whose errors name those.
        if error.filename not in (None, os.fspath(temporary)):
            raise
        raise _with_path(error, path, written) from error
    # KeyboardInterrupt too must not leave the temporary file.
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _with_path(error: OSError, path: Path, written: int) -> OSError:
    """The same error for the final path, with its cause."""
    if error.errno is None:
        return OSError(f"{path}: {error}")
    text = f"{error.strerror}{_cause(error, path, written)}"
    return OSError(error.errno, text, str(path))  # Python picks the same class by the number


def _cause(error: OSError, path: Path, written: int) -> str:
    """Why a file cannot be written and what to do, to follow the system's words; "" if unknown."""
    folder = path.parent
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            free = free_bytes(folder)
            space = "" if free is None else f", and the disk has {free:,} bytes free"
            return f": {written:,} bytes of this file were written{space}"
        case errno.ENOENT:
            return f": the folder {folder} does not exist; make it first, or choose another path"
        case errno.ENOTDIR:
            nearest = nearest_existing(folder)
            return f": {nearest} is a file and cannot be a folder; choose another path"
        case errno.EISDIR:
            return ": this is a folder; add the name of a file"
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return f": the folder {folder} is not writable for you; choose another path"
    return ""


def free_bytes(folder: Path) -> int | None:
    """Bytes that the disk of a folder has free; None if the system does not say.

    The folder need not exist: its nearest existing parent is on the same disk.
    """
    try:
        return shutil.disk_usage(nearest_existing(folder)).free
    except OSError:
        return None


def nearest_existing(path: Path) -> Path:
    """The path if it exists, else the nearest of its parents that does."""
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def sweep_temporary_files(folder: Path) -> None:
    """Delete the temporary files of `atomic_write` in a folder whose processes are dead.

    Files of living processes stay, those of this process included.
    """
    try:
        names = [name for name in os.listdir(folder) if name.endswith(".tmp")]
    except OSError:  # no such folder: writing reports that
        return
    for name in names:
        match = _TEMPORARY.fullmatch(name)
        if match and not _is_alive(int(match[1]), int(match[2])):
            try:
                (folder / name).unlink(missing_ok=True)
            except OSError:  # not ours to delete: it costs space only
                continue


def _is_alive(pid: int, start_time: int) -> bool:
    """Whether the process that started at this time still runs.

    The number alone does not tell: containers give the same numbers to the processes of every run.
    """
    now = _start_time(pid)
    if now is not None:
        return now == start_time
    if os.name == "nt":  # signal 0 is Ctrl-C there
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it belongs to another user
        return True
    return True


def _start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since the machine's start.

    None if it does not run, or where the system has no /proc.
    """
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            # The program's name, in brackets, may hold spaces: fields count from behind it.
            return int(file.read().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk, so that renames in it survive a power cut."""
    if os.name == "nt":  # Windows does not open folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
