"""A base from a Hugging Face folder: config.json and safetensors, checked before use."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlora.checkpoints.bnb_format import (
    check_quantizable,
    quantizable,
    quantized_problems,
    read_quantized,
    split_quantized,
)
from fastlora.checkpoints.expert_layout import Piece, pieces
from fastlora.checkpoints.tensors import DTYPES, Entry, entry_tensors, read_json
from fastlora.checkpoints.weight_files import check_entries, resolve_tied_head, scan
from fastlora.errors import CheckpointError
from fastlora.models.config import LlamaConfig
from fastlora.models.config_json import config_from_json
from fastlora.models.fused_qkv import fuse_qkv
from fastlora.models.names import (
    EMBED_TOKENS,
    LM_HEAD,
    base_from_tensors,
    base_tensors,
    projection_weights,
)
from fastlora.models.params import Base
from fastlora.ops.quant.bitsandbytes import quantize_4bit
from fastlora.ops.quant.dequantize import dequantize
from fastlora.ops.quant.weights import Quantized, Weight


def read_model(
    folder: Any,
    entries: Mapping[str, Entry],
    config: LlamaConfig,
    *,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    quantize: bool = False,
) -> dict[str, Weight]:
    """Name in the tree -> tensor, of `checkpoint.scan`'s entries, all checked before any is read.

    Pieces go one at a time into the tensor they are part of; on the CPU, what is one tensor in the
    file stays a view of it. A projection stored in 4 or 8 bits is a record of its bytes as they
    are; a head stored so is dequantised.

    Args:
        folder: for messages.
        entries: the files' tensors.
        config: the model's shape.
        device: where the tensors go.
        dtype: of dense tensors; None is the file's.
        quantize: put the projections into 4 bits, one at a time, on the device; a checkpoint that
            has any in 4 or 8 bits stays as it is.

    Raises:
        CheckpointError: as `checkpoint.check_entries` does, in the file's own names.
        ValueError: if `quantize` cannot be.
    """
    dense, stored = split_quantized(entries)
    parts = {n: part for n, part in pieces(config, entries.keys()).items() if n not in stored}
    matrices = {n: s for n, s in base_tensors(config).items() if n in quantizable(config)}
    wrong = quantized_problems(stored, matrices)
    check_entries(folder, dense, {name: part.shape for name, part in parts.items()}, wrong)
    packed = {}
    projections = projection_weights(config)
    if quantize and not any(n in stored for n in projections):
        packed = {n: dtype or DTYPES[dense[n].dtype] for n in projections}
        check_quantizable(config, packed.values())
    keep = lambda name, tensor: quantize_4bit(tensor) if name in packed else tensor
    tensors: dict[str, Any] = _whole_tensors(dense, parts, config, device, dtype, keep)
    tensors |= read_quantized(stored, device=device)
    if isinstance(tensors.get(LM_HEAD), Quantized):
        tensors[LM_HEAD] = dequantize(tensors[LM_HEAD], tensors[EMBED_TOKENS].dtype)
    return {name: tensors[name] for name in base_tensors(config)}


def _whole_tensors(
    entries: Mapping[str, Entry],
    parts: Mapping[str, Piece],
    config: LlamaConfig,
    device: torch.device | str,
    dtype: torch.dtype | None,
    keep: Callable[[str, Tensor], Any],
) -> dict[str, Any]:
    """Name in the tree -> what `keep` makes of its tensor, one at a time."""
    shapes, tensors = base_tensors(config), {}
    for key, tensor in entry_tensors(entries, device=device, dtype=dtype):
        name, index, _ = parts[key]
        if not index:
            tensors[name] = keep(name, tensor)
        else:
            if name not in tensors:
                kind = dtype or DTYPES[entries[key].dtype]
                tensors[name] = torch.empty(shapes[name], dtype=kind, device=device)
            tensors[name][index] = tensor
        del tensor  # what was put into 4 bits goes before the next one comes
    return tensors


def read_base(
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    rope_scaling: dict[str, Any] | None = None,
    quantize: bool = False,
) -> tuple[LlamaConfig, Base]:
    """Config and weights of a Hugging Face folder; the config tells what was really loaded.

    Its `tie_word_embeddings` is False where the file holds a head of its own, its `dtype` that of
    the weights.

    Args:
        folder: holds config.json and safetensors.
        dtype: None is the one that config.json names, else the embedding's own.
        device: where the tensors go.
        rope_scaling: as in `config_from_json`.
        quantize: as load's `load_in_4bit`.

    Raises:
        FileNotFoundError: config.json or weights are not there.
        CheckpointError: a file is wrong, or they do not fit each other.
        ValueError: if `quantize` cannot be.
    """
    raw, config = _read_config(folder, rope_scaling)
    entries, tied = resolve_tied_head(scan(folder), config.tie_word_embeddings)
    config = replace(config, tie_word_embeddings=tied)
    if dtype is None and (raw.get("dtype") or raw.get("torch_dtype")):
        dtype = getattr(torch, config.dtype)
    elif dtype is None and EMBED_TOKENS in entries:  # an unknown dtype is refused below
        dtype = DTYPES.get(entries[EMBED_TOKENS].dtype)
    if raw.get("quantization_config") and not split_quantized(entries)[1]:
        raise CheckpointError(
            f"{folder / 'config.json'} has a quantization_config, but no weight is quantised;"
            " delete it there, or copy the weights that belong to it."
        )
    tensors = read_model(folder, entries, config, device=device, dtype=dtype, quantize=quantize)
    if torch.device(device).type == "cuda":  # on the CPU they are views of the file
        fuse_qkv(config, tensors)
    base = base_from_tensors(config, tensors)
    loaded = str(base["embed_tokens"].dtype).removeprefix("torch.")
    return replace(config, dtype=loaded), base


def _read_config(
    folder: Path, rope_scaling: dict[str, Any] | None
) -> tuple[dict[str, Any], LlamaConfig]:
    path, generation = folder / "config.json", folder / "generation_config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no config.json; expected a model's folder in Hugging Face layout, or a "
            "PEFT adapter's with adapter_config.json."
        )
    raw = read_json(path)
    ids = read_json(generation) if generation.is_file() else None
    try:
        config = config_from_json(raw, generation=ids, rope_scaling=rope_scaling)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return raw, config
