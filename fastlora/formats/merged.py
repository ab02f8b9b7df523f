"""save_merged(): a model out to a Hugging Face folder, its adapter folded in, in 16 or 4 bits."""

import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlora.adapters.edits.merging import merged_tensors
from fastlora.checkpoints.atomic import sync_folder
from fastlora.checkpoints.bnb_format import QUANTIZATION_CONFIG, check_quantizable
from fastlora.checkpoints.originals import Matrices, dequantized, original, source_folder
from fastlora.checkpoints.output_folders import writable
from fastlora.checkpoints.tensors import INDEX, Deferred, write_json, write_safetensors
from fastlora.errors import CheckpointError, raise_problems
from fastlora.formats.peft.writing import CONFIG_FILE, save_adapter
from fastlora.formats.read_back import largest_difference
from fastlora.formats.tensors_out import (
    dense_tensors,
    finite_parts,
    is_unchanged,
    mostly_4bit,
    packed_parts,
    shard_tensors,
    tensor_bytes,
)
from fastlora.models.config import LlamaConfig
from fastlora.models.config_json import config_to_json
from fastlora.models.names import projection_weights
from fastlora.models.params import Base, is_quantized
from fastlora.models.self_contained import self_contained
from fastlora.models.spec import Spec
from fastlora.models.state import ModelState, require_adapter
from fastlora.text.tokenizer import Tokenizer

METHODS = ("merged_16bit", "merged_4bit", "lora")


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeReport:
    """What became of a model in 4 or 8 bits that was saved merged."""

    base: str  # "original" or "dequantized": what the adapter was added to
    logit_difference: float  # largest, between this model and the folder read back, on 32 tokens


def save_merged(
    model: ModelState,
    folder: str | os.PathLike[str],
    tokenizer: Tokenizer | None = None,
    save_method: str = "merged_16bit",
    matrices: str | os.PathLike[str] = "auto",
) -> MergeReport | None:
    """Write a folder that transformers and fastlora load, with the adapter folded in.

    "merged_16bit" writes model.safetensors (shards with an index above 5 GB), config.json,
    generation_config.json and the tokenizer's files. A bfloat16 or float16 base keeps its dtype, a
    wider one is rounded to bfloat16, once, after the merge. "merged_4bit" puts the projections of
    that into NF4 with double quantisation, as transformers writes it for bitsandbytes. One tensor
    at a time is made, twice: to see that it is finite, and to be written. The files take the place
    of older ones together, when all are whole: the disk holds both for a moment. Without an adapter
    (after `merge`) the base is written. "lora" writes the PEFT folder and the tokenizer's files.

    A base in 4 or 8 bits has lost what its checkpoint had. The adapter is added to the projections
    in 16 bits that it was quantised from ("original"), which may be better and is not the model
    that was trained, or to those that it computes with ("dequantized"), which is, up to rounding.
    All else is the base's own.

    Args:
        model: without an adapter its base is written.
        folder: is made if need be.
        tokenizer: written beside the model.
        save_method: "merged_16bit", "merged_4bit" or "lora".
        matrices: of a quantised base: "original", from what `load` was given; "dequantized"; the
            folder of the checkpoint in 16 bits; or "auto": the original where it is still at hand.

    Returns:
        For a quantised base, which matrices were taken, and how far the folder, read back, is from
        the model; else None.

    Raises:
        ValueError: before any file is written, if a merged weight would be NaN or infinite, the
            folder is a file or the one the base was loaded or is to be read from, or holds other
            model files that a reader might take for this model's; for a mixture in "merged_4bit".
        FileNotFoundError: the original matrices are not there.
        CheckpointError: they are others.
        PermissionError: if the folder cannot be written to.
    """
    if save_method not in METHODS:
        raise ValueError(f"save_method={save_method!r}: expected one of {list(METHODS)}.")
    if matrices != "auto" and not (is_quantized(model.base) and save_method != "lora"):
        raise ValueError(
            f"base={matrices!r}: this says what to add the adapter of a model in 4 or 8 bits to"
            " when it is merged; leave it out here."
        )
    if save_method == "lora":
        save_adapter(model, folder)
        taken = None
    else:
        model = self_contained(model)
        in_4bit = save_method == "merged_4bit"
        taken = _write_merged(model, writable(folder, model.spec), matrices, in_4bit)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if taken is None or not is_quantized(model.base):
        return None
    difference = largest_difference(model, Path(folder))
    return MergeReport(base=taken, logit_difference=difference)


def _write_merged(
    model: ModelState,
    folder: Path,
    matrices: str | os.PathLike[str],
    in_4bit: bool,
) -> str:
    """Write the folder; gives what the adapter was added to."""
    spec, base = model.spec, model.base
    if spec.lora is not None:
        require_adapter(model)
    own = base["norm"].dtype
    dtype = own if own in (torch.bfloat16, torch.float16) else torch.bfloat16
    if in_4bit:
        check_quantizable(spec.config, [dtype])
    taken, matrix = _matrices(spec, base, matrices, folder)
    config, tensors, folded = merged_tensors(model, matrix)
    config = replace(config, dtype=str(dtype).removeprefix("torch."))

    def make(name: str) -> Tensor:
        return (folded[name]() if name in folded else tensors[name]).detach().to(dtype)

    stored = dense_tensors(config, make, dtype)
    packed = projection_weights(config) if in_4bit else []
    sizes = {n: mostly_4bit(x) if n in packed else tensor_bytes(x) for n, x in stored.items()}
    shards = shard_tensors(sizes)
    _check_no_other_model(folder, {*shards, INDEX} if len(shards) > 1 else {*shards})
    kept = is_unchanged(spec, tensors, dtype) if in_4bit and taken == "dequantized" else {}
    parts = finite_parts(packed, folded, make, kept)
    groups = {n: packed_parts(n, x, parts.get(n), kept.get(n)) for n, x in stored.items()}
    files = {f: {k: x for n in names for k, x in groups[n].items()} for f, names in shards.items()}
    count = sum(math.prod(x.shape) for x in stored.values())
    quantization = QUANTIZATION_CONFIG | {"bnb_4bit_compute_dtype": config.dtype}
    more = {"quantization_config": quantization} if in_4bit else {}
    _write_together(folder, files, count, _generation_config(config), config_to_json(config) | more)
    return taken


def _write_together(
    folder: Path,
    files: Mapping[str, Mapping[str, Tensor | Deferred]],
    count: int,
    generation: Mapping[str, Any],
    config: Mapping[str, Any],
) -> None:
    """Write weights, index and settings beside the folder's files, then put them in their place.

    A failure leaves what was there. An older config.json goes first and the new one comes last:
    between the two, the folder is no model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        for file, items in files.items():
            write_safetensors(staging / file, items)
        if len(files) > 1:
            total = sum(tensor_bytes(x) for items in files.values() for x in items.values())
            weight_map = {key: file for file, items in files.items() for key in items}
            metadata = {"total_size": total, "total_parameters": count}
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
        if not any(folder.iterdir()):  # made here, for nothing
            folder.rmdir()


def _matrices(
    spec: Spec, base: Base, given: str | os.PathLike[str], to: Path
) -> tuple[str, Matrices]:
    """(what the adapter is added to, the function that gives it)."""
    dequantised = "dequantized", dequantized(base["norm"].dtype)
    if given == "dequantized" or not is_quantized(base):
        return dequantised
    try:
        named = isinstance(given, str) and given in ("auto", "original")
        folder = source_folder(spec) if named else _given_folder(given)
        found = original(spec.config, folder, base)
    except (FileNotFoundError, CheckpointError) as error:
        if given == "auto":
            return dequantised
        raise type(error)(f"base={given!r}: {error} Or take {_CHOICES}.") from error
    if to.resolve() == folder.resolve():
        raise ValueError(f"{to} is where the original matrices are read from; choose another.")
    return "original", found


_CHOICES = '"auto", "original", "dequantized" or the folder of the checkpoint in 16 bits'


def _given_folder(given: Any) -> Path:
    if not isinstance(given, str | os.PathLike) or not os.fspath(given):
        raise ValueError(f"base={given!r:.200}: expected {_CHOICES}.")
    if not Path(given).is_dir():
        raise FileNotFoundError(f"no such folder: {os.fspath(given)!r:.200}.")
    return Path(given)


def _generation_config(config: LlamaConfig) -> dict[str, Any]:
    eos = config.eos_token_id
    ids = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos),
        "pad_token_id": config.pad_token_id,
    }
    return {name: value for name, value in ids.items() if value not in (None, [])}


def _check_no_other_model(folder: Path, ours: set[str]) -> None:
    """Refuse a folder with weights that readers would prefer, or lay over, the ones written."""
    kinds = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*", CONFIG_FILE)
    others = sorted({p.name for kind in kinds for p in folder.glob(kind)} - ours)
    cure = "Choose an empty folder, or delete these files first."
    raise_problems(ValueError, f"{folder} holds files of another model:", others, cure)
