"""save_merged(): a model out to a Hugging Face folder, its adapter folded in, in 16 or 4 bits."""

import math
import os
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
from fastlora.bases import Matrices, dequantized, original, read_base
from fastlora.checkpoint import INDEX, WEIGHTS, Deferred, write_json, write_safetensors
from fastlora.checks import CheckpointError, raise_problems
from fastlora.expert_keys import pieces
from fastlora.export import CONFIG_FILE, save_adapter, writable
from fastlora.llama.config import LlamaConfig
from fastlora.llama.params import Adapter, Base, is_quantized, projection_weights
from fastlora.llama.spec import Spec
from fastlora.llama.start import equivalent
from fastlora.merging import merged_tensors, present
from fastlora.originals import with_originals
from fastlora.quantized import quantize_4bit
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
    at a time is made, twice: to see that it is finite, and to be written. Without an adapter (after
    `merge`) the base is written. "lora" writes the PEFT folder and the tokenizer's files.

    A base in 4 or 8 bits has lost what its checkpoint had. The adapter is added to the matrices in
    16 bits that it was quantised from ("original"), which may be better and is not the model that
    was trained, or to those that it computes with ("dequantized"), which is, up to rounding.

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
            folder is a file or the one the base was loaded from, or holds other model files that a
            reader might take for this model's; for a mixture in "merged_4bit".
        FileNotFoundError: the original matrices are not there.
        CheckpointError: they are others.
        PermissionError: if the folder cannot be written to.
    """
    if save_method not in METHODS:
        raise ValueError(f"save_method={save_method!r}: expected one of {list(METHODS)}.")
    if matrices != "auto" and not (is_quantized(base) and save_method != "lora"):
        raise ValueError(
            f"base={os.fspath(matrices)!r}: this says what to add the adapter of a model in 4 or 8"
            " bits to when it is merged; leave it out here."
        )
    whole, joined = equivalent(spec, base, adapter)
    if save_method == "lora":
        save_adapter(whole, base, joined, folder)
        report = None
    else:
        in_4bit = save_method == "merged_4bit"
        report = _save_merged(whole, base, joined, writable(folder, spec), matrices, in_4bit)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return report


def _save_merged(
    spec: Spec,
    base: Base,
    adapter: Adapter | None,
    folder: Path,
    matrices: str | os.PathLike[str],
    in_4bit: bool,
) -> MergeReport | None:
    if spec.lora is not None:
        present(spec, adapter)
    own = base["norm"].dtype
    dtype = own if own in (torch.bfloat16, torch.float16) else torch.bfloat16
    if in_4bit:
        check_quantizable(spec.config, [dtype])
    taken, matrix = _matrices(spec, base, matrices)
    config, tensors, folded = merged_tensors(spec, base, adapter, matrix)
    config = replace(config, dtype=str(dtype).removeprefix("torch."))

    def make(name: str) -> Tensor:
        return (folded[name]() if name in folded else tensors[name]).detach().to(dtype)

    stored = _stored(config, make, dtype)
    packed = projection_weights(config) if in_4bit else []
    sizes = {n: _most_in_4bit(x) if n in packed else _size(x) for n, x in stored.items()}
    shards = _shards(sizes)
    _check_no_other_model(folder, {*shards, INDEX} if len(shards) > 1 else {*shards})
    beside = _checked(packed, folded, make)
    groups = {name: _in_4bit(name, stored[name], beside.get(name)) for name in stored}

    folder.mkdir(parents=True, exist_ok=True)
    files = {f: {k: x for n in names for k, x in groups[n].items()} for f, names in shards.items()}
    for file, items in files.items():
        write_safetensors(folder / file, items)
    if len(files) > 1:
        total = sum(_size(x) for items in files.values() for x in items.values())
        count = sum(math.prod(x.shape) for x in stored.values())
        weight_map = {key: file for file, items in files.items() for key in items}
        metadata = {"total_size": total, "total_parameters": count}
        write_json(folder / INDEX, {"metadata": metadata, "weight_map": weight_map})
    write_json(folder / "generation_config.json", _generation_config(config))
    # Last: a folder without it is no model, so a killed run leaves none that is half there.
    quantization = QUANTIZATION_CONFIG | {"bnb_4bit_compute_dtype": config.dtype}
    more = {"quantization_config": quantization} if in_4bit else {}
    write_json(folder / "config.json", config.to_hf() | more)
    if not is_quantized(base):
        return None
    return MergeReport(base=taken, logit_difference=_difference(spec, base, adapter, folder))


def _matrices(spec: Spec, base: Base, given: str | os.PathLike[str]) -> tuple[str, Matrices]:
    """(what the adapter is added to, the function that gives it)."""
    dtype = base["norm"].dtype
    if given == "dequantized" or not is_quantized(base):
        return "dequantized", dequantized(dtype)
    name = spec.name_or_path if given in ("auto", "original") else os.fspath(given)
    try:
        return "original", original(spec.config, name, dtype)
    except (FileNotFoundError, CheckpointError):
        if given != "auto":
            raise
        return "dequantized", dequantized(dtype)


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


def _checked(
    packed: Sequence[str], folded: Iterable[str], make: Callable[[str], Tensor]
) -> dict[str, dict[str, Tensor]]:
    """Name -> what stands beside its bytes, for what will be `packed` in 4 bits; on the host.

    Raises:
        ValueError: naming every tensor, of these and the merged ones, that holds NaN or infinity.
    """
    broken, beside = [], {}
    for name in dict.fromkeys((*packed, *folded)):
        tensor = make(name)
        if not tensor.isfinite().all():
            broken.append(name)
        elif name in packed:
            parts = stored_tensors(name, quantize_4bit(tensor))
            beside[name] = {key: x.cpu() for key, x in parts.items() if key != name}
    cure = "The adapter is broken (a diverged run?), or its dtype is too narrow for the sum."
    raise_problems(ValueError, "Merging would put NaN or infinity into:", broken, cure)
    return beside


def _in_4bit(
    name: str, whole: Deferred, beside: Mapping[str, Tensor] | None
) -> dict[str, Tensor | Deferred]:
    """Key -> what is written of one tensor: itself, or its bytes and what stands beside them."""
    if beside is None:
        return {name: whole}
    shape = ((math.prod(whole.shape) + 1) // 2, 1)
    packed = lambda: quantize_4bit(whole.make()).packed.unsqueeze(1)
    return {name: Deferred(torch.uint8, shape, packed), **beside}


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
