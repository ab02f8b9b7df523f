"""A base from a Hugging Face folder: config.json and safetensors, checked before use."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fastlora.checkpoint import DTYPES, Entry, read_entries, read_json, scan, settle_head
from fastlora.checks import CheckpointError, raise_problems
from fastlora.expert_keys import read_model
from fastlora.hub import find_folder
from fastlora.llama.config import LlamaConfig
from fastlora.llama.params import (
    EMBED_TOKENS,
    Base,
    base_from_tensors,
    base_tensors,
    projection_weights,
)
from fastlora.ops.dequantize import dense
from fastlora.quantized import Weight
from fastlora.quantized_keys import split_quantized


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
        rope_scaling: as in `LlamaConfig.from_hf`.
        quantize: as load's `load_in_4bit`.

    Raises:
        FileNotFoundError: config.json or weights are not there.
        CheckpointError: a file is wrong, or they do not fit each other.
        ValueError: if `quantize` cannot be.
    """
    raw, config = _read_config(folder, rope_scaling)
    entries, tied = settle_head(scan(folder), config.tie_word_embeddings)
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
        config = LlamaConfig.from_hf(raw, generation=ids, rope_scaling=rope_scaling)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return raw, config


# ── the matrices that a quantised base was made from ──────────────────────────────────────

Matrices = Callable[[str, Weight], Float[Tensor, "d_out d_in"]]  # name on disk, the base's own


def dequantized(dtype: torch.dtype) -> Matrices:
    """Each matrix as the base has it; a quantised one in `dtype`."""
    return lambda _, weight: dense(weight, dtype)


def original(config: LlamaConfig, name_or_folder: str, dtype: torch.dtype) -> Matrices:
    """Each projection as it was before it was quantised, read when asked for, in `dtype`.

    Args:
        config: the model's shape.
        name_or_folder: what `load` was given, or the folder of the checkpoint in 16 bits. The
            network is not asked: a Hub id must be in the cache.
        dtype: of what is given out.

    Raises:
        FileNotFoundError: no such folder.
        CheckpointError: its weights are quantised themselves, or do not fit the model.
    """
    folder = find_folder(name_or_folder, local_files_only=True)
    entries = scan(folder)
    wanted, shapes = projection_weights(config), base_tensors(config)
    stored = split_quantized(entries)[1]
    problems = [f"quantised   {n} is in {stored[n].kind} there too" for n in wanted if n in stored]
    problems += [f"missing     {n}" for n in wanted if n not in entries]
    problems += [
        f"shape       {n}: file has {entries[n].shape}, model needs {shapes[n]}"
        for n in wanted
        if n in entries and n not in stored and entries[n].shape != shapes[n]
    ]
    heading = f"{folder} does not hold the matrices that this base was quantised from:"
    raise_problems(CheckpointError, heading, problems)

    def matrix(name: str, weight: Weight) -> Tensor:
        kept = isinstance(weight, Tensor)
        return weight if kept else _checked(entries[name], weight, dtype)

    return matrix


# Of the matrix, root mean square: 4 bits lose some 0.09 (NF4) or 0.12 (FP4) of one that is drawn
# from a normal distribution, and never half of it; another matrix is off by more than 1.
_MOST_LOST = 0.5


def _checked(entry: Entry, weight: Weight, dtype: torch.dtype) -> Float[Tensor, "d_out d_in"]:
    kept = dense(weight, torch.float32)
    (found,) = read_entries({"": entry}, device=kept.device).values()
    wide = found.to(torch.float32)
    if (wide - kept).norm() > _MOST_LOST * wide.norm():
        raise CheckpointError(
            f"{entry.key} in {entry.path} is another matrix than the one that was quantised; give"
            " the folder of the very checkpoint, or merge over the dequantised base."
        )
    return found.to(dtype)
