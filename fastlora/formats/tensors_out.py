"""tensors_out."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastlora.checkpoints.bnb_format import stored_tensors
from fastlora.checkpoints.expert_layout import pieces
from fastlora.checkpoints.tensors import WEIGHTS, Deferred
from fastlora.errors import raise_problems
from fastlora.models.config import LlamaConfig
from fastlora.models.names import projection_path
from fastlora.models.spec import Spec
from fastlora.ops.quant.bitsandbytes import quantize_4bit
from fastlora.ops.quant.weights import BLOCK, NestedAbsmax, Weight4bit, quant_type

SHARD_BYTES = 5_000_000_000  # transformers' own limit


def is_unchanged(
    spec: Spec, tensors: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, Weight4bit]:
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


def dense_tensors(
    config: LlamaConfig, make: Callable[[str], Tensor], dtype: torch.dtype
) -> dict[str, Deferred]:
    """Name in the file -> its tensor, made when it is written."""
    kept = lru_cache(maxsize=2)(make)  # of a mixture's two tensors, whose experts alternate

    def deferred(name: str, index: tuple[Any, ...], shape: tuple[int, ...]) -> Deferred:
        read = (lambda: kept(name)[index]) if index else (lambda: make(name))
        return Deferred(dtype, shape, read)

    return {key: deferred(*piece) for key, piece in pieces(config).items()}


def tensor_bytes(item: Tensor | Deferred) -> int:
    return math.prod(item.shape) * item.dtype.itemsize


def mostly_4bit(item: Deferred) -> int:
    """Bytes of a matrix in 4 bits, statistics, tables and text included, at most."""
    return math.prod(item.shape) * 17 // 32 + 4096


def finite_parts(
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


def packed_parts(
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


def shard_tensors(sizes: Mapping[str, int]) -> dict[str, list[str]]:
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
