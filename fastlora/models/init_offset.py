"""Initial offset: frozen factors that make an adapter with nonzero A0 and B0 start at zero.

PiSSA, OLoRA, LoftQ, CorDA and LoRA-GA fill A and B with factors A0 and B0 whose product is not
zero. PEFT subtracts s B0 A0 from W, so that the sum is still W. This rounds the difference if W is
in 16 or 4 bits. We leave W unchanged and store the frozen A0 and B0 next to it, under the key
"offset":

    y = W x + s (B A - B0 A0) x

This is one low-rank product of twice the rank, with the factors [A; A0] and [B, -B0]. Together with
W they are an ordinary adapter (`fold_offset`), which can be saved, merged and combined.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fastlora.models.params import (
    LINEARS,
    Adapter,
    AdapterRecord,
    Base,
    LayerParams,
    Linear,
    LoRA,
)
from fastlora.models.spec import LoraConfig, Spec, Target
from fastlora.ops.cast import cast
from fastlora.runtime.layer_fetching import FetchedLayers, described


def offsets(params: LayerParams) -> dict[str, LoRA]:
    """Projection name -> (A0, B0), for the projections of one layer that have an offset."""
    linears = {name: params[name] for name in LINEARS if name in params}
    return {name: linear["offset"] for name, linear in linears.items() if "offset" in linear}


def has_offset(base: Base) -> bool:
    """Whether any projection of the base has an initial offset."""
    return any(map(offsets, described(base)["layers"]))


def with_offset(base: Base, layers: Sequence[Mapping[str, LoRA]]) -> Base:
    """The base with these offsets, one mapping per layer, and no others. No tensor is copied.

        base   {"layers": ({"q_proj": {"weight": W}, ...}, ...)}
        layers ({"q_proj": (A0, B0)}, ...)
    ->  base   {"layers": ({"q_proj": {"weight": W, "offset": (A0, B0)}, ...}, ...)}
    """
    if isinstance(sharded := base["layers"], FetchedLayers):
        return _with_layers(base, sharded.with_overlay([dict(new) for new in layers]))
    bare = without_offset(base)
    params = tuple(
        _set_offsets(params, new) for params, new in zip(bare["layers"], layers, strict=True)
    )
    return _with_layers(bare, params)


def without_offset(base: Base) -> Base:
    """The base with every "offset" dropped; the same object if there are none. No copies.

        {"layers": ({"q_proj": {"weight": W, "offset": (A0, B0)}, ...}, ...)}
    ->  {"layers": ({"q_proj": {"weight": W}, ...}, ...)}
    """
    if not has_offset(base):
        return base
    if isinstance(sharded := base["layers"], FetchedLayers):
        return _with_layers(base, sharded.with_overlay([{}] * len(sharded)))
    # Only projections with an offset get a new dict. All others stay the same objects.
    drop = lambda linear: {key: x for key, x in linear.items() if key != "offset"}
    layers = tuple(p | {name: drop(p[name]) for name in offsets(p)} for p in base["layers"])
    return _with_layers(base, layers)


def _with_layers(base: Base, layers: Any) -> Base:
    new_base = base.copy()
    new_base["layers"] = layers
    return new_base


def cast_offset(params: LayerParams, dtype: torch.dtype) -> LayerParams:
    """One layer with its offsets in `dtype`; the same object if they all are already."""
    old = offsets(params)
    new = cast(old, dtype)
    return params if new is old else _set_offsets(params, new)


def _set_offsets(params: LayerParams, new: Mapping[str, LoRA]) -> LayerParams:
    return params | {name: {**params[name], "offset": lora} for name, lora in new.items()}


def a_with_offset(lora: AdapterRecord, linear: Linear) -> Float[Tensor, "_ d_in"]:
    """The matrix that multiplies x: A, or [A; A0]."""
    return torch.cat([lora.a, linear["offset"].a]) if "offset" in linear else lora.a


def b_with_offset(lora: AdapterRecord, linear: Linear) -> Float[Tensor, "d_out _"]:
    """The matrix that multiplies the low-rank product: B, or [B, -B0]."""
    return torch.cat([lora.b, -linear["offset"].b], dim=1) if "offset" in linear else lora.b


def rank_with_offset(lora: AdapterRecord, linear: Linear) -> int:
    """Columns of the low-rank product: the ranks of adapter and offset together."""
    return lora.a.shape[0] + (linear["offset"].a.shape[0] if "offset" in linear else 0)


def fold_into_adapter(adapter: Adapter, base: Base) -> Adapter:
    """Fold the base's offsets into the adapter. Gradients flow to the given adapter.

        base    {"layers": ({"q_proj": {"weight": W, "offset": (A0, B0)}, ...}, ...)}
        adapter {"layers": ({"q_proj": (A, B)}, ...)}
    ->  adapter {"layers": ({"q_proj": ([A; A0], [B, -B0])}, ...)}
    """

    def folded(lora: AdapterRecord, linear: Linear) -> AdapterRecord:
        # _replace keeps the record's class and its vectors: DoRA's magnitude, BiasedLoRA's bias.
        return lora._replace(a=a_with_offset(lora, linear), b=b_with_offset(lora, linear))

    layers = tuple(
        {
            # Adapters of experts are under "experts.gate_up_proj", which is not a key of params.
            name: folded(lora, params[name]) if name in params else lora
            for name, lora in loras.items()
        }
        for loras, params in zip(adapter["layers"], described(base)["layers"], strict=True)
    )
    return Adapter(**adapter | {"layers": layers})


def unfold_offset(folded: Adapter, adapter: Adapter) -> list[dict[str, LoRA]]:
    """The inverse of `fold_into_adapter`: the offsets that are in `folded` besides the adapter.

        folded  {"layers": ({"q_proj": ([A; A0], [B, -B0])}, ...)}
        adapter {"layers": ({"q_proj": (A, B)}, ...)}
    ->          [{"q_proj": (A0, B0)}, ...]
    """

    def offset(both: AdapterRecord, lora: AdapterRecord) -> LoRA:
        r = lora.a.shape[0]  # the adapter's rows of A come first
        return LoRA(both.a[r:], -both.b[:, r:])

    pairs = zip(folded["layers"], adapter["layers"], strict=True)
    return [
        {name: offset(both[name], lora) for name, lora in loras.items()} for both, loras in pairs
    ]


def fold_offset(spec: Spec, base: Base, adapter: Adapter | None) -> tuple[Spec, Adapter | None]:
    """(spec, adapter) that compute over `without_offset(base)` what the given ones do over base.

    Without offsets the given objects are returned.
    """
    if adapter is None or spec.lora is None or not has_offset(base):
        return spec, adapter
    return replace(spec, lora=double_rank(spec.lora)), fold_into_adapter(adapter, base)


def double_rank(lora: LoraConfig) -> LoraConfig:
    """The settings of a folded adapter: twice the rank, the same scaling, an ordinary start."""
    growth = math.sqrt(2) if lora.use_rslora else 2  # of alpha, so that the scaling stays

    def twice(t: Target) -> Target:
        return replace(t, r=2 * t.r, lora_alpha=growth * t.lora_alpha)

    return replace(
        lora,
        r=2 * lora.r,
        lora_alpha=growth * lora.lora_alpha,
        rank_pattern=tuple((key, 2 * r) for key, r in lora.rank_pattern),
        alpha_pattern=tuple((key, growth * alpha) for key, alpha in lora.alpha_pattern),
        # With the offset folded in, the adapter no longer depends on how it was initialised.
        init_lora_weights=True,
        targets=tuple(tuple(map(twice, targets)) for targets in lora.targets),
    )
