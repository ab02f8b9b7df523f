"""Checks on the folder that a model is to be written to, made before any file is written."""

import os
import tempfile
from collections.abc import Collection
from pathlib import Path

from fastlora.checkpoints.atomic import nearest_existing
from fastlora.checkpoints.hub import is_file_name
from fastlora.checkpoints.tensors import INDEX
from fastlora.errors import printable
from fastlora.models.spec import Spec

# A model's weights, as transformers names them.
MODEL_FILES = ("model*.safetensors", INDEX, "pytorch_model*")


def writable_folder(folder: str | os.PathLike[str], spec: Spec) -> Path:
    """The folder as a Path, if the model may be written to it.

    Raises:
        ValueError, PermissionError: as `folder_error` returns them.
    """
    if error := folder_error(Path(folder), spec):
        raise error
    return Path(folder)


def folder_error(path: Path, spec: Spec) -> ValueError | PermissionError | None:
    """The reason why this model must not, or cannot, be written to a folder; None if it can.

    The folder need not exist. A folder is made in the nearest one that exists, and removed at once:
    only this tells whether a file system accepts it.
    """
    if not is_file_name(str(path)):
        return ValueError(
            f"{str(path)!r:.200} cannot name a folder: expected UTF-8, with at most 255 bytes in"
            " each part."
        )
    base = Path(spec.base_folder or spec.name_or_path).resolve()
    if (path / "config.json").is_file() and path.resolve() == base:
        return ValueError(f"{path} is the folder the base was loaded from; choose another.")
    # A folder that does not exist is created in its nearest existing parent.
    nearest = nearest_existing(path)
    if not nearest.is_dir():
        return ValueError(f"{path} cannot be a folder: {nearest} is a file; choose another name.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        return PermissionError(f"{path} cannot be written: {nearest} is not writable for you.")
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".fastlora-", dir=nearest))
    except OSError as error:  # a file system that is read-only or full, or no real one (/proc)
        return PermissionError(f"{path} cannot be written: {nearest}: {error.strerror}.")
    return None


def other_model_error(
    folder: Path, patterns: Collection[str], written: Collection[str] = ()
) -> ValueError | None:
    """The reason why files must not be written beside those of another model; None if they can.

    Args:
        folder: need not exist.
        patterns: of the names of files that would no longer be read correctly, or would be read
            in place of the written ones.
        written: names of the files that will be written; they may exist.
    """
    others = sorted({p.name for pattern in patterns for p in folder.glob(pattern)} - set(written))
    if not others:
        return None
    more = f" and {len(others) - 5} more" if len(others) > 5 else ""
    return ValueError(
        printable(
            f"{folder} holds files of another model: {', '.join(others[:5])}{more}. Choose an empty"
            " folder, or delete these files first."
        )
    )
