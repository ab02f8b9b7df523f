"""Fields of config.json on the kinds of layers: RoPE, sliding windows, experts; optional fields."""

from typing import Any, get_args

from fastlora.models.config import LayerType
from fastlora.models.families.family import Family
from fastlora.models.json_fields import Fields, show

# Bounds on sizes that become lengths of tuples and lists of names: a wrong file must not fill the
# memory, nor take seconds. Kimi K2 has 23,040 experts in all its layers, Llama 3.1 405B 126 layers.
_MAX_TOTAL_EXPERTS = 30_000

# Fields that only some families read (`Family.reads`) -> (what is expected, if it is absent).
OPTIONAL_FIELDS: dict[str, tuple[str, Any]] = dict(
    query_pre_attn_scalar=("a positive number", 256.0),
    attn_logit_softcapping=("a positive number or null", None),
    final_logit_softcapping=("a positive number or null", None),
    sliding_window_pattern=("a positive integer", None),
    embedding_multiplier=("a positive number", 1.0),
    attention_multiplier=("a positive number", 1.0),
    residual_multiplier=("a positive number", 1.0),
    logits_scaling=("a positive number", 1.0),
)


def optional(settings: Fields, name: str) -> Any:
    """A field of OPTIONAL_FIELDS, or its value for files without it."""
    expected, absent = OPTIONAL_FIELDS[name]
    return settings.read(name, expected) if name in settings.raw else absent


def layer_fields(settings: Fields, layers: int | None, family: Family) -> dict[str, Any]:
    """Which layers use RoPE and which a sliding window; the window is None if no layer uses it."""
    window = settings.read("sliding_window", "a positive integer or null")
    # Qwen's files give a window and switch it off.
    if not settings.read("use_sliding_window", "true or false"):
        window = None
    first = settings.read("max_window_layers", "an integer, 0 or more")
    if layers is None or first is None:
        return dict(layer_types=None, sliding_window=None, no_rope_layers=None)
    has_rope = _no_rope_layers(settings, layers)
    slides = [not has_rope[i] if family.window_without_rope else i >= first for i in range(layers)]
    if family.full_attention_every is not None:
        every = family.full_attention_every
        if "sliding_window_pattern" in family.reads:
            every = optional(settings, "sliding_window_pattern") or every
        place = 0 if family.full_attention_first else 1
        slides = [(i + place) % every != 0 for i in range(layers)]
        if window is None and settings.raw["layer_types"] is None:
            settings.problems.append(
                f"sliding_window is null; some layers of a {family.name} model have a window"
            )
    types = tuple("sliding_attention" if window and s else "full_attention" for s in slides)
    if (given := _own_names(settings.raw["layer_types"], family)) is not None:
        types = _given_layer_types(settings, given, types, window, family)
    return dict(
        layer_types=types,
        sliding_window=window if "sliding_attention" in types else None,
        no_rope_layers=has_rope,
    )


def _own_names(given: Any, family: Family) -> Any:
    """A file's layer_types, in our names."""
    names = dict(family.layer_type_names)
    if not names or not isinstance(given, list):
        return given
    return [names.get(x, x) if isinstance(x, str) else x for x in given]


def _no_rope_layers(settings: Fields, layers: int) -> tuple[int, ...]:
    given = settings.raw["no_rope_layers"]
    if given is None:
        interval = settings.read("no_rope_layer_interval", "a positive integer or null")
        return tuple(int(interval is None or (i + 1) % interval != 0) for i in range(layers))
    entries = given if isinstance(given, list) else []
    # transformers documents "at least" one entry per layer, and does not use the rest.
    if len(entries) < layers or any(type(x) is not int or x not in (0, 1) for x in entries):
        settings.problems.append(
            f"no_rope_layers is {show(given)}; expected 0 or 1 for each of the {layers} layers"
        )
        return (1,) * layers
    return tuple(entries[:layers])


def _given_layer_types(
    settings: Fields, given: Any, derived: tuple[str, ...], window: int | None, family: Family
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
            "expected sliding_window, and use_sliding_window true if the family has that field"
        )
    if family.same_layer_types and tuple(given) != derived:
        settings.problems.append(
            f"layer_types is {show(given)}; in a {family.name} model sliding_window holds for all"
            " layers, so leave layer_types out"
        )
    return tuple(given)


def expert_fields(settings: Fields, layers: int | None, family: Family) -> dict[str, Any]:
    """The sizes of the mixture of experts, and which layers have one.

    `output_router_logits`, `router_aux_loss_coef` and `router_jitter_noise` are not read: they do
    not change the logits, and fastlora's loss is the cross-entropy only.
    """
    experts = _expert_count(settings, family)
    if family.experts is None or experts == 0 or layers is None:
        return dict(
            num_local_experts=0,
            num_experts_per_tok=0,
            norm_topk_prob=False,
            moe_intermediate_size=0,
            sparse_layers=(False,) * (layers or 0),
        )
    # experts is None here if the count was wrong; go on, to report the other fields as well.
    per_token = settings.read("num_experts_per_tok", "a positive integer")
    if experts and per_token and per_token > experts:
        settings.problems.append(
            f"num_experts_per_tok is {per_token}; expected at most the {experts} experts there are"
        )
    sparse = _sparse_layers(settings, layers)
    if (total := (experts or 0) * sum(sparse)) > _MAX_TOTAL_EXPERTS:
        settings.problems.append(
            f"{experts} experts in each of {sum(sparse)} layers are {total:,}; expected at most"
            f" {_MAX_TOTAL_EXPERTS:,}"
        )
    return dict(
        num_local_experts=experts,
        num_experts_per_tok=per_token,
        norm_topk_prob=settings.read("norm_topk_prob", "true or false"),
        moe_intermediate_size=settings.read(family.experts.size_field, "a positive integer"),
        sparse_layers=sparse,
    )


def _expert_count(settings: Fields, family: Family) -> int | None:
    for name in () if family.experts is None else family.experts.count_fields:
        if name in settings.raw:
            return settings.read(name, "an integer from 0 to 10000")
    return 0


def _sparse_layers(settings: Fields, layers: int) -> tuple[bool, ...]:
    step = settings.read("decoder_sparse_step", "a positive integer") or 1
    dense = settings.raw["mlp_only_layers"] or []
    if not isinstance(dense, list) or any(type(i) is not int for i in dense):
        settings.problems.append(f"mlp_only_layers is {show(dense)}; expected layer numbers")
        dense = []
    return tuple(i not in dense and (i + 1) % step == 0 for i in range(layers))
