"""The tensors of a merged folder: computed one at a time while they are written.

A merged model is as large as the base, and may not fit beside it. So each merged tensor is computed
twice: once to check that it is finite, before any file is written, and once to write it. In between
only its dtype and shape are kept (`Deferred`). For a 4-bit weight the first pass also keeps scales
and quant_state (1 % of the 16-bit size); the second pass gives the packed bytes.
"""

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
from fastlora.models.lazy_tensors import LazyTensors
from fastlora.models.names import projection_path
from fastlora.models.spec import Spec
from fastlora.ops.quant.bitsandbytes import quantize_4bit
from fastlora.ops.quant.weights import BLOCK, NestedAbsmax, Weight4bit, quant_type

SHARD_BYTES = 5_000_000_000  # transformers' limit


def deferred_tensors(
    config: LlamaConfig, compute: Callable[[str], Tensor], dtype: torch.dtype
) -> dict[str, Deferred]:
    """Key in the file -> deferred tensor, for a model in 16 bits.

    Args:
        config: of the merged model.
        compute: name on disk -> the merged tensor, computed again at every call.
        dtype: of the tensors that `compute` returns.
    """
    # Files store the experts of a mixture one by one. write_safetensors goes by name, so the pieces
    # come in turn from the two tensors of a layer's experts: w1 (gate_up), w2 (down), w3 (gate_up),
    # then the next expert. Keeping the last two results computes each of the two tensors once, not
    # once per piece.
    compute_or_reuse = lru_cache(maxsize=2)(compute)

    def deferred(name: str, index: tuple[Any, ...], shape: tuple[int, ...]) -> Deferred:
        if index:
            return Deferred(dtype, shape, lambda: compute_or_reuse(name)[index])
        return Deferred(dtype, shape, lambda: compute(name))

    return {key: deferred(*piece) for key, piece in pieces(config).items()}


def unchanged_4bit(
    spec: Spec, tensors: Mapping[str, Any], dtype: torch.dtype
) -> Mapping[str, Weight4bit]:
    """Name on disk -> weight, for the base's weights that a 4-bit folder can hold unchanged.

    They have no adapter and are already in the format that is written: NF4 with double
    quantisation, blocks of 64, and `dtype` when dequantised.
    """
    targets = () if spec.lora is None else enumerate(spec.lora.targets)
    adapted = {f"{projection_path(i, t.name)}.weight" for i, ts in targets for t in ts}
    names = [
        name
        for name, x in tensors.items()
        if isinstance(x, Weight4bit)
        and name not in adapted
        and isinstance(x.absmax, NestedAbsmax)
        and (quant_type(x), x.form.shape[2], x.form.dtype) == ("nf4", BLOCK, dtype)
    ]
    # Looked up again when they are written: layers of a sharded base are fetched one at a time.
    return LazyTensors(names, tensors.__getitem__)


def finite_statistics(
    to_4bit: Sequence[str],
    merged: Iterable[str],
    compute: Callable[[str], Tensor],
    unchanged: Mapping[str, Weight4bit],
) -> dict[str, dict[str, Tensor]]:
    """The first pass: compute every tensor once and check that it is finite.

    Args:
        to_4bit: names on disk of the tensors that are written in 4 bits.
        merged: names on disk of the tensors that differ from the base's.
        compute: name on disk -> the merged tensor.
        unchanged: weights from `unchanged_4bit`, which are not computed.

    Returns:
        Name -> key in the file -> tensor on the CPU: for each of `to_4bit`, the tensors that are
        stored beside its packed bytes.

    Raises:
        ValueError: naming every tensor that holds NaN or infinity.
    """
    broken, statistics = [], {}
    for name in dict.fromkeys((*to_4bit, *merged)):
        weight = unchanged.get(name)
        if weight is None:
            tensor = compute(name)
            if not tensor.isfinite().all():
                broken.append(name)
                continue
            weight = quantize_4bit(tensor) if name in to_4bit else None
        if weight is not None:
            stored = stored_tensors(name, weight)
            statistics[name] = {key: x.cpu() for key, x in stored.items() if key != name}
    cure = "The adapter is broken (a diverged run?), or its dtype is too narrow for the sum."
    raise_problems(ValueError, "Merging would put NaN or infinity into:", broken, cure)
    return statistics


def file_tensors(
    name: str,
    tensor: Deferred,
    statistics: Mapping[str, Tensor] | None,
    unchanged: Mapping[str, Weight4bit],
) -> dict[str, Tensor | Deferred]:
    """Key in the file -> tensor, for one tensor of the model: one key, or those of a 4-bit weight.

    Args:
        name: the tensor's key.
        tensor: in 16 bits.
        statistics: from `finite_statistics`; None writes 16 bits.
        unchanged: weights from `unchanged_4bit`.
    """
    if statistics is None:
        return {name: tensor}
    shape = ((math.prod(tensor.shape) + 1) // 2, 1)  # two values a byte

    def packed_bytes() -> Tensor:
        weight = unchanged[name] if name in unchanged else quantize_4bit(tensor.compute())
        return weight.packed.unsqueeze(1)

    return {name: Deferred(torch.uint8, shape, packed_bytes), **statistics}


def tensor_bytes(item: Tensor | Deferred) -> int:
    """Bytes of a tensor's elements."""
    return math.prod(item.shape) * item.dtype.itemsize


def max_bytes_4bit(item: Deferred) -> int:
    """Upper bound of the bytes of a matrix in 4 bits with its statistics, levels and text."""
    return math.prod(item.shape) * 17 // 32 + 4096


def shard_tensors(sizes: Mapping[str, int]) -> dict[str, list[str]]:
    """File name -> names of its tensors, in order, so that no file exceeds SHARD_BYTES of data.

    Args:
        sizes: name -> bytes.
    """
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
