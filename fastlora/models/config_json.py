"""config.json -> LlamaConfig, and back."""

import json
from collections.abc import Mapping
from typing import Any

from fastlora.errors import raise_problems
from fastlora.models.config import LlamaConfig
from fastlora.models.config_wrapper_json import text_json, wrapper_of
from fastlora.models.families.family import SHARED_DEFAULTS, Family
from fastlora.models.families.registry import FAMILIES, WRAPPERS
from fastlora.models.json_fields import Fields, is_int, show
from fastlora.models.layers_json import expert_fields, layer_fields, optional
from fastlora.models.partial_rope import common_rope, rope_dim
from fastlora.models.rope_json import rope_parameters, with_rope_scaling

# Fields that LlamaConfig has under the same name and with the same value -> what is expected.
_COPIED_FIELDS = dict(
    vocab_size="a positive integer",
    hidden_size="a positive integer",
    intermediate_size="a positive integer",
    num_hidden_layers="an integer from 1 to 1000",
    max_position_embeddings="a positive integer",
    rms_norm_eps="a positive number",
    tie_word_embeddings="true or false",
    attention_bias="true or false",
    mlp_bias="true or false",
)


# LlamaConfig's activation -> its name in config.json.
_ACTIVATIONS = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}


def config_from_json(
    raw: dict[str, Any],
    *,
    generation: dict[str, Any] | None = None,
    rope_scaling: dict[str, Any] | None = None,
) -> LlamaConfig:
    """Read a config.json as transformers 5.23 reads it.

    Args:
        raw: config.json. Its JSON types are not trusted.
        generation: generation_config.json; its stop ids are added to those of config.json.
        rope_scaling: replaces the file's RoPE settings except `rope_theta`, which is replaced only
            if the dict has it. Spelled as in config.json: rope_type, factor, ...

    Raises:
        ValueError: listing every field that is missing, impossible, or asks for something that
            fastlora's model does not compute.
    """
    wrapper = wrapper_of(raw)
    if rope_scaling and wrapper is None:
        raw = with_rope_scaling(raw, rope_scaling)
    elif rope_scaling and isinstance(text := raw.get("text_config"), dict):
        raw = raw | {"text_config": with_rope_scaling(text, rope_scaling)}
    whole, raw = raw, raw if wrapper is None else text_json(raw, wrapper)
    family = _family(raw.get("model_type"))
    given, rotary = common_rope(raw, family)
    # A family's fixed values come last: they hold although the file may say something else, as in
    # transformers' model classes, which do not read these fields.
    respelled = {x: raw[own] for x, own in family.spellings if raw.get(own) is not None}
    settings = Fields({**SHARED_DEFAULTS, **family.defaults, **given, **family.fixed, **respelled})
    activation = (family.activation_field, _ACTIVATIONS[family.activation])
    settings.refuse_unsupported(activation, family.refused_if_true)
    settings.problems += [
        f"{name} is {show(value)}; only {only!r} is supported for {family.name}"
        for name, only in family.only
        if (value := settings.raw.get(name)) != only
    ]
    read = {name: settings.read(name, expected) for name, expected in _COPIED_FIELDS.items()}
    read |= _attention_fields(settings, read, family)
    read["rope_dim"] = rope_dim(settings, read["head_dim"], rotary)
    read |= layer_fields(settings, read["num_hidden_layers"], family)
    read |= _scale_fields(settings, read["hidden_size"], family)
    read |= expert_fields(settings, read["num_hidden_layers"], family)
    read |= _token_ids(raw, generation or {}, family.defaults, settings.problems)
    read["rope_parameters"], sliding_rope = rope_parameters(settings, read, family.sliding_rope)
    if read["sliding_window"] is not None and sliding_rope != read["rope_parameters"]:
        read["sliding_rope_parameters"] = sliding_rope
    read["dtype"] = settings.dtype()
    cure = "Each line names a field of config.json; correct it, or choose another checkpoint."
    raise_problems(ValueError, "fastlora cannot run this model:", settings.problems, cure)
    return LlamaConfig(
        **read,
        model_type=family.name,
        norms=family.norms,
        norm_kind=family.norm_kind,
        qk_norm_joint=family.qk_norm_joint,
        activation=family.activation,
        wrapper=None if wrapper is None else wrapper.name,
        raw_json=json.dumps(whole),
        raw_generation_json=None if generation is None else json.dumps(generation),
    )


def _own_json(config: LlamaConfig) -> dict[str, Any]:
    """The config.json that was read; of a checkpoint with a vision tower, its text model's."""
    raw = json.loads(config.raw_json)
    return raw if config.wrapper is None else text_json(raw, WRAPPERS[config.wrapper])


def config_to_json(config: LlamaConfig) -> dict[str, Any]:
    """config.json for a folder of this model in full precision.

    It is the file that was read, with the fields that fastlora may have changed. Of a checkpoint
    with a vision tower it is that of the text model alone.
    """
    raw = _own_json(config)
    raw.pop("quantization_config", None)
    # If the file has both names, both are set: transformers 5 prefers dtype, 4 reads torch_dtype.
    for name in {"dtype", "torch_dtype"} & raw.keys() or {"dtype"}:
        raw[name] = config.dtype
    changed = {"vocab_size": config.vocab_size, "tie_word_embeddings": config.tie_word_embeddings}
    return raw | changed


def generation_config_to_json(config: LlamaConfig) -> dict[str, Any]:
    """generation_config.json for a folder of this model.

    It is the file that was read: temperature, top_p and other settings of generation stay, and the
    special ids too, unless the config has others than the files. Without such a file it holds the
    special ids.
    """
    read = None if config.raw_generation_json is None else json.loads(config.raw_generation_json)
    if read is not None:
        defaults = FAMILIES[config.model_type].defaults
        of_files = _token_ids(_own_json(config), read, defaults, [])
        if all(getattr(config, name) == value for name, value in of_files.items()):
            return read
    eos = config.eos_token_id
    # transformers writes a single stop id as a number, several as a list.
    ids = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos),
        "pad_token_id": config.pad_token_id,
    }
    given = {name: value for name, value in ids.items() if value not in (None, [])}
    return (read or {}) | given


def _family(model_type: Any) -> Family:
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    known = ", ".join([*FAMILIES, *WRAPPERS])
    raise ValueError(
        f"model_type is {show(model_type)}, but fastlora knows {known}; "
        "is this a Llama-like language model?"
    )


def _attention_fields(settings: Fields, read: dict[str, Any], family: Family) -> dict[str, Any]:
    """Head counts, head_dim, and the norms and biases of attention."""
    hidden, problems = read["hidden_size"], settings.problems
    heads = settings.read("num_attention_heads", "a positive integer")
    # Before grouped-query attention files had no such field, or null: one key head per query head.
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
    if family.one_bias and read["attention_bias"] != read["mlp_bias"]:
        problems.append(
            f"attention_bias is {read['attention_bias']} and mlp_bias {read['mlp_bias']}; expected"
            f" both or neither for {family.name}"
        )
    output_bias = read["attention_bias"] and family.o_proj_bias
    if family.o_proj_bias_field is not None:
        output_bias = settings.read(family.o_proj_bias_field, "true or false")
    return dict(
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        attention_output_bias=output_bias,
        qk_norm=family.qk_norm,
        rope_of_neighbours=family.rope_of_neighbours,
        fused_projections=family.fused_projections,
        shared_mlp=family.shared_mlp,
    )


def _scale_fields(settings: Fields, hidden: int | None, family: Family) -> dict[str, Any]:
    """Factors and caps of the embedding, of attention's scores and of the logits."""
    given = {name: optional(settings, name) for name in family.reads}
    scalar, multiplier = given.get("query_pre_attn_scalar"), given.get("embedding_multiplier")
    width = hidden**0.5 if family.scaled_embedding and hidden else None
    return dict(
        embedding_scale=width if multiplier is None else multiplier,
        scales_decoder_input=multiplier is not None,
        residual_scale=given.get("residual_multiplier") or 1.0,
        logit_divisor=given.get("logits_scaling") or 1.0,
        attention_scale=given.get("attention_multiplier") if scalar is None else scalar**-0.5,
        attention_cap=given.get("attn_logit_softcapping"),
        logit_cap=given.get("final_logit_softcapping"),
    )


def _token_ids(
    raw: dict[str, Any],
    generation: dict[str, Any],
    defaults: Mapping[str, Any],
    problems: list[str],
) -> dict[str, Any]:
    """Special ids of both files. Llama 1 writes a negative id for "none"."""
    files = ((raw, ""), (generation, " in generation_config.json"))

    def ids(name: str) -> list[int]:
        # The family's default counts only if neither file has the field: Llama's eos 2 would be
        # wrong beside a generation_config.json that says 128009.
        sources = [(d, of) for d, of in files if name in d] or [(defaults, "")]
        values: list[Any] = []
        for source, of in sources:
            given = source.get(name)
            new = given if isinstance(given, list) else [given]
            if any(v is not None and not is_int(-(2**31))(v) for v in new):
                problems.append(f"{name}{of} is {show(given)}; expected token ids or null")
                return []
            values += new
        return [v for v in dict.fromkeys(values) if v is not None and v >= 0]

    return dict(
        bos_token_id=next(iter(ids("bos_token_id")), None),
        eos_token_id=tuple(ids("eos_token_id")),
        pad_token_id=next(iter(ids("pad_token_id")), None),
    )
