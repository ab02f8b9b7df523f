"""Parks the frozen originals of trained embeddings and heads in a memory-mapped file on the host.

Embedding and head of an 8B model take 1 GiB each. While copies of them are trained, nothing reads
the originals, but `merge` and `disable` need them back exactly (models/self_contained.py).
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
from fastlora.runtime.layer_fetching import is_sharded

DEFAULT_PARKING_FOLDER = "_fastlora_temporary_saved_buffers"


def park_originals(
    base: Base, extras: Extras, folder: str | os.PathLike[str], *, always: bool = False
) -> Base:
    """The base with the tensors that nothing reads mapped from files on the host.

        {"embed_tokens": E on the device, ...}  ->  {"embed_tokens": E mapped from a file, ...}

    A base on the CPU is returned unchanged.

    Args:
        base: on one device.
        extras: says of which tensors copies are trained.
        folder: created if it does not exist. Each tensor gets a file with an unused name, which is
            removed when the last model that uses it is gone. On Linux a mapping stays readable even
            if the file is removed earlier.
        always: park on the CPU too (for tests).

    Raises:
        OSError: the folder cannot be written to.
    """
    keys = unread(base, extras) if always else _keys_to_park(base, extras)
    if not keys:
        return base
    Path(folder).mkdir(parents=True, exist_ok=True)
    parked: Any = {**base, **{key: _mapped(key, base[key], folder) for key in keys}}
    return parked


def location_problems(base: Base, extras: Extras, folder: str | os.PathLike[str]) -> list[str]:
    """Why `park_originals` could not write to a folder; empty if it would not write at all."""
    if not _keys_to_park(base, extras):
        return []
    given, path = f"temporary_location={os.fspath(folder)!r}", Path(folder).absolute()
    # The folder may not exist yet. Its nearest parent that exists must then allow to create it.
    nearest = next(p for p in (path, *path.parents) if p.exists())
    if not nearest.is_dir():
        return [f"{given}: {nearest} is a file; choose another name"]
    writable = os.access(nearest, os.W_OK | os.X_OK)
    return [] if writable else [f"{given}: you may not write to {nearest}; choose another folder"]


def _keys_to_park(base: Base, extras: Extras) -> list[str]:
    # Parking frees device memory. On the CPU the originals are mapped from the checkpoint already.
    if base["norm"].device.type == "cpu" or is_sharded(base):  # a sharded base is elsewhere already
        return []
    return unread(base, extras)


def _mapped(key: str, tensor: Tensor, folder: str | os.PathLike[str]) -> Tensor:
    """The tensor, mapped from a new file that is removed together with it."""
    # A new name each time, because several models may park in one folder.
    handle, name = tempfile.mkstemp(prefix=f"{key}-", suffix=".safetensors", dir=folder)
    os.close(handle)
    try:
        write_safetensors(Path(name), {key: tensor})
        mapped = read_safetensors(Path(name))[key]
    except BaseException:  # KeyboardInterrupt too: half a file of 1 GiB must not remain
        _remove(name)
        raise
    # finalize also runs when Python exits; a __del__ might not.
    weakref.finalize(mapped, _remove, name)
    return mapped


def _remove(name: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(name)
