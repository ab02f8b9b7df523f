"""Start factors: what an initialisation took out of a base, kept beside it.

PiSSA, OLoRA, LoftQ, CorDA and LoRA-GA fill A and B with some A0 and B0 that are not zero, and PEFT
subtracts s B0 A0 from W, so that the sum is still W. A base in 16 or 4 bits rounds that difference.
Here W stays the tensor that it is, and A0 and B0, frozen, stand in its linear layer as "offset":

    y = W x + s (B A - B0 A0) x

which is one low-rank product of twice the rank, of [A; A0] and [B, -B0]. Over W itself these are an
ordinary adapter: what is saved, merged and combined (`equivalent`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from fastlora.models.params import (
    PROJECTIONS,
    Adapter,
    AdapterRecord,
    Base,
    LayerParams,
    Linear,
    LoRA,
)
from fastlora.models.spec import LoraConfig, Spec, Target
from fastlora.ops.cast import cast


def offsets(params: LayerParams) -> dict[str, LoRA]:
    """Projection name -> start factors, for the projections of one layer that have them."""
    linears = {name: params[name] for name in PROJECTIONS if name in params}
    return {name: linear["offset"] for name, linear in linears.items() if "offset" in linear}


def has_offset(base: Base) -> bool:
    """Whether any projection of the base has an initial offset."""
    return any(map(offsets, base["layers"]))


def with_offset(base: Base, layers: Sequence[Mapping[str, LoRA]]) -> Base:
    """The base with these start factors and no others. No tensor is copied."""
    plain = without_offset(base)
    params = tuple(
        _replaced(params, found) for params, found in zip(plain["layers"], layers, strict=True)
    )
    return _with_layers(plain, params)


def without_offset(base: Base) -> Base:
    """The base alone, over the same tensors; itself where there are no start factors."""
    if not has_offset(base):
        return base
    drop = lambda linear: {key: x for key, x in linear.items() if key != "offset"}
    layers = tuple(p | {name: drop(p[name]) for name in offsets(p)} for p in base["layers"])
    return _with_layers(base, layers)


def _with_layers(base: Base, layers: tuple[LayerParams, ...]) -> Base:
    whole = base.copy()
    whole["layers"] = layers
    return whole


def cast_offset(params: LayerParams, dtype: torch.dtype) -> LayerParams:
    """One layer with its start factors in `dtype`; itself where all are already."""
    found = offsets(params)
    narrow = cast(found, dtype)
    return params if narrow is found else _replaced(params, narrow)


def _replaced(params: LayerParams, found: Mapping[str, LoRA]) -> LayerParams:
    return params | {name: {**params[name], "offset": lora} for name, lora in found.items()}


def a_with_offset(lora: AdapterRecord, linear: Linear) -> Float[Tensor, "_ d_in"]:
    """What multiplies x: A, or [A; A0]."""
    return torch.cat([lora.a, linear["offset"].a]) if "offset" in linear else lora.a


def b_with_offset(lora: AdapterRecord, linear: Linear) -> Float[Tensor, "d_out _"]:
    """What multiplies the low-rank product: B, or [B, -B0]."""
    return torch.cat([lora.b, -linear["offset"].b], dim=1) if "offset" in linear else lora.b


def rank_with_offset(lora: AdapterRecord, linear: Linear) -> int:
    """Columns of the low-rank product."""
    return lora.a.shape[0] + (linear["offset"].a.shape[0] if "offset" in linear else 0)


def fold_into_adapter(adapter: Adapter, base: Base) -> Adapter:
    """The adapter of twice the rank that does over the base alone what this one does over its
    start factors. Gradients flow to the given adapter."""

    def whole(lora: AdapterRecord, linear: Linear) -> AdapterRecord:
        return lora._replace(a=a_with_offset(lora, linear), b=b_with_offset(lora, linear))

    layers = tuple(
        {
            name: whole(lora, params[name]) if name in params else lora
            for name, lora in loras.items()
        }
        for loras, params in zip(adapter["layers"], base["layers"], strict=True)
    )
    return Adapter(**adapter | {"layers": layers})


def unfold_offset(whole: Adapter, adapter: Adapter) -> list[dict[str, LoRA]]:
    """The start factors in a `joined` adapter: what is there beside the adapter itself."""

    def rest(both: AdapterRecord, lora: AdapterRecord) -> LoRA:
        r = lora.a.shape[0]
        return LoRA(both.a[r:], -both.b[:, r:])

    pairs = zip(whole["layers"], adapter["layers"], strict=True)
    return [{name: rest(both[name], lora) for name, lora in own.items()} for both, own in pairs]


def fold_offset(spec: Spec, base: Base, adapter: Adapter | None) -> tuple[Spec, Adapter | None]:
    """(spec, adapter) that mean over `without_start(base)` what the given ones mean over base.

    The very same where there are no start factors.
    """
    if adapter is None or spec.lora is None or not has_offset(base):
        return spec, adapter
    return replace(spec, lora=double_rank(spec.lora)), fold_into_adapter(adapter, base)


def double_rank(lora: LoraConfig) -> LoraConfig:
    """The settings at twice the rank and the same scaling; their A and B count from the base."""
    grown = math.sqrt(2) if lora.use_rslora else 2

    def twice(t: Target) -> Target:
        return replace(t, r=2 * t.r, lora_alpha=grown * t.lora_alpha)

    return replace(
        lora,
        r=2 * lora.r,
        lora_alpha=grown * lora.lora_alpha,
        rank_pattern=tuple((key, 2 * r) for key, r in lora.rank_pattern),
        alpha_pattern=tuple((key, grown * alpha) for key, alpha in lora.alpha_pattern),
        init_lora_weights=True,
        targets=tuple(tuple(map(twice, targets)) for targets in lora.targets),
    )
