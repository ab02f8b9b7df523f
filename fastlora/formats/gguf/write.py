"""write_gguf(): quantises and writes a GGUF file, one tensor at a time."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastlora.checkpoints.atomic import atomic_write
from fastlora.formats.gguf.metadata import Metadata
from fastlora.formats.gguf.packages import gguf_package
from fastlora.formats.gguf.tensors import FileTensor

# dtype of save_gguf -> (type of matrices, type of the file) in gguf's enumerations: all that its
# Python quantiser writes.
DTYPES = {
    "f32": ("F32", "ALL_F32"),
    "f16": ("F16", "MOSTLY_F16"),
    "bf16": ("BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
    "q5_1": ("Q5_1", "MOSTLY_Q5_1"),
    "q5_0": ("Q5_0", "MOSTLY_Q5_0"),
    "q4_1": ("Q4_1", "MOSTLY_Q4_1"),
    "q4_0": ("Q4_0", "MOSTLY_Q4_0"),
    "mxfp4": ("MXFP4", "MOSTLY_MXFP4_MOE"),
    "tq1_0": ("TQ1_0", "MOSTLY_TQ1_0"),
    "tq2_0": ("TQ2_0", "MOSTLY_TQ2_0"),
}

# Quantisations that only llama.cpp's llama-quantize writes.
K_QUANTS = ("q2_k", "q2_k_s", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m")
K_QUANTS += ("q6_k", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m", "iq3_xxs", "iq3_xs", "iq3_s", "iq3_m")
K_QUANTS += ("iq1_s", "iq1_m", "iq4_nl", "iq4_xs")

_FLOATS = ("F32", "F16", "BF16")


class TensorType(NamedTuple):
    """How one tensor is written."""

    name: str  # in GGMLQuantizationType
    bytes: int


def tensor_type(tensor: FileTensor, dtype: str) -> TensorType:
    """How a tensor is written in a file of this dtype.

    Vectors and routers are in float32. Embedding and head have 8 bits if other matrices have fewer,
    as llama-quantize keeps them wider. A matrix whose rows are no multiple of the type's block is
    in float16, as in llama.cpp's own converter.
    """
    wanted = DTYPES[dtype][0]
    if len(tensor.shape) == 1 or "ffn_gate_inp" in tensor.name:
        wanted = "F32"
    elif tensor.name in ("token_embd.weight", "output.weight") and wanted not in _FLOATS:
        wanted = "Q8_0"
    block, size = _block(wanted)
    if tensor.shape[-1] % block:
        wanted, (block, size) = "F16", _block("F16")
    elements = int(np.prod(tensor.shape))
    return TensorType(wanted, elements // block * size)


def _block(name: str) -> tuple[int, int]:
    """(elements, bytes) of a block of a type."""
    package = gguf_package()
    return package.GGML_QUANT_SIZES[package.GGMLQuantizationType[name]]


def not_in_blocks(tensors: Sequence[FileTensor], dtype: str) -> list[str]:
    """Names of the matrices that are written in float16, because blocks do not fit their rows."""
    if DTYPES[dtype][0] in _FLOATS:
        return []
    return [x.name for x in tensors if tensor_type(x, dtype).name == "F16"]


def write_gguf(path: Path, metadata: Metadata, tensors: Sequence[FileTensor], dtype: str) -> None:
    """Write a file completely, or leave the old one unchanged.

    One tensor is in memory at a time, in float32.

    Args:
        path: of the file.
        metadata: key -> value, general.architecture first.
        tensors: in the order in which they are written.
        dtype: a key of `DTYPES`.

    Raises:
        ValueError: a tensor holds NaN or infinity, or a number beyond the range of its type.
        OSError: the file cannot be written.
    """
    types = [tensor_type(x, dtype) for x in tensors]
    arch = metadata["general.architecture"]

    def write(file: Any) -> None:
        writer = gguf_package().GGUFWriter(None, arch)
        _add_metadata(writer, metadata)
        for tensor, kind in zip(tensors, types, strict=True):
            _add_info(writer, tensor, kind)
        # By its name: the writer opens files itself. atomic_write flushes the same file to disk.
        writer.write_header_to_file(Path(file.name))
        try:
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor, kind in zip(tensors, types, strict=True):
                writer.write_tensor_data(_encoded(tensor, kind))
        finally:
            writer.close()

    atomic_write(path, write)


def _add_metadata(writer: Any, metadata: Mapping[str, Any]) -> None:
    # bool first: it is an int too.
    add = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in metadata.items():
        if key != "general.architecture":  # the writer has written it
            add[type(value)](key, value)


def _add_info(writer: Any, tensor: FileTensor, kind: TensorType) -> None:
    raw = gguf_package().GGMLQuantizationType[kind.name]
    writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), kind.bytes, raw)


def _encoded(tensor: FileTensor, kind: TensorType) -> np.ndarray:
    """The bytes of a tensor in the file."""
    package = gguf_package()
    computed = tensor.compute().detach()
    assert computed.shape == tensor.shape, f"{tensor.name}: {computed.shape}, not {tensor.shape}"
    values = computed.to("cpu", torch.float32).contiguous()
    if kind.name == "F16":
        # torch, which does not warn of numbers beyond the range; the check below refuses them.
        values = values.to(torch.float16)
    _check_finite(tensor.name, values, kind.name)
    return package.quantize(values.numpy(), package.GGMLQuantizationType[kind.name])


def _check_finite(name: str, values: Tensor, kind: str) -> None:
    if not bool(values.isfinite().all()):
        raise ValueError(
            f"{name} would hold NaN or infinity in {kind}: the model is broken (a diverged run?),"
            ' or its numbers are too large for 16 bits; dtype="bf16" and "f32" have a wider range.'
        )
