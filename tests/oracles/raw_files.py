"""Safetensors files written byte by byte, so that they can be wrong."""

import json
import struct
from pathlib import Path


def raw_file(path: Path, header: bytes | dict, data: bytes = b"", size: int | None = None) -> Path:
    """A safetensors file with this header, valid or not."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header) if size is None else size) + header + data)
    return path


def entry(dtype: str, shape: list, start: int, end: int) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
