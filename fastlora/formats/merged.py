"""save_merged(): a model as a Hugging Face folder, with its adapter merged, in 16 or 4 bits."""

import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlora.adapters.edits.merging import merged_tensors
from fastlora.arguments import check_arguments, one_of
from fastlora.checkpoints.atomic import sync_folder
from fastlora.checkpoints.bnb_format import QUANTIZATION_CONFIG, check_quantizable
from fastlora.checkpoints.output_folders import other_model_error, writable_folder
from fastlora.checkpoints.tensors import INDEX, Deferred, write_json, write_safetensors
from fastlora.checkpoints.unquantized import (
    MatrixSource,
    dequantized_matrices,
    source_folder,
    unquantized_matrices,
)
from fastlora.distributed.leading import on_first_rank
from fastlora.errors import CheckpointError
from fastlora.formats.peft.writing import CONFIG_FILE, save_adapter
from fastlora.formats.read_back import largest_difference
from fastlora.formats.tensors_out import (
    deferred_tensors,
    file_tensors,
    finite_statistics,
    max_bytes_4bit,
    shard_tensors,
    tensor_bytes,
    unchanged_4bit,
)
from fastlora.models.config_json import config_to_json, generation_config_to_json
from fastlora.models.names import projection_weights
from fastlora.models.params import is_quantized
from fastlora.models.self_contained import self_contained
from fastlora.models.stacks import check_one_adapter
from fastlora.models.state import ModelState, require_adapter
from fastlora.ops.dispatch import refuse_transforms
from fastlora.text.tokenizer import Tokenizer
from fastlora.text.tokenizer_files import check_output_folder

SAVE_METHOD = one_of("merged_16bit", "merged_4bit", "lora")

# Weights that a reader would prefer to, or apply to, the written ones.
_OTHER_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*", CONFIG_FILE)

_BASE_CHOICES = '"auto", "original", "dequantized" or the folder of the checkpoint in 16 bits'


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeReport:
    """How a model in 4 or 8 bits was merged, and how far the written folder is from it."""

    base: str  # "original" or "dequantized": the weights that the adapter was added to
    logit_difference: float  # largest difference of logits between model and folder, on 32 tokens


def save_merged(
    model: ModelState,
    folder: str | os.PathLike[str],
    tokenizer: Tokenizer | None = None,
    save_method: str = "merged_16bit",
    base: str | os.PathLike[str] = "auto",
) -> MergeReport | None:
    """Write a folder that transformers and fastlora load, with the adapter merged.

    The files replace older ones at the end and all together, so the disk needs room for both.
    Over a base that is sharded over ranks, every rank must call this. Rank 0 writes, and the others
    send it one layer at a time: twice all of the base, and a third time for the comparison.
    config.json keeps every field of the file that was read, except those that merging changes
    (dtype, vocab_size, tie_word_embeddings, quantization_config); generation_config.json stays.

    Args:
        model: without an adapter (after `merge`), its base is written.
        folder: created if it does not exist.
        tokenizer: written next to the model; None writes none.
        save_method:
            "merged_16bit": model.safetensors (shards with an index above 5 GB), config.json and
            generation_config.json. A bfloat16 or float16 base keeps its dtype. A wider one is
            rounded to bfloat16 once, after merging.
            "merged_4bit": the same with the projections in NF4 with double quantisation, as
            transformers writes it for bitsandbytes.
            "lora": the PEFT folder.
        base: only for a base in 4 or 8 bits: the projections that the adapter is added to.
            "original": those in 16 bits, from the folder that `load` was given, or from the folder
            given here. The result may be better, but is not the model that was trained.
            "dequantized": those that the model computes with. The result is the model that was
            trained, up to rounding.
            "auto": "original" if that folder still exists and matches, else "dequantized".

    Returns:
        For a quantised base that was merged, the base that was used and the largest difference
        between the logits of the model and of the written folder. Otherwise None.

    Raises:
        ValueError: before any file is written, if `save_method` is unknown, `base` has no meaning
            for this model, the adapter is a stack, a merged weight would be NaN or infinite, the
            model is a mixture and the method "merged_4bit", or the folder is a file, is read as the
            base, or holds other model files that a reader could mistake for this model's.
        FileNotFoundError: the original weights do not exist.
        CheckpointError: the original weights belong to another model.
        PermissionError: the folder cannot be written to.
    """
    refuse_transforms("Model.save_pretrained_merged")
    check_arguments("save_merged", save_method=(save_method, SAVE_METHOD))
    work = partial(_save_merged, model, folder, tokenizer, save_method, base)
    return on_first_rank(model.base, work)


def _save_merged(
    model: ModelState,
    folder: str | os.PathLike[str],
    tokenizer: Tokenizer | None,
    save_method: str,
    base: str | os.PathLike[str],
) -> MergeReport | None:
    """`save_merged` by the only process, or by the first of those that share a sharded base."""
    check_one_adapter(model)
    merges_quantized = is_quantized(model.base) and save_method != "lora"
    if base != "auto" and not merges_quantized:
        raise ValueError(
            f"base={base!r}: expected 'auto'. Other values choose the weights that are merged when"
            " the base is in 4 or 8 bits and save_method is not 'lora'."
        )
    # The tokenizer is written last, after hours perhaps.
    if tokenizer is not None:
        check_output_folder(Path(folder))
    if save_method == "lora":
        save_adapter(model, folder)
        base_used = None
    else:
        model = self_contained(model)
        in_4bit = save_method == "merged_4bit"
        base_used = _write_merged(model, writable_folder(folder, model.spec), base, in_4bit)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if base_used is None or not merges_quantized:
        return None
    # After the tokenizer: the folder is complete even if this comparison runs out of memory.
    difference = largest_difference(model, Path(folder))
    return MergeReport(base=base_used, logit_difference=difference)


def _write_merged(
    model: ModelState, folder: Path, base: str | os.PathLike[str], in_4bit: bool
) -> str:
    """Write weights and settings. Returns "original" or "dequantized"."""
    spec = model.spec
    if spec.lora is not None:
        require_adapter(model)
    # Merged folders are in 16 bits: one in float32 would be twice as large.
    base_dtype = model.base["norm"].dtype
    dtype = base_dtype if base_dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
    if in_4bit:
        check_quantizable(spec.config, [dtype])
    base_used, matrix_source = _matrix_source(model, base, folder)
    config, tensors, merged = merged_tensors(model, matrix_source)
    config = replace(config, dtype=str(dtype).removeprefix("torch."))

    def compute(name: str) -> Tensor:
        return (merged[name]() if name in merged else tensors[name]).detach().to(dtype)

    deferred = deferred_tensors(config, compute, dtype)
    to_4bit = projection_weights(config) if in_4bit else []
    sizes = {n: max_bytes_4bit(x) if n in to_4bit else tensor_bytes(x) for n, x in deferred.items()}
    shards = shard_tensors(sizes)
    # Before the first pass, which takes as long as the merge.
    written = {*shards, INDEX} if len(shards) > 1 else {*shards}
    if error := other_model_error(folder, _OTHER_WEIGHTS, written):
        raise error
    # Quantising a dequantised matrix again does not always give the same bytes, so weights without
    # an adapter are copied.
    keep = in_4bit and base_used == "dequantized"
    unchanged = unchanged_4bit(spec, tensors, dtype) if keep else {}
    statistics = finite_statistics(to_4bit, merged, compute, unchanged)
    entries = {n: file_tensors(n, x, statistics.get(n), unchanged) for n, x in deferred.items()}
    files = {f: {k: x for n in names for k, x in entries[n].items()} for f, names in shards.items()}
    parameters = sum(math.prod(x.shape) for x in deferred.values())
    config_json = config_to_json(config)
    if in_4bit:
        quantization = QUANTIZATION_CONFIG | {"bnb_4bit_compute_dtype": config.dtype}
        config_json = config_json | {"quantization_config": quantization}
    _replace_files(folder, files, parameters, generation_config_to_json(config), config_json)
    return base_used


def _replace_files(
    folder: Path,
    files: Mapping[str, Mapping[str, Tensor | Deferred]],
    parameters: int,
    generation: Mapping[str, Any],
    config: Mapping[str, Any],
) -> None:
    """Write weights, index and settings to a temporary sub-folder, then move them into place.

    An error while writing leaves the folder's old files unchanged. The old config.json is removed
    before the first move and the new one is moved last: if the process dies in between, the folder
    does not load, instead of loading a mixture of two models.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # In the same folder, because os.replace is atomic only within one file system.
    staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        for file, items in files.items():
            write_safetensors(staging / file, items)
        if len(files) > 1:
            total = sum(tensor_bytes(x) for items in files.values() for x in items.values())
            weight_map = {key: file for file, items in files.items() for key in items}
            # The two entries that transformers writes.
            metadata = {"total_size": total, "total_parameters": parameters}
            write_json(staging / INDEX, {"metadata": metadata, "weight_map": weight_map})
        write_json(staging / "generation_config.json", generation)
        write_json(staging / "config.json", config)
        names = sorted(path.name for path in staging.iterdir() if path.name != "config.json")
        (folder / "config.json").unlink(missing_ok=True)
        for name in (*names, "config.json"):
            os.replace(staging / name, folder / name)
        sync_folder(folder)
    finally:
        shutil.rmtree(staging)
        if not any(folder.iterdir()):  # created above; nothing was written
            folder.rmdir()


def _matrix_source(
    model: ModelState, base: str | os.PathLike[str], output: Path
) -> tuple[str, MatrixSource]:
    """("original" or "dequantized", the source of the projections that the adapter is added to)."""
    dequantized = "dequantized", dequantized_matrices(model.base["norm"].dtype)
    if base == "dequantized" or not is_quantized(model.base):
        return dequantized
    try:
        # A folder of one of these names is reached as "./original".
        named = isinstance(base, str) and base in ("auto", "original")
        folder = source_folder(model.spec) if named else _given_folder(base)
        original = unquantized_matrices(model.spec.config, folder, model.base)
    except (FileNotFoundError, CheckpointError) as error:
        if base == "auto":
            return dequantized
        raise type(error)(f"base={base!r}: {error} Or pass {_BASE_CHOICES}.") from error
    # The matrices are read while the folder is written.
    if output.resolve() == folder.resolve():
        raise ValueError(f"{output} is where the original matrices are read from; choose another.")
    return "original", original


def _given_folder(base: Any) -> Path:
    if not isinstance(base, str | os.PathLike) or not os.fspath(base):
        raise ValueError(f"base={base!r:.200}: expected {_BASE_CHOICES}.")
    if not Path(base).is_dir():
        raise FileNotFoundError(f"no such folder: {os.fspath(base)!r:.200}.")
    return Path(base)
