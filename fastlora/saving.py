"""save_merged(): a model out to a Hugging Face folder, its adapter folded in, in 16 or 4 bits."""

import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils._pytree import tree_map

from fastlora import functional
from fastlora.atomic import sync_folder
from fastlora.bases import Matrices, dequantized, original, read_base, source_folder
from fastlora.checkpoint import INDEX, WEIGHTS, Deferred, write_json, write_safetensors
from fastlora.checks import CheckpointError, raise_problems
from fastlora.expert_keys import pieces
from fastlora.export import CONFIG_FILE, save_adapter, writable
from fastlora.llama.config import LlamaConfig
from fastlora.llama.params import (
    Adapter,
    Base,
    is_quantized,
    projection_path,
    projection_weights,
)
from fastlora.llama.spec import Spec
from fastlora.llama.start import equivalent, without_start
from fastlora.merging import merged_tensors, present
from fastlora.originals import with_originals
from fastlora.quantized import BLOCK, NestedAbsmax, Weight4bit, quant_type, quantize_4bit
from fastlora.quantized_keys import QUANTIZATION_CONFIG, check_quantizable, stored_tensors
from fastlora.tokenizer import Tokenizer

SHARD_BYTES = 5_000_000_000  # transformers' own limit
METHODS = ("merged_16bit", "merged_4bit", "lora")


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeReport:
    """What became of a model in 4 or 8 bits that was saved merged."""

    base: str  # "original" or "dequantized": what the adapter was added to
    logit_difference: float  # largest, between this model and the folder read back, on 32 tokens


def save_merged(
    spec: Spec,
    base: Base,
    adapter: Adapter | None,
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
        spec: of the model.
        base: its own.
        adapter: to be folded in; None writes the base.
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
    if matrices != "auto" and not (is_quantized(base) and save_method != "lora"):
        raise ValueError(
            f"base={matrices!r}: this says what to add the adapter of a model in 4 or 8 bits to"
            " when it is merged; leave it out here."
        )
    spec, adapter = equivalent(spec, base, adapter)
    if save_method == "lora":
        save_adapter(spec, base, adapter, folder)
        taken = None
    else:
        base = without_start(base)  # the adapter counts from it now
        in_4bit = save_method == "merged_4bit"
        taken = _write_merged(spec, base, adapter, writable(folder, spec), matrices, in_4bit)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if taken is None or not is_quantized(base):
        return None
    difference = _difference(spec, base, adapter, Path(folder))
    return MergeReport(base=taken, logit_difference=difference)


def _write_merged(
    spec: Spec,
    base: Base,
    adapter: Adapter | None,
    folder: Path,
    matrices: str | os.PathLike[str],
    in_4bit: bool,
) -> str:
    """Write the folder; gives what the adapter was added to."""
    if spec.lora is not None:
        present(spec, adapter)
    own = base["norm"].dtype
    dtype = own if own in (torch.bfloat16, torch.float16) else torch.bfloat16
    if in_4bit:
        check_quantizable(spec.config, [dtype])
    taken, matrix = _matrices(spec, base, matrices, folder)
    config, tensors, folded = merged_tensors(spec, base, adapter, matrix)
    config = replace(config, dtype=str(dtype).removeprefix("torch."))

    def make(name: str) -> Tensor:
        return (folded[name]() if name in folded else tensors[name]).detach().to(dtype)

    stored = _stored(config, make, dtype)
    packed = projection_weights(config) if in_4bit else []
    sizes = {n: _most_in_4bit(x) if n in packed else _size(x) for n, x in stored.items()}
    shards = _shards(sizes)
    _check_no_other_model(folder, {*shards, INDEX} if len(shards) > 1 else {*shards})
    kept = _untouched(spec, tensors, dtype) if in_4bit and taken == "dequantized" else {}
    parts = _finite_parts(packed, folded, make, kept)
    groups = {n: _in_4bit(n, x, parts.get(n), kept.get(n)) for n, x in stored.items()}
    files = {f: {k: x for n in names for k, x in groups[n].items()} for f, names in shards.items()}
    count = sum(math.prod(x.shape) for x in stored.values())
    quantization = QUANTIZATION_CONFIG | {"bnb_4bit_compute_dtype": config.dtype}
    more = {"quantization_config": quantization} if in_4bit else {}
    _write_together(folder, files, count, _generation_config(config), config.to_hf() | more)
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
            total = sum(_size(x) for items in files.values() for x in items.values())
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


def _untouched(spec: Spec, tensors: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Weight4bit]:
    """Name -> record, of what is in NF4 as it would be written, and has no adapter."""
    targets = () if spec.lora is None else enumerate(spec.lora.targets)
    adapted = {f"{projection_path(i, t.name)}.weight" for i, ts in targets for t in ts}
    return {
        name: x
        for name, x in tensors.items()
        if isinstance(x, Weight4bit)
        and name not in adapted
        and isinstance(x.absmax, NestedAbsmax)
        and (quant_type(x), x.form.shape[2], x.form.dtype) == ("nf4", BLOCK, dtype)
    }


def _stored(
    config: LlamaConfig, make: Callable[[str], Tensor], dtype: torch.dtype
) -> dict[str, Deferred]:
    """Name in the file -> its tensor, made when it is written."""
    kept = lru_cache(maxsize=2)(make)  # of a mixture's two tensors, whose experts alternate

    def deferred(name: str, index: tuple[Any, ...], shape: tuple[int, ...]) -> Deferred:
        read = (lambda: kept(name)[index]) if index else (lambda: make(name))
        return Deferred(dtype, shape, read)

    return {key: deferred(*piece) for key, piece in pieces(config).items()}


def _size(item: Tensor | Deferred) -> int:
    return math.prod(item.shape) * item.dtype.itemsize


def _most_in_4bit(item: Deferred) -> int:
    """Bytes of a matrix in 4 bits, statistics, tables and text included, at most."""
    return math.prod(item.shape) * 17 // 32 + 4096


def _finite_parts(
    packed: Sequence[str],
    folded: Iterable[str],
    make: Callable[[str], Tensor],
    kept: Mapping[str, Weight4bit],
) -> dict[str, dict[str, Tensor]]:
    """Name -> what stands beside its bytes, for what will be `packed` in 4 bits; on the host.

    Raises:
        ValueError: naming every tensor, of these and the merged ones, that holds NaN or infinity.
    """
    broken, parts = [], {}
    for name in dict.fromkeys((*packed, *folded)):
        record = kept.get(name)
        if record is None:
            tensor = make(name)
            if not tensor.isfinite().all():
                broken.append(name)
                continue
            record = quantize_4bit(tensor) if name in packed else None
        if record is not None:
            found = stored_tensors(name, record)
            parts[name] = {key: x.cpu() for key, x in found.items() if key != name}
    cure = "The adapter is broken (a diverged run?), or its dtype is too narrow for the sum."
    raise_problems(ValueError, "Merging would put NaN or infinity into:", broken, cure)
    return parts


def _in_4bit(
    name: str,
    whole: Deferred,
    parts: Mapping[str, Tensor] | None,
    kept: Weight4bit | None,
) -> dict[str, Tensor | Deferred]:
    """Key -> what is written of one tensor: itself, or its bytes and what stands beside them."""
    if parts is None:
        return {name: whole}
    shape = ((math.prod(whole.shape) + 1) // 2, 1)

    def packed() -> Tensor:
        return (quantize_4bit(whole.make()) if kept is None else kept).packed.unsqueeze(1)

    return {name: Deferred(torch.uint8, shape, packed), **parts}


def _shards(sizes: Mapping[str, int]) -> dict[str, list[str]]:
    """File name -> the tensors in it, in order, at most SHARD_BYTES of data each."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > SHARD_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    n = len(groups)
    return {f"model-{i:05d}-of-{n:05d}.safetensors": g for i, g in enumerate(groups, 1)}


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


# ── read back ─────────────────────────────────────────────────────────────────────────────


class _LayerByLayer(Sequence):
    """Layers of a mapped file, of which one at a time is on a device."""

    def __init__(self, layers: Sequence[Any], device: torch.device):
        self.layers, self.device = layers, device

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, i: Any) -> Any:
        return tree_map(lambda x: x.to(self.device), self.layers[i])


def _difference(spec: Spec, base: Base, adapter: Adapter | None, folder: Path) -> float:
    """Largest difference of logits between a model and what a folder holds."""
    device = base["norm"].device
    config, found = read_base(folder)
    ends: Any = {k: x.to(device) for k, x in found.items() if isinstance(x, Tensor)}
    again = cast(Base, ends | {"layers": _LayerByLayer(found["layers"], device)})
    plain = replace(spec, compile=False)
    ids = _few_tokens(spec).to(device)
    with torch.no_grad():
        ours = functional.forward(adapter, with_originals(base), plain, ids)
        theirs = functional.forward(None, again, replace(plain, config=config, lora=None), ids)
    return float((ours.double() - theirs.double()).abs().max())


def _few_tokens(spec: Spec) -> Int[Tensor, "1 t"]:
    """Ids from all over the vocabulary, the same every time."""
    t = min(32, spec.max_seq_length)
    return (7919 * torch.arange(1, t + 1) % spec.config.vocab_size)[None]
