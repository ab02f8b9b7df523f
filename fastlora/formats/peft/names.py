"""PEFT's names for the tensors of an adapter, and the tensors that a file must hold.

base_model.model.<module's name in transformers>.
    lora_A.weight, lora_B.weight                 LoRA on a linear layer
    lora_B.bias, lora_magnitude_vector           with lora_bias; with DoRA
    lora_embedding_A, lora_embedding_B           LoRA on the embedding
    token_adapter.trainable_tokens_delta         trained rows (not differences, despite the name)
    weight, bias, base_layer.bias                trained copies; the last if the module has LoRA
    base_layer.weight, token_adapter.base_layer.weight, weight
                                                 embedding or head of the base (base_tensors.py)
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from fastlora.adapters.extras import EDGE_MODULES
from fastlora.formats.peft.expert_layout import PREFIX, adapter_path, pack_experts, packed_shape
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
from fastlora.models.wrapped_names import text_name, wrapped_name

# Field of an adapter record -> the last part of its key.
_LINEAR_KEYS = {
    "a": "lora_A.weight",
    "b": "lora_B.weight",
    "bias": "lora_B.bias",
    "magnitude": "lora_magnitude_vector",
}
_EMBEDDING_KEYS = _LINEAR_KEYS | {"a": "lora_embedding_A", "b": "lora_embedding_B"}

_ROWS_KEY = "token_adapter.trainable_tokens_delta"

# Key in the trees -> module: "embed_tokens" -> "model.embed_tokens".
MODULE_OF = {key: module for module, key in EDGE_MODULES.items()}

# ── names of an adapter's tensors ─────────────────────────────────────────────────────────


def map_named(fn: Callable[[str, Any], Any], adapter: Adapter) -> Adapter:
    """A tree like the adapter, with fn(PEFT's key, leaf) in place of every leaf.

        {"layers": ({"q_proj": LoRA(A, B)}, ...)}
    ->  {"layers": ({"q_proj": LoRA(fn("base_model.model.model.layers.0.self_attn.q_proj."
                                       "lora_A.weight", A), fn(..., B))}, ...)}

    Leaves need not be tensors: `adapter_shapes` makes a tree of shapes.
    """
    layers = tuple(
        {
            name: _map_record(fn, f"{PREFIX}{adapter_path(i, name, loras)}", record, _LINEAR_KEYS)
            for name, record in loras.items()
        }
        for i, loras in enumerate(adapter["layers"])
    )
    rest: dict[str, Any] = {}
    for key, field_keys in (("embed_tokens", _EMBEDDING_KEYS), ("lm_head", _LINEAR_KEYS)):
        if key in adapter:
            rest[key] = _map_record(fn, f"{PREFIX}{MODULE_OF[key]}", adapter[key], field_keys)
    if copies := adapter.get("replaced"):
        adapted = _adapted_modules(adapter)
        rest["replaced"] = {n: fn(_copy_key(n, adapted), x) for n, x in copies.items()}
    if rows := adapter.get("tokens"):
        rest["tokens"] = {
            key: fn(f"{PREFIX}{MODULE_OF[key]}.{_ROWS_KEY}", x) for key, x in rows.items()
        }
    return Adapter(layers=layers, **rest)


def _map_record(
    fn: Callable[[str, Any], Any], module: str, record: Any, keys: Mapping[str, str]
) -> Any:
    return type(record)(*(fn(f"{module}.{keys[f]}", x) for f, x in record._asdict().items()))


def _adapted_modules(adapter: Adapter) -> set[str]:
    layers = enumerate(adapter["layers"])
    return {projection_path(i, name) for i, loras in layers for name in loras}


def _copy_key(name: str, adapted: Collection[str]) -> str:
    """PEFT's key of a trained copy; PEFT moves the copy's module if it wraps it for LoRA."""
    module, _, leaf = name.rpartition(".")
    return PREFIX + (f"{module}.base_layer.{leaf}" if module in adapted else name)


def named_leaves(adapter: Adapter) -> dict[str, Any]:
    """PEFT's key -> the adapter's leaf, the same object, in the tree's shape."""
    leaves: dict[str, Any] = {}
    map_named(leaves.__setitem__, adapter)
    return leaves


def peft_state_dict(adapter: Adapter, lora: LoraConfig) -> dict[str, Tensor]:
    """PEFT's key -> tensor, for everything that an adapter's file holds.

    Besides the leaves these are the tensors of a tied head, which PEFT writes although they repeat
    the embedding's. Tensors of experts become matrices (`pack_experts`).
    """
    leaves = named_leaves(adapter)
    tensors = {key: pack_experts(key, x) if x.dim() == 3 else x for key, x in leaves.items()}
    if not lora.extras.tied:
        return tensors
    return tensors | {key: repeated(tensors) for key, repeated in tied_copies(lora).items()}


def in_wrapper(key: str) -> str:
    """PEFT's key of a tensor, for a text model beside a vision tower."""
    return PREFIX + wrapped_name(key.removeprefix(PREFIX))


def out_of_wrapper(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """(the text model's tensors under the keys of a text model alone, problems).

    An adapter of the vision tower is a problem: without it the model would compute something else.
    """
    names = {key: text_name(key.removeprefix(PREFIX)) for key in tensors}
    others = [key for key, name in names.items() if name is None]
    problems = []
    if others:
        problems.append(
            f"other part  {others[0]}, ...: {len(others)} tensors are not of the text model; train"
            " with target_modules of the text model only"
        )
    found = {f"{PREFIX}{name}": tensors[key] for key, name in names.items() if name is not None}
    return found, problems


def tied_copies(lora: LoraConfig) -> dict[str, Callable[[Mapping[str, Tensor]], Tensor]]:
    """PEFT's key of a tied head's tensor -> function that takes it from the file's other tensors.

    With `shared_rows` the file of a vocabulary that has grown holds the head's rows as well; other
    files need not.
    """
    embedding, head = f"{PREFIX}model.embed_tokens.", f"{PREFIX}lm_head."
    if lora.extras.shared_rows:
        return {f"{head}{_ROWS_KEY}": lambda tensors: tensors[f"{embedding}{_ROWS_KEY}"]}
    if not lora.extras.tied:
        return {}
    if lora.extras.embed_tokens is None:
        return {f"{PREFIX}{LM_HEAD}": lambda tensors: tensors[f"{PREFIX}{EMBED_TOKENS}"]}
    # The embedding's LoRA adapts the transposed matrix, so A and B swap.
    return {
        f"{head}lora_A.weight": lambda tensors: tensors[f"{embedding}lora_embedding_B"].t(),
        f"{head}lora_B.weight": lambda tensors: tensors[f"{embedding}lora_embedding_A"].t(),
    }


# ── what a file must hold ─────────────────────────────────────────────────────────────────


def adapter_shapes(lora: LoraConfig, config: LlamaConfig) -> Adapter:
    """The adapter's tree with shapes in place of tensors: the shapes in the file.

    They differ from the tree's shapes for experts (`packed_shape`).
    """

    def record(target: Target) -> AdapterRecord:
        cls = record_type(lora, target.name)
        return cast(Any, cls)(*(_shape(config, target, field) for field in cls._fields))

    extras, v, d = lora.extras, config.vocab_size, config.hidden_size
    # base_tensors lists no head for a tied model, of which a copy may be trained nevertheless.
    shapes = base_tensors(config) | {EMBED_TOKENS: (v, d), LM_HEAD: (v, d)}
    rest: dict[str, Any] = {}
    for key in ("embed_tokens", "lm_head"):
        target = getattr(extras, key)
        if target is not None and not (key == "lm_head" and extras.tied):
            rest[key] = record(target)
    if extras.replaced:
        rest["replaced"] = {name: shapes[name] for name in extras.replaced}
    if extras.tokens:
        rest["tokens"] = {key: (len(ids), d) for key, ids in extras.tokens}
    layers = tuple({t.name: record(t) for t in targets} for targets in lora.targets)
    return Adapter(layers=layers, **rest)


def record_type(lora: LoraConfig, name: str) -> type[AdapterRecord]:
    """The class of record that a target has under these settings."""
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
    """Every difference between a file's tensors and those that the settings require.

    The tensors of a tied head may be absent. If present, they must equal the embedding's.
    """
    expected = named_leaves(adapter_shapes(lora, config))
    copies = tied_copies(lora)
    present = [k for k in expected if k in tensors]
    numeric = [k for k in present if tensors[k].dtype in dtypes]
    problems = [f"missing     {k} {s}" for k, s in expected.items() if k not in tensors]
    unknown = tensors.keys() - expected.keys() - copies.keys()
    problems += [f"unexpected  {k}{_hint(k)}" for k in sorted(unknown)]
    problems += [
        f"shape       {k}: file has {tuple(tensors[k].shape)}, the config says {expected[k]}"
        for k in present
        if tuple(tensors[k].shape) != expected[k]
    ]
    problems += [
        f"dtype       {k}: {tensors[k].dtype}, expected one of {[str(d) for d in dtypes]}"
        for k in present
        if k not in numeric
    ]
    broken = [k for k in numeric if not tensors[k].isfinite().all()]
    problems += [f"NaN or inf  {k}" for k in broken]
    # Tensors of a wrong shape cannot be compared, so this check comes last.
    return problems or [
        f"untied      {k}: differs from the embedding's tensor, but the config ties the two"
        for k, repeated in copies.items()
        if k in tensors and not torch.equal(tensors[k], repeated(tensors))
    ]


def _hint(key: str) -> str:
    if not key.startswith(PREFIX):
        return f": PEFT's keys begin with {PREFIX!r}"
    if not key.endswith((*_LINEAR_KEYS.values(), *_EMBEDDING_KEYS.values())):
        return ": not a tensor of LoRA, bias, modules_to_save or trainable_token_indices"
    return ": its module is not among target_modules"
