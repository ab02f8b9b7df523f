"""PEFT's names for an adapter's tensors, and what a file must hold for an adapter.

base_model.model.<Hugging Face's module>.lora_A.weight, .lora_B.weight, .lora_B.bias,
    .lora_magnitude_vector                         LoRA on a linear layer
    .lora_embedding_A, .lora_embedding_B           on the embedding
    .token_adapter.trainable_tokens_delta          trained rows: whole rows, not differences
    .weight, .bias, .base_layer.bias               copies; the last where the module has LoRA
    .base_layer.weight, .token_adapter.base_layer.weight, .weight
                                                   a base's own embedding and head, where they
                                                   are not those of the checkpoint
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from fastlora.adapters.extras import EDGE_MODULES
from fastlora.formats.peft.expert_layout import PREFIX, adapter_path, packed, packed_shape
from fastlora.models.config import LlamaConfig
from fastlora.models.names import EMBED_TOKENS, LM_HEAD, base_tensors, projection_path, target_shape
from fastlora.models.params import (
    EXPERTS,
    Adapter,
    AdapterRecord,
    BiasedLoRA,
    DoRA,
    ExpertLoRA,
    LoRA,
)
from fastlora.models.spec import LoraConfig, Target

# Field of a LoRA record -> end of its key.
_LEAVES = {
    "a": "lora_A.weight",
    "b": "lora_B.weight",
    "bias": "lora_B.bias",
    "magnitude": "lora_magnitude_vector",
}

_EMBEDDING_LEAVES = _LEAVES | {"a": "lora_embedding_A", "b": "lora_embedding_B"}

_ROWS = "token_adapter.trainable_tokens_delta"

BASE_KEYS = ("base_layer.weight", "token_adapter.base_layer.weight", "weight")

MODULES = {key: module for module, key in EDGE_MODULES.items()}


# ── 1. an adapter's own tensors ───────────────────────────────────────────────────────────
def map_named(fn: Callable[[str, Any], Any], adapter: Adapter) -> Adapter:
    """The tree of fn(PEFT's name, leaf); leaves may be anything."""
    layers = tuple(
        {
            name: _mapped(fn, f"{PREFIX}{adapter_path(i, name, loras)}", record, _LEAVES)
            for name, record in loras.items()
        }
        for i, loras in enumerate(adapter["layers"])
    )
    rest: dict[str, Any] = {}
    for end, leaves in (("embed_tokens", _EMBEDDING_LEAVES), ("lm_head", _LEAVES)):
        if end in adapter:
            rest[end] = _mapped(fn, f"{PREFIX}{MODULES[end]}", adapter[end], leaves)
    if copies := adapter.get("replaced"):
        adapted = _adapted_modules(adapter)
        rest["replaced"] = {n: fn(_copy_key(n, adapted), x) for n, x in copies.items()}
    if rows := adapter.get("tokens"):
        rest["tokens"] = {e: fn(f"{PREFIX}{MODULES[e]}.{_ROWS}", x) for e, x in rows.items()}
    return Adapter(layers=layers, **rest)


def _mapped(
    fn: Callable[[str, Any], Any], module: str, record: Any, leaves: Mapping[str, str]
) -> Any:
    return type(record)(*(fn(f"{module}.{leaves[f]}", x) for f, x in record._asdict().items()))


def _adapted_modules(adapter: Adapter) -> set[str]:
    layers = enumerate(adapter["layers"])
    return {projection_path(i, name) for i, loras in layers for name in loras}


def _copy_key(name: str, adapted: Collection[str]) -> str:
    module, _, leaf = name.rpartition(".")
    return PREFIX + (f"{module}.base_layer.{leaf}" if module in adapted else name)


def named_leaves(adapter: Adapter) -> dict[str, Any]:
    """PEFT's tensor names -> the adapter's own leaves, in its own shapes."""
    found: dict[str, Any] = {}
    map_named(found.__setitem__, adapter)
    return found


def peft_state_dict(adapter: Adapter, lora: LoraConfig) -> dict[str, Tensor]:
    """PEFT's tensor names -> its tensors: the adapter's leaves, experts' as matrices, and what a
    tied head has of the embedding's, which PEFT writes out as well."""
    leaves = named_leaves(adapter)
    tensors = {key: packed(key, x) if x.dim() == 3 else x for key, x in leaves.items()}
    if not lora.extras.tied:
        return tensors
    return tensors | {key: twin(tensors) for key, twin in twins(lora).items()}


def twins(lora: LoraConfig) -> dict[str, Callable[[Mapping[str, Tensor]], Tensor]]:
    """Key of a tied head's -> its tensor, from the embedding's in the same file.

    PEFT writes shared rows twice only where the vocabulary grew.
    """
    of, to = f"{PREFIX}model.embed_tokens.", f"{PREFIX}lm_head."
    if lora.extras.shared_rows:
        return {f"{to}{_ROWS}": lambda tensors: tensors[f"{of}{_ROWS}"]}
    if not lora.extras.tied:
        return {}
    if lora.extras.embed_tokens is None:
        return {f"{PREFIX}{LM_HEAD}": lambda tensors: tensors[f"{PREFIX}{EMBED_TOKENS}"]}
    return {
        f"{to}lora_A.weight": lambda tensors: tensors[f"{of}lora_embedding_B"].t(),
        f"{to}lora_B.weight": lambda tensors: tensors[f"{of}lora_embedding_A"].t(),
    }


# ── 2. what a file must hold ──────────────────────────────────────────────────────────────
def adapter_shapes(lora: LoraConfig, config: LlamaConfig) -> Adapter:
    """The adapter's tree, with the shape that a file has in place of each tensor."""

    def record(target: Target) -> AdapterRecord:
        kind = record_type(lora, target.name)
        return cast(Any, kind)(*(_shape(config, target, field) for field in kind._fields))

    extras, v, d = lora.extras, config.vocab_size, config.hidden_size
    shapes = base_tensors(config) | {EMBED_TOKENS: (v, d), LM_HEAD: (v, d)}
    rest: dict[str, Any] = {}
    for end in ("embed_tokens", "lm_head"):
        target = getattr(extras, end)
        if target is not None and not (end == "lm_head" and extras.tied):
            rest[end] = record(target)
    if extras.replaced:
        rest["replaced"] = {name: shapes[name] for name in extras.replaced}
    if extras.tokens:
        rest["tokens"] = {end: (len(ids), d) for end, ids in extras.tokens}
    layers = tuple({t.name: record(t) for t in targets} for targets in lora.targets)
    return Adapter(layers=layers, **rest)


def record_type(lora: LoraConfig, name: str) -> type[AdapterRecord]:
    """How a target is adapted."""
    if name in EXPERTS:
        return ExpertLoRA
    return BiasedLoRA if lora.lora_bias else DoRA if lora.use_dora else LoRA


def _shape(config: LlamaConfig, target: Target, field: str) -> tuple[int, ...]:
    d_out, d_in = shape = target_shape(config, target.name)
    if target.name in EXPERTS:
        return packed_shape(field, target.r, shape, config.num_local_experts)
    return {"a": (target.r, d_in), "b": (d_out, target.r)}.get(field, (d_out,))


def tensor_problems(
    tensors: Mapping[str, Tensor],
    lora: LoraConfig,
    config: LlamaConfig,
    dtypes: Collection[torch.dtype],
) -> list[str]:
    """Every difference between a file's tensors and what the settings call for.

    What a tied head has of the embedding's may be absent, but not another tensor.
    """
    expected = named_leaves(adapter_shapes(lora, config))
    copies = twins(lora)
    both = [k for k in expected if k in tensors]
    numeric = [k for k in both if tensors[k].dtype in dtypes]
    problems = [f"missing     {k} {s}" for k, s in expected.items() if k not in tensors]
    unknown = tensors.keys() - expected.keys() - copies.keys()
    problems += [f"unexpected  {k}{_hint(k)}" for k in sorted(unknown)]
    problems += [
        f"shape       {k}: file has {tuple(tensors[k].shape)}, the config says {expected[k]}"
        for k in both
        if tuple(tensors[k].shape) != expected[k]
    ]
    problems += [
        f"dtype       {k}: {tensors[k].dtype}, expected one of {[str(d) for d in dtypes]}"
        for k in both
        if k not in numeric
    ]
    broken = [k for k in numeric if not tensors[k].isfinite().all()]
    problems += [f"NaN or inf  {k}" for k in broken]
    return problems or [
        f"untied      {k}: not the embedding's, but ensure_weight_tying says that it is"
        for k, twin in copies.items()
        if k in tensors and not torch.equal(tensors[k], twin(tensors))
    ]


def _hint(key: str) -> str:
    if not key.startswith(PREFIX):
        return f": PEFT's keys begin with {PREFIX!r}"
    if not key.endswith((*_LEAVES.values(), *_EMBEDDING_LEAVES.values())):
        return ": neither LoRA's nor of bias, modules_to_save or trainable_token_indices"
    return ": its module is not among target_modules"
