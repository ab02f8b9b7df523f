"""Checks before a file is written, of its path and its tensors, and after, by llama.cpp."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor

from fastlora.checkpoints.atomic import sync_folder
from fastlora.checkpoints.output_folders import folder_error
from fastlora.errors import raise_problems
from fastlora.formats.gguf.report import Verification
from fastlora.models.spec import Spec


def output_file(path: Path, spec: Spec) -> Path:
    """The path, in a folder that exists now.

    Raises:
        ValueError: as `check_replaceable`, or the file's folder cannot exist.
        PermissionError: the folder cannot be written to.
    """
    check_replaceable(path)
    # A file beside the base's own files does no harm, so the base's folder is not refused.
    if not path.parent.is_dir() and (error := folder_error(path.parent, spec)):
        raise error
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{path} cannot be written: its folder is not writable for you.")
    return path


def check_replaceable(path: Path) -> None:
    """Refuse to replace anything but a GGUF file. An empty file, as tempfile makes it, is replaced.

    Raises:
        ValueError: the path is a folder, or a file of another kind, such as model.safetensors.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder; expected the name of a file, such as model.gguf.")
    if not path.exists():
        return
    # Not a pipe or a device: it would be read here, and replaced by the file.
    replaceable = path.is_file()
    if replaceable:
        with path.open("rb") as file:
            replaceable = file.read(4) in (b"GGUF", b"")
    if not replaceable:
        raise ValueError(
            f"{path} exists and is not a GGUF file; choose the name of a new file, such as"
            f" {path.with_suffix('.gguf').name}."
        )


def write_checked(
    path: Path,
    write: Callable[[Path], None],
    verify: Callable[[Path], Verification] | None,
) -> Verification | None:
    """Write a file. If `verify` is given and raises, the path keeps the file that it had.

    Args:
        path: of the file, in a folder that exists.
        write: writes the file at the path that it is given.
        verify: runs the file at the path that it is given.
    """
    if verify is None:
        write(path)
        return None
    with TemporaryDirectory(prefix=".verifying-", dir=path.parent) as folder:
        write(file := Path(folder) / path.name)
        try:
            verification = verify(file)
        except RuntimeError as error:
            raise RuntimeError(
                f"{error} The written file is deleted again; verify=False keeps it."
            ) from error
        os.replace(file, path)
    sync_folder(path.parent)
    return verification


def check_adapter_tensors(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse NaN and infinity.

    Raises:
        ValueError: naming the tensors that hold them.
    """
    broken = [name for name, x in tensors if not bool(x.isfinite().all())]
    cure = "The adapter is broken (a diverged run?), or its dtype is too narrow for its scaling."
    raise_problems(ValueError, "The adapter's file would hold NaN or infinity in:", broken, cure)
