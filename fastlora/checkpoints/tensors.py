"""JSON and safetensors files: checked when they are read, replaced atomically when written.

This is the only file that reads or writes safetensors. Headers and JSON are checked in
milliseconds, before the first tensor is read.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastlora.checkpoints.atomic import atomic_write
from fastlora.checkpoints.file_bytes import check_size, read_bytes
from fastlora.checkpoints.json_text import first_line, unique_names
from fastlora.errors import CheckpointError, raise_problems

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

# Dtypes that a weight may be stored in, by safetensors' names.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}

# The longest JSON file in use, the index of DeepSeek-V3's 91,991 tensors, is 9 MB.
_MAX_JSON_BYTES = 32 * 2**20

# Of one safetensors file. A file of all tensors of DeepSeek-V3 would have a header of 12 MB.
_MAX_HEADER_BYTES = 16 * 2**20
_MAX_TENSORS = 100_000

# ── JSON ──────────────────────────────────────────────────────────────────────────────────


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: not UTF-8, not JSON, not an object, a name given twice, nested too deeply,
            longer than 32 MiB, or not a file with contents of its own (a device, a pipe).
    """
    data = read_bytes(path, _MAX_JSON_BYTES)
    try:
        value = json.loads(data.decode(), object_pairs_hook=unique_names)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {first_line(error)}.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}; expected an object.")
    return value


def read_index(path: Path) -> dict[str, str]:
    """The weight_map of an index: tensor key -> name of a file in the index's folder.

    Raises:
        CheckpointError: no weight_map, or a name that leads out of the folder or does not end in
            .safetensors.
    """
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map; expected tensor names and their files.")
    problems = [
        f"{key}: {file!r}; expected the name of a .safetensors file in this folder"
        for key, file in weight_map.items()
        if not _is_inside(file)
    ]
    raise_problems(CheckpointError, f"{path} names files that fastlora does not read:", problems)
    return weight_map


def _is_inside(file: Any) -> bool:
    if not isinstance(file, str) or not file.endswith(".safetensors") or "\0" in file:
        return False
    path = PurePosixPath(file.replace("\\", "/"))
    short = len(file.encode(errors="surrogatepass")) <= 255  # the limit of common file systems
    return short and not path.is_absolute() and ".." not in path.parts and ":" not in path.parts[0]


# ── reading safetensors ───────────────────────────────────────────────────────────────────


class Entry(NamedTuple):
    """One tensor of a safetensors file, as the file's header describes it."""

    path: Path
    key: str  # the tensor's name in the file
    dtype: str  # safetensors' name: "F32", "BF16", ...
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, Entry]:
    """Key -> entry, for every tensor of a file. No tensor is read.

    Raises:
        CheckpointError: truncated, overlapping or unused bytes, an invalid header, a key given
            twice, or more than 100,000 tensors.
    """
    _check_header_size(path)
    with _safetensors_errors(path), safe_open(path, framework="pt") as file:
        keys = file.keys()
    # safetensors 0.8 has now checked the file, except for keys given twice, of which it silently
    # takes the last. Its own calls for dtype and shape take 40 us a tensor, ten times this parser.
    with path.open("rb") as raw:
        size = int.from_bytes(raw.read(8), "little")
        try:
            header = json.loads(raw.read(size), object_pairs_hook=unique_names)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: in its header, {first_line(error)}.") from error
    return {k: Entry(path, k, header[k]["dtype"], tuple(header[k]["shape"])) for k in keys}


def _check_header_size(path: Path) -> None:
    """Refuse a file before the safetensors library maps or parses it: 300,000 tensors take 6 s.

    Raises:
        CheckpointError: not a regular file, too short for its header, or too many tensors.
    """
    check_size(path, 2**63)  # of any size, but not a device or a pipe
    size = path.stat().st_size
    with _safetensors_errors(path), path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if not 2 <= header_bytes <= size - 8:
            raise CheckpointError(
                f"{path} is not a complete safetensors file: it has {size:,} bytes, and its header"
                f" would have {header_bytes:,}. Copy or download it again."
            )
        # Each tensor has this field. A name may hold the word too, but not 100,000 of them.
        too_long = header_bytes > _MAX_HEADER_BYTES
        if too_long or file.read(header_bytes).count(b'"data_offsets"') > _MAX_TENSORS:
            raise CheckpointError(
                f"{path} has more than {_MAX_TENSORS:,} tensors, or a header of more than"
                f" {_MAX_HEADER_BYTES:,} bytes (it has {header_bytes:,}); no model needs that."
            )


@contextmanager
def _safetensors_errors(path: Path):
    try:
        yield
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is not a complete safetensors file: {error}. Copy or download it again."
        ) from error
    except (FileNotFoundError, PermissionError):
        raise
    except (OSError, MemoryError) as error:  # they do not name the file
        raise CheckpointError(f"{path} cannot be read or mapped into memory: {error}.") from error


def entry_tensors(
    entries: Mapping[str, Entry],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor), file by file. Each tensor is read directly onto the device.

    On the CPU, if the dtype does not change, tensors are views of the memory-mapped file and take
    no memory of their own. The mapping is private: writing to such a tensor does not change the
    file.
    """
    for path in dict.fromkeys(entry.path for entry in entries.values()):
        with (
            _safetensors_errors(path),
            safe_open(path, framework="pt", device=str(device)) as file,
        ):
            for name, entry in entries.items():
                if entry.path == path:
                    yield name, file.get_tensor(entry.key).to(dtype=dtype)


def read_entries(
    entries: Mapping[str, Entry],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Name -> tensor, read as by `entry_tensors`, in the order of `entries`."""
    tensors = dict(entry_tensors(entries, device=device, dtype=dtype))
    return {name: tensors[name] for name in entries}


class RowReader:
    """Reads rows of stored tensors: consecutive indices of the first dimension. A context."""

    def __init__(self) -> None:
        """No file is open."""
        self.files = ExitStack()
        self.opened: dict[Path, Any] = {}
        self.bytes_read = 0

    def rows(self, entry: Entry, first: int, last: int) -> Tensor:
        """Rows [first, last) of a tensor with at least one dimension, on the CPU."""
        with _safetensors_errors(entry.path):
            if entry.path not in self.opened:
                file = safe_open(entry.path, framework="pt")
                self.opened[entry.path] = self.files.enter_context(file)
            rows = self.opened[entry.path].get_slice(entry.key)[first:last]
        self.bytes_read += rows.nbytes
        return rows

    def __enter__(self) -> "RowReader":
        return self

    def __exit__(self, *error: object) -> None:
        self.files.close()


def read_safetensors(path: Path, *, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """All tensors of one file. Checks as `read_header`, views as `entry_tensors`."""
    return read_entries(read_header(path), device=device)


# ── writing ───────────────────────────────────────────────────────────────────────────────


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, atomically."""
    atomic_write(path, lambda file: file.write(text.encode()))


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write an object as indented JSON, atomically, with its names in the given order."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


# Names of dtypes in headers.
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()} | {
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Deferred(NamedTuple):
    """A tensor that does not exist yet: its dtype and shape, and the function that computes it.

    `write_safetensors` writes the header from dtype and shape. It then calls `compute` for one
    tensor at a time, writes the result and drops it, so that a model larger than the free memory
    can be written.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    compute: Callable[[], Tensor]


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Tensor | Deferred],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors to a safetensors file, atomically.

    Tensors are copied to the host one at a time: the extra memory is that of the largest one.
    Tensors that share memory are each written in full.

    Args:
        path: the file; its folder must exist.
        tensors: key -> tensor on any device, or Deferred. Floating-point dtypes of 16 to 64 bits,
            signed integers, uint8 and bool.
        metadata: for the header; None is {"format": "pt"}, which transformers and PEFT expect.

    Raises:
        ValueError: a tensor has another dtype.
    """
    # Widest dtype first, so that every tensor starts at a multiple of its element size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header = _header(ordered, {"format": "pt"} if metadata is None else metadata)

    def write(file: BinaryIO) -> None:
        file.write(len(header).to_bytes(8, "little") + header)
        for key, item in ordered:
            tensor = item.compute() if isinstance(item, Deferred) else item
            assert (tensor.dtype, tuple(tensor.shape)) == (item.dtype, tuple(item.shape)), key
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy().data)

    atomic_write(path, write)


def _header(ordered: Iterable[tuple[str, Tensor | Deferred]], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for key, tensor in ordered:
        if tensor.dtype not in _DTYPE_NAMES:
            raise ValueError(f"{key} is {tensor.dtype}; expected one of {list(_DTYPE_NAMES)}.")
        start, end = end, end + math.prod(tensor.shape) * tensor.dtype.itemsize
        entries[key] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    header = json.dumps(entries, separators=(",", ":")).encode()
    return header + b" " * (-len(header) % 8)  # the first tensor starts at a multiple of 8 bytes
