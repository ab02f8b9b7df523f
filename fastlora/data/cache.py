"""The cache of encoded rows: one file for each combination of data, tokenizer and settings.

    "FLROWS01", length of the header (8 bytes), header (JSON), zeros up to a multiple of 64 bytes,
    lengths of the examples (int32), input_ids of all examples (int32), labels (int32)

The header tells which source each example belongs to, what was left out, and the SHA-256 of the
arrays. A file that is cut off or changed is not used, and is written again.

The files are read through memory maps, so the system may drop their pages and read them again.
"""

import hashlib
import json
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from fastlora.checkpoints.atomic import atomic_write, free_bytes
from fastlora.data.examples import ID_TYPE, Example
from fastlora.data.left_out import LeftOut

# Fewer tokens are encoded within seconds.
LEAST_TOKENS = 2**20

_MAGIC = b"FLROWS01"
_ALIGNMENT = 64
_MOST_HEADER_BYTES = 2**28
_BLOCK_BYTES = 2**24


class Encoded(NamedTuple):
    """All examples of an argument of `train`, and what was counted while they were encoded."""

    parts: list[list[Example]]  # by source
    left_out: LeftOut
    chats: bool  # whether a row was a chat


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/fastlora/rows; ~/.cache/fastlora/rows if the variable is not set."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "fastlora" / "rows"


def read_cache(key: str, name: str) -> Encoded | None:
    """What `write_cache` wrote for a key; None if there is no such file, or it is damaged.

    Args:
        key: see `cache_key`.
        name: of the argument, for the counts.
    """
    path = cache_folder() / f"{key}.rows"
    try:
        return _read(path, name)
    except OSError:  # there is none; if the folder cannot be used, writing will say so
        return None
    except (ValueError, KeyError, TypeError) as error:
        warnings.warn(
            f"{path} is damaged and not used; the rows are encoded again ({error})", stacklevel=3
        )
        return None


def write_cache(key: str, encoded: Encoded) -> None:
    """Write a file for `read_cache`, if the examples have at least `LEAST_TOKENS` tokens.

    Warns if the folder cannot be written, or if the file would take more than half of the disk's
    free space. The run goes on without the file then.
    """
    examples = [example for part in encoded.parts for example in part]
    tokens = sum(len(example.input_ids) for example in examples)
    if tokens < LEAST_TOKENS:
        return
    path = cache_folder() / f"{key}.rows"
    needed, free = 8 * tokens, free_bytes(path.parent)
    if free is not None and needed > free // 2:
        warnings.warn(
            f"encoded rows are not cached: {path.parent} has {free:,} bytes free, and the file"
            f" takes {needed:,}",
            stacklevel=3,
        )
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, lambda file: _write(file, encoded, examples))
    except OSError as error:
        warnings.warn(f"encoded rows are not cached: {error}", stacklevel=3)


def _write(file: BinaryIO, encoded: Encoded, examples: Sequence[Example]) -> None:
    digest = hashlib.sha256()
    for data in _body(examples):
        digest.update(data)
    left_out = encoded.left_out
    header = {
        "parts": [len(part) for part in encoded.parts],
        "tokens": sum(len(example.input_ids) for example in examples),
        "sha256": digest.hexdigest(),
        "chats": encoded.chats,
        "read": left_out.read,
        "rows": left_out.rows,
        "left_out_tokens": left_out.tokens,
        "listed": left_out.listed,
    }
    data = json.dumps(header).encode()
    start = _MAGIC + len(data).to_bytes(8, "little") + data
    file.write(start + bytes(-len(start) % _ALIGNMENT))
    for data in _body(examples):
        file.write(data)


def _body(examples: Sequence[Example]) -> Iterator[bytes]:
    """The arrays of a file, in blocks."""
    yield np.array([len(example.input_ids) for example in examples], dtype=ID_TYPE).tobytes()
    for column in ("input_ids", "labels"):
        block, size = [], 0
        for example in examples:
            block.append(getattr(example, column))
            size += block[-1].nbytes
            if size >= _BLOCK_BYTES:
                yield np.concatenate(block).tobytes()
                block, size = [], 0
        if block:
            yield np.concatenate(block).tobytes()


def _read(path: Path, name: str) -> Encoded:
    header, start = _header(path)
    parts, tokens = header["parts"], header["tokens"]
    count = sum(parts)
    if path.stat().st_size != start + 4 * count + 8 * tokens:
        raise ValueError("its size is wrong")
    body = np.memmap(path, dtype=ID_TYPE, mode="r", offset=start)
    digest = hashlib.sha256()
    for first in range(0, len(body), _BLOCK_BYTES):
        digest.update(body[first : first + _BLOCK_BYTES].data)
    if digest.hexdigest() != header["sha256"]:
        raise ValueError("its content is not what was written")
    ends = np.cumsum(body[:count], dtype=np.int64)
    # A plain array over the same memory: slices of np.memmap are slower.
    ids, labels = np.split(np.asarray(body[count:]).view(np.ndarray), 2)
    bounds = zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True)
    examples = iter([Example(ids[a:b], labels[a:b]) for a, b in bounds])
    left_out = LeftOut(
        name,
        header["read"],
        Counter(header["rows"]),
        Counter(header["left_out_tokens"]),
        listed=header["listed"],
    )
    split = [[next(examples) for _ in range(size)] for size in parts]
    return Encoded(split, left_out, header["chats"])


def _header(path: Path) -> tuple[Mapping[str, Any], int]:
    """The header of a file, and where its arrays begin."""
    with path.open("rb") as file:
        magic, length = file.read(8), int.from_bytes(file.read(8), "little")
        if magic != _MAGIC or length > _MOST_HEADER_BYTES:
            raise ValueError("it does not begin as such files do")
        header = json.loads(file.read(length))
    return header, -(-(16 + length) // _ALIGNMENT) * _ALIGNMENT
