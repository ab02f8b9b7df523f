"""The check of a path before a file is written there."""

import os
from pathlib import Path

from fastlora.checkpoints.output_folders import folder_error
from fastlora.models.spec import Spec


def output_file(path: Path, spec: Spec) -> Path:
    """The path, in a folder that exists now.

    Raises:
        ValueError: the path is a folder, or its folder cannot exist.
        PermissionError: the folder cannot be written to.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder; expected the name of a file, such as model.gguf.")
    # A file beside the base's own files does no harm, so the base's folder is not refused.
    if not path.parent.is_dir() and (error := folder_error(path.parent, spec)):
        raise error
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{path} cannot be written: its folder is not writable for you.")
    return path
