"""A base from a Hugging Face folder: config.json and safetensors, checked before use."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fastlora.checkpoint import (
    DTYPES,
    entry_tensors,
    read_entries,
    read_json,
    scan,
    settle_head,
)
from fastlora.checks import CheckpointError, raise_problems
from fastlora.expert_keys import read_model
from fastlora.hub import find_folder
from fastlora.llama.config import LlamaConfig
from fastlora.llama.params import (
    EMBED_TOKENS,
    Base,
    base_from_tensors,
    projection_weights,
    tensors_from_base,
)
from fastlora.llama.spec import Spec
from fastlora.llama.stacked import stack
from fastlora.ops.dequantize import dense
from fastlora.quantized import Quantized, Weight, comes_from, shape_of
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
    if torch.device(device).type == "cuda":  # on the CPU they are views of the file
        stack(config, tensors)
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


def original(config: LlamaConfig, folder: Path, base: Base) -> Matrices:
    """Each projection as it was before it was quantised, read when asked for, in the norms' dtype.

    Args:
        config: the model's shape.
        folder: of the checkpoint in 16 bits.
        base: the quantised one.

    Raises:
        CheckpointError: the folder's weights are quantised themselves, do not fit the model, or are
            not those that this base was quantised from.
    """
    entries = scan(folder)
    own = tensors_from_base(config, base)
    packed = {n: own[n] for n in projection_weights(config) if isinstance(own[n], Quantized)}
    stored = split_quantized(entries)[1]
    problems = [f"quantised   {n} is in {stored[n].kind} there too" for n in packed if n in stored]
    problems += [f"missing     {n}" for n in packed if n not in entries]
    there = {n: entries[n] for n in packed if n in entries and n not in stored}
    problems += [
        f"other       {n}: file has {e.dtype} {e.shape}, the model {shape_of(packed[n])}"
        for n, e in there.items()
        if e.shape != shape_of(packed[n]) or e.dtype not in DTYPES
    ]
    device = base["norm"].device
    if not problems:
        problems = [
            f"other       {n}: not the matrix that was quantised"
            for n, matrix in entry_tensors(there, device=device)
            if not comes_from(packed[n], matrix)
        ]
    raise_problems(
        CheckpointError,
        f"{folder} does not hold the matrices that this base was quantised from:",
        problems,
        "Give the folder of that very checkpoint, in 16 bits.",
    )

    def matrix(name: str, weight: Weight) -> Tensor:
        if isinstance(weight, Tensor):
            return weight
        return read_entries({name: there[name]}, device=device)[name].to(base["norm"].dtype)

    return matrix


def source_folder(spec: Spec) -> Path:
    """The folder that `load` was given, or that the Hub's cache has for it; no network is asked.

    Raises:
        FileNotFoundError: if it is not there.
    """
    try:
        return find_folder(spec.name_or_path, local_files_only=True)
    except OSError as error:
        raise FileNotFoundError(
            f"{spec.name_or_path!r:.200}, which this model was loaded from, is not at hand."
        ) from error
