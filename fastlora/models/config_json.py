"""config.json to LlamaConfig and back."""

import json
from typing import Any, get_args

from fastlora.errors import raise_problems
from fastlora.models.config import LayerType, LlamaConfig
from fastlora.models.families import DEFAULTS, FAMILIES
from fastlora.models.json_fields import Fields, is_int, show
from fastlora.models.rope_json import rope_parameters, with_rope_scaling


def config_from_json(
    raw: dict[str, Any],
    *,
    generation: dict[str, Any] | None = None,
    rope_scaling: dict[str, Any] | None = None,
) -> LlamaConfig:
    """The record of a config.json, read as transformers 5.23 reads it.

    Args:
        raw: config.json. Its JSON types are not trusted.
        generation: generation_config.json; its stop ids join the config's.
        rope_scaling: replaces the file's RoPE settings, all but `rope_theta`, which stays the
            file's unless the dict gives one. Spelled as in config.json: rope_type, factor, ...

    Raises:
        ValueError: listing every field that is missing, impossible, or means something that
            fastlora's model does not compute.
    """
    _check_family(raw.get("model_type"))
    if rope_scaling:
        raw = with_rope_scaling(raw, rope_scaling)
    defaults, fixed = FAMILIES[raw["model_type"]]
    settings = Fields({**DEFAULTS, **defaults, **raw, **fixed})
    settings.refuse_unsupported()
    read = {name: settings.read(name, expected) for name, expected in _PLAIN_FIELDS.items()}
    read |= _attention_heads(settings, read)
    read |= _layer_fields(settings, read["num_hidden_layers"])
    read |= _expert_fields(settings, read["num_hidden_layers"])
    read |= _token_ids(raw, generation or {}, defaults, settings.problems)
    read["rope_parameters"] = rope_parameters(settings, read)
    read["dtype"] = settings.dtype()
    cure = "Each line names a field of config.json; correct it, or choose another checkpoint."
    raise_problems(ValueError, "fastlora cannot run this model:", settings.problems, cure)
    return LlamaConfig(**read, model_type=raw["model_type"], raw_json=json.dumps(raw))


def config_to_json(config: LlamaConfig) -> dict[str, Any]:
    """config.json for a folder of this model in full precision: the file as read, with what
    fastlora changed."""
    raw = json.loads(config.raw_json)
    raw.pop("quantization_config", None)
    # Both names where both are there: transformers 5 prefers dtype, 4 reads torch_dtype.
    for name in {"dtype", "torch_dtype"} & raw.keys() or {"dtype"}:
        raw[name] = config.dtype
    changed = {"vocab_size": config.vocab_size, "tie_word_embeddings": config.tie_word_embeddings}
    return raw | changed


def _check_family(model_type: Any) -> None:
    known = ", ".join(FAMILIES)
    if model_type not in tuple(FAMILIES):  # a tuple: the file may hold something unhashable
        raise ValueError(
            f"model_type is {show(model_type)}, but fastlora knows {known}; "
            "is this a Llama-like language model?"
        )


# The fields that stand in the record as they stand in the file.
_PLAIN_FIELDS = dict(
    vocab_size="a positive integer",
    hidden_size="a positive integer",
    intermediate_size="a positive integer",
    num_hidden_layers="an integer from 1 to 10000",  # it sizes tuples: not to be believed blindly
    max_position_embeddings="a positive integer",
    rms_norm_eps="a positive number",
    tie_word_embeddings="true or false",
    attention_bias="true or false",
    mlp_bias="true or false",
)


# ── what several fields say together ──────────────────────────────────────────────────────
def _attention_heads(settings: Fields, read: dict[str, Any]) -> dict[str, Any]:
    """Head counts, head_dim and what goes with attention's projections."""
    hidden, problems = read["hidden_size"], settings.problems
    heads = settings.read("num_attention_heads", "a positive integer")
    kv_heads = settings.read("num_key_value_heads", "a positive integer or null") or heads
    head_dim = settings.read("head_dim", "a positive integer or null")
    if heads and kv_heads and heads % kv_heads:
        problems.append(
            f"num_attention_heads is {heads}; expected a multiple of num_key_value_heads {kv_heads}"
        )
    if head_dim is None and hidden and heads:
        if hidden % heads:
            problems.append(
                f"hidden_size is {hidden}; without a head_dim, expected a multiple of "
                f"num_attention_heads {heads}"
            )
        head_dim = hidden // heads
    if head_dim is not None and (head_dim % 2 or not head_dim):
        problems.append(f"head_dim is {head_dim}; RoPE rotates pairs, so it must be even")
    return dict(
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        attention_output_bias=read["attention_bias"] and settings.raw["model_type"] != "qwen2",
        qk_norm=settings.raw["model_type"] in ("qwen3", "qwen3_moe"),
    )


def _layer_fields(settings: Fields, n: int | None) -> dict[str, Any]:
    """Which layers rotate, and which see a window; `sliding_window` is None where none does."""
    window = settings.read("sliding_window", "a positive integer or null")
    if not settings.read("use_sliding_window", "true or false"):
        window = None
    first = settings.read("max_window_layers", "an integer, 0 or more")
    if n is None or first is None:
        return dict(layer_types=None, sliding_window=None, no_rope_layers=None)
    ropes = _no_rope_layers(settings, n)
    # SmolLM3 gives its window to the layers without RoPE, the others to the last ones.
    smollm3 = settings.raw["model_type"] == "smollm3"
    slides = [window and (not ropes[i] if smollm3 else i >= first) for i in range(n)]
    types = tuple("sliding_attention" if s else "full_attention" for s in slides)
    if (given := settings.raw["layer_types"]) is not None:
        types = _given_layer_types(settings, given, types, window)
    return dict(
        layer_types=types,
        sliding_window=window if "sliding_attention" in types else None,
        no_rope_layers=ropes,
    )


def _expert_fields(settings: Fields, n: int | None) -> dict[str, Any]:
    """The mixture's sizes, and which layers are one.

    `output_router_logits`, `router_aux_loss_coef` and `router_jitter_noise` are not read: they
    change nothing in the logits, and fastlora's loss is the cross-entropy alone.
    """
    raw = settings.raw
    experts = _expert_count(settings)
    if experts == 0 or n is None:
        none = dict(num_experts_per_tok=0, norm_topk_prob=False, moe_intermediate_size=0)
        return none | dict(num_local_experts=0, sparse_layers=(False,) * (n or 0))
    per_token = settings.read("num_experts_per_tok", "a positive integer")
    if experts and per_token and per_token > experts:
        settings.problems.append(
            f"num_experts_per_tok is {per_token}; expected at most the {experts} experts there are"
        )
    size = "intermediate_size" if raw["model_type"] == "mixtral" else "moe_intermediate_size"
    step = settings.read("decoder_sparse_step", "a positive integer") or 1
    dense = raw["mlp_only_layers"] or []
    if not isinstance(dense, list) or any(type(i) is not int for i in dense):
        settings.problems.append(f"mlp_only_layers is {show(dense)}; expected layer numbers")
        dense = []
    sparse = tuple(i not in dense and (i + 1) % step == 0 for i in range(n))
    if (total := (experts or 0) * sum(sparse)) > _MOST_EXPERTS:
        settings.problems.append(
            f"{experts} experts in each of {sum(sparse)} layers are {total:,}; expected at most"
            f" {_MOST_EXPERTS:,}"
        )
    return dict(
        num_local_experts=experts,
        num_experts_per_tok=per_token,
        norm_topk_prob=settings.read("norm_topk_prob", "true or false"),
        moe_intermediate_size=settings.read(size, "a positive integer"),
        sparse_layers=sparse,
    )


# They size lists of names. DeepSeek-V3 has 14,848.
_MOST_EXPERTS = 100_000


# Spellings of their number: transformers' alias of a class's own field wins over that.
_EXPERT_COUNTS = {
    "mixtral": ("num_experts", "num_local_experts"),
    "qwen3_moe": ("num_local_experts", "num_experts"),
}


def _expert_count(settings: Fields) -> int | None:
    for name in _EXPERT_COUNTS.get(settings.raw["model_type"], ()):
        if name in settings.raw:
            return settings.read(name, "an integer from 0 to 10000")
    return 0


def _no_rope_layers(settings: Fields, n: int) -> tuple[int, ...]:
    given = settings.raw["no_rope_layers"]
    if given is None:
        interval = settings.read("no_rope_layer_interval", "a positive integer or null")
        return tuple(int(interval is None or (i + 1) % interval != 0) for i in range(n))
    entries = given if isinstance(given, list) else []
    # transformers documents "at least" one entry per layer: the rest are not used.
    if len(entries) < n or any(type(x) is not int or x not in (0, 1) for x in entries):
        settings.problems.append(
            f"no_rope_layers is {show(given)}; expected 0 or 1 for each of the {n} layers"
        )
        return (1,) * n
    return tuple(entries[:n])


def _given_layer_types(
    settings: Fields, given: Any, derived: tuple[str, ...], window: int | None
) -> tuple[str, ...]:
    known, n = get_args(LayerType), len(derived)
    if not isinstance(given, list) or len(given) != n or any(t not in known for t in given):
        settings.problems.append(
            f"layer_types is {show(given)}; expected {' or '.join(known)} for each of {n} layers"
        )
        return derived
    if "sliding_attention" in given and window is None:
        settings.problems.append(
            "layer_types has sliding_attention, but there is no window; "
            "expected sliding_window, and use_sliding_window true where the family has it"
        )
    if settings.raw["model_type"] == "mistral" and tuple(given) != derived:
        settings.problems.append(
            "layer_types differs between layers; in a mistral model sliding_window holds for all"
        )
    return tuple(given)


def _token_ids(
    raw: dict[str, Any], generation: dict[str, Any], defaults: dict[str, Any], problems: list[str]
) -> dict[str, Any]:
    """Special ids of both files; a negative id is Llama-1's spelling of none."""

    def ids(name: str) -> list[int]:
        sources = [d for d in (raw, generation) if name in d] or [defaults]
        values: list[Any] = []
        for value in (d.get(name) for d in sources):
            values += value if isinstance(value, list) else [value]
        if any(v is not None and not is_int(-(2**31))(v) for v in values):
            problems.append(f"{name} is {show(values)}; expected token ids or null")
            return []
        return [v for v in dict.fromkeys(values) if v is not None and v >= 0]

    return dict(
        bos_token_id=next(iter(ids("bos_token_id")), None),
        eos_token_id=tuple(ids("eos_token_id")),
        pad_token_id=next(iter(ids("pad_token_id")), None),
    )
