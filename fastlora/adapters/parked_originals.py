"""Where a trained copy's frozen original waits: in a memory-mapped file instead of the accelerator.

Embedding and head of an 8B model are 1 GiB each. While copies of them are trained nobody reads the
originals, but `merge` and `disable` must find them again, exact.
"""

import os
import tempfile
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from fastlora.checkpoints.tensors import read_safetensors, write_safetensors
from fastlora.models.params import Base
from fastlora.models.self_contained import unread
from fastlora.models.spec import Extras


def park_originals(
    base: Base, extras: Extras, folder: str | os.PathLike[str], *, always: bool = False
) -> Base:
    """The base with what nobody reads memory-mapped on the host; itself on the CPU.

    Args:
        base: on one device.
        outside: what is trained in the base's place.
        folder: made if need be; gets a file for each, of a name of its own, which is removed when
            the last model over it has gone (the name may go earlier: the mapping outlives it).
        always: on the CPU as well.

    Raises:
        OSError: if the folder cannot be written to.
    """
    keys = unread(base, extras) if always else _to_send(base, extras)
    if not keys:
        return base
    Path(folder).mkdir(parents=True, exist_ok=True)
    whole: Any = {**base, **{key: _mapped(key, base[key], folder) for key in keys}}
    return whole


def _to_send(base: Base, extras: Extras) -> list[str]:
    """What of `unread` is on an accelerator."""
    return [] if base["norm"].device.type == "cpu" else unread(base, extras)


def location_problems(base: Base, extras: Extras, folder: str | os.PathLike[str]) -> list[str]:
    """Why `offload_originals` could not write to a folder, which need not be there; nothing where
    it would not write."""
    if not _to_send(base, extras):
        return []
    given, path = f"temporary_location={os.fspath(folder)!r}", Path(folder).absolute()
    nearest = next(p for p in (path, *path.parents) if p.exists())
    if not nearest.is_dir():
        return [f"{given}: {nearest} is a file; choose another name."]
    writable = os.access(nearest, os.W_OK | os.X_OK)
    return [] if writable else [f"{given}: {nearest} is not writable for you."]


def _mapped(key: str, tensor: Tensor, folder: str | os.PathLike[str]) -> Tensor:
    handle, name = tempfile.mkstemp(prefix=f"{key}-", suffix=".safetensors", dir=folder)
    os.close(handle)
    try:
        write_safetensors(Path(name), {key: tensor})
        mapped = read_safetensors(Path(name))[key]
    except BaseException:
        _remove(name)
        raise
    weakref.finalize(mapped, _remove, name)
    return mapped


def _remove(name: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(name)
