"""output_folders."""

import os
from pathlib import Path

from fastlora.models.spec import Spec


# ── where to write ────────────────────────────────────────────────────────────────────────
def writable(folder: str | os.PathLike[str], spec: Spec) -> Path:
    """The folder as a path, once it is clear that it may be written to."""
    if error := folder_error(Path(folder), spec):
        raise error
    return Path(folder)


def folder_error(path: Path, spec: Spec) -> ValueError | PermissionError | None:
    """Why nothing of this model may or can be written to a folder; nothing is touched."""
    if (path / "config.json").is_file() and path.resolve() == Path(spec.name_or_path).resolve():
        return ValueError(f"{path} is the folder the base was loaded from; choose another.")
    nearest = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not nearest.is_dir():
        return ValueError(f"{path} cannot be a folder: {nearest} is a file; choose another name.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        return PermissionError(f"{path} cannot be written: {nearest} is not writable for you.")
    return None
