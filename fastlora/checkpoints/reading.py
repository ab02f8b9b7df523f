"""read_base(): a folder in Hugging Face layout -> config and base tree, checked before use.

Names, shapes, dtypes and quantised weights are checked from headers (weight_files.py,
bnb_reading.py); only then are tensors read.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fastlora.checkpoints.bnb_format import (
    StoredWeight,
    check_quantizable,
    quantizable,
    split_quantized,
)
from fastlora.checkpoints.bnb_reading import quantized_problems, read_quantized
from fastlora.checkpoints.expert_layout import Piece, pieces
from fastlora.checkpoints.tensors import DTYPES, Entry, entry_tensors, read_json
from fastlora.checkpoints.weight_files import check_entries, resolve_tied_head, scan
from fastlora.errors import CheckpointError, raise_problems
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
from fastlora.ops.quant.e4m3 import quantize_matrix
from fastlora.ops.quant.weights import Quantized, Weight, Weight4bit, WeightFP8

# What projections can be quantised to while they are read: `load_in_4bit` and `base_precision`.
Precision = Literal["nf4", "fp8"]


def read_base(
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    rope_scaling: dict[str, Any] | None = None,
    quantize: Precision | None = None,
) -> tuple[LlamaConfig, Base]:
    """Read config and weights of a folder in Hugging Face layout: `check_base`, then all tensors.

    The config describes what was loaded: `tie_word_embeddings` is False if the file has a head that
    differs from the embedding, and `dtype` is the weights'.

    Args:
        folder: holds config.json and safetensors.
        dtype: of dense weights. None is the dtype that config.json names, or else the embedding's.
        device: where the tensors go. On the CPU, dense tensors whose dtype does not change are
            views of the memory-mapped files.
        rope_scaling: as in `config_from_json`.
        quantize: the projections' new precision; None: that of the files.

    Raises:
        FileNotFoundError: config.json or the weights do not exist.
        CheckpointError: a file is wrong, or config and weights do not fit each other.
        ValueError: `quantize` does not support the model or its dtype.
        ModuleNotFoundError: bitsandbytes is needed and not installed.
    """
    checked = check_base(folder, dtype=dtype, rope_scaling=rope_scaling, quantize=quantize)
    return read_checked(checked, device)


def read_checked(checked: "CheckedBase", device: torch.device | str) -> tuple[LlamaConfig, Base]:
    """`read_base` of a folder that `check_base` has checked."""
    config = checked.config
    tensors = _read_weights(checked, device)
    if torch.device(device).type == "cuda":  # on the CPU, fusing would copy views of the file
        fuse_qkv(config, tensors)
    base = base_from_tensors(config, tensors)
    return with_loaded_dtype(config, base["embed_tokens"].dtype), base


def with_loaded_dtype(config: LlamaConfig, dtype: torch.dtype) -> LlamaConfig:
    """The config with the dtype of the weights that were read."""
    return replace(config, dtype=str(dtype).removeprefix("torch."))


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedBase:
    """The weights of a folder, checked against its config. No weight is read yet."""

    folder: Path
    config: LlamaConfig
    dtype: torch.dtype | None  # of dense weights; None: the file's
    dense: Mapping[str, Entry]
    parts: Mapping[str, Piece]  # key in the file -> which tensor of the model, and where in it
    stored: Mapping[str, StoredWeight]  # in 4 or 8 bits
    to_quantize: Mapping[str, torch.dtype]  # name -> dtype, of the projections to be quantised now
    precision: Precision | None  # the new precision of the projections in `to_quantize`

    @property
    def is_dense(self) -> bool:
        """Whether no weight is quantised, neither in the files nor while they are read."""
        return not (self.stored or self.to_quantize)

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype of a dense tensor after it is read."""
        return self.dtype or DTYPES[self.dense[name].dtype]

    def quantized(self, name: str, tensor: Tensor) -> Weight4bit | WeightFP8:
        """A tensor of `to_quantize` in its new precision.

        Raises:
            CheckpointError: the tensor holds NaN or infinity.
        """
        if not tensor.isfinite().all():  # a block's scale would be NaN, and with it 64 weights
            raise CheckpointError(
                f"{self.folder}: {name} holds NaN or infinity; download it again."
            )
        return quantize_matrix(tensor) if self.precision == "fp8" else quantize_4bit(tensor)


def check_base(
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    rope_scaling: dict[str, Any] | None = None,
    quantize: Precision | None = None,
) -> CheckedBase:
    """Read config.json and the headers of the weights, and check everything.

    Args:
        folder: as `read_base`.
        dtype: as `read_base`.
        rope_scaling: as `read_base`.
        quantize: as `read_base`.

    Raises:
        FileNotFoundError: as `read_base`.
        CheckpointError: as `read_base`.
        ValueError: as `read_base`.
        ModuleNotFoundError: as `read_base`.
    """
    raw, config = _read_config(folder, rope_scaling)
    found = scan(folder, wrapped=config.wrapper is not None)
    entries, tied = resolve_tied_head(found, config.tie_word_embeddings)
    config = replace(config, tie_word_embeddings=tied)
    if dtype is None and (raw.get("dtype") or raw.get("torch_dtype")):
        dtype = getattr(torch, config.dtype)
    elif dtype is None and EMBED_TOKENS in entries:  # check_entries refuses an unknown dtype
        dtype = DTYPES.get(entries[EMBED_TOKENS].dtype)
    # Such a config.json and these weights come from different checkpoints.
    if raw.get("quantization_config") and not split_quantized(entries)[1]:
        raise CheckpointError(
            f"{folder / 'config.json'} has a quantization_config, but no weight is quantised;"
            " delete it there, or copy the weights that belong to it."
        )
    return _checked_weights(folder, entries, config, dtype, quantize)


def _read_config(
    folder: Path, rope_scaling: dict[str, Any] | None
) -> tuple[dict[str, Any], LlamaConfig]:
    """(config.json's object, the config made of it and of generation_config.json)."""
    path, generation = folder / "config.json", folder / "generation_config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no config.json; expected a model's folder in Hugging Face layout, or a "
            "PEFT adapter's with adapter_config.json."
        )
    raw = read_json(path)
    generation_settings = read_json(generation) if generation.is_file() else None
    try:
        config = config_from_json(raw, generation=generation_settings, rope_scaling=rope_scaling)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return raw, config


def _checked_weights(
    folder: Path,
    entries: Mapping[str, Entry],
    config: LlamaConfig,
    dtype: torch.dtype | None,
    quantize: Precision | None,
) -> CheckedBase:
    """Check all entries. "nf4" changes no checkpoint in which any projection is quantised."""
    dense, stored = split_quantized(entries)
    parts = {n: part for n, part in pieces(config, entries.keys()).items() if n not in stored}
    matrices = {n: s for n, s in base_tensors(config).items() if n in quantizable(config)}
    # Dense and quantised weights are checked together, so that one error lists all problems.
    wrong = quantized_problems(stored, matrices)
    check_entries(folder, dense, {name: part.shape for name, part in parts.items()}, wrong)
    to_quantize = {}
    projections = projection_weights(config)
    if quantize == "fp8":
        _check_fp8(folder, config, [n for n in projections if n in stored])
    if quantize and not any(n in stored for n in projections):
        to_quantize = {n: dtype or DTYPES[dense[n].dtype] for n in projections}
        if quantize == "nf4":
            check_quantizable(config, to_quantize.values())
    return CheckedBase(
        folder=folder,
        config=config,
        dtype=dtype,
        dense=dense,
        parts=parts,
        stored=stored,
        to_quantize=to_quantize,
        precision=quantize,
    )


def _check_fp8(folder: Path, config: LlamaConfig, stored: Sequence[str]) -> None:
    """Check that a model's projections can be quantised to e4m3; `stored` are quantised already.

    Raises:
        ValueError: a mixture of experts, or a checkpoint with quantised projections.
    """
    problems = []
    if any(config.sparse_layers):
        problems.append(
            f"{config.model_type} is a mixture of experts, whose grouped products are not computed"
            ' in fp8; load it with base_precision="checkpoint"'
        )
    if stored:
        problems.append(
            f"{folder}: {len(stored)} projections ({stored[0]}, ...) are in 4 or 8 bits already;"
            ' load the checkpoint in 16 bits, or this one with base_precision="checkpoint"'
        )
    raise_problems(ValueError, 'base_precision="fp8" cannot be used:', problems)


def _read_weights(checked: CheckedBase, device: torch.device | str) -> dict[str, Weight]:
    """Name in the tree -> weight, for all of `base_tensors`.

    A projection that is stored in 4 or 8 bits keeps its bytes; a head that is stored so is
    dequantised.
    """
    config, dtype = checked.config, checked.dtype

    def convert(name: str, tensor: Tensor) -> Weight:
        return checked.quantized(name, tensor) if name in checked.to_quantize else tensor

    tensors = _read_dense(checked.dense, checked.parts, config, device, dtype, convert)
    tensors |= read_quantized(checked.stored, device=device)
    # The kernels of head and loss read a dense matrix.
    if isinstance(tensors.get(LM_HEAD), Quantized):
        tensors[LM_HEAD] = dequantize(tensors[LM_HEAD], tensors[EMBED_TOKENS].dtype)
    return {name: tensors[name] for name in base_tensors(config)}


def _read_dense(
    entries: Mapping[str, Entry],
    parts: Mapping[str, Piece],
    config: LlamaConfig,
    device: torch.device | str,
    dtype: torch.dtype | None,
    convert: Callable[[str, Tensor], Any],
) -> dict[str, Any]:
    """Name in the tree -> `convert(name, tensor)`; one tensor at a time is on the device besides.

    Pieces of an experts' tensor are copied into it one by one.
    """
    shapes, tensors = base_tensors(config), {}
    for key, tensor in entry_tensors(entries, device=device, dtype=dtype):
        name, index, _ = parts[key]
        if not index:
            tensors[name] = convert(name, tensor)
        else:
            if name not in tensors:
                piece_dtype = dtype or DTYPES[entries[key].dtype]
                tensors[name] = torch.empty(shapes[name], dtype=piece_dtype, device=device)
            tensors[name][index] = tensor
        del tensor  # else a matrix in 16 bits would stay on the device while the next one is read
    return tensors
