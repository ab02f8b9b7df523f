"""Configurations that fastlora cannot run are refused by the name of the field."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlora.models.config_json import config_from_json
from oracles.config_json import LLAMA3, MODEL_TYPES, SIZES, raw_config, transformers_says

DENSE: dict = dict(model_type="granitemoehybrid", num_local_experts=0)
DENSE |= dict(position_embedding_type="rope")
LONGROPE: dict = dict(type="longrope", short_factor=[1.0] * 8, long_factor=[2.0] * 8)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (dict(model_type="gpt2"), "'gpt2'"),
        (dict(model_type="mixtral", num_experts_per_tok=9), "num_experts_per_tok is 9; .*most"),
        (dict(model_type="mixtral", num_local_experts=-1), "num_local_experts is -1"),
        (dict(model_type="qwen3_moe", num_experts=10**9), "num_experts is 1000000000"),
        (
            dict(model_type="mixtral", num_experts=9999, num_hidden_layers=999),
            "9,989,001; expected",
        ),
        (dict(model_type="qwen3_moe", mlp_only_layers=[None]), "mlp_only_layers is"),
        (dict(model_type="qwen3_moe", decoder_sparse_step=0), "decoder_sparse_step is 0"),
        (dict(model_type="qwen3_moe", moe_intermediate_size=0), "moe_intermediate_size is 0"),
        (dict(model_type=["llama"]), r"\['llama'\]"),
        (dict(model_type=None), "None"),
        (dict(hidden_act="gelu"), "'gelu'"),
        (dict(hidden_act=None), "hidden_act is None"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5"),
        (dict(rope_parameters=dict(rope_type="default", partial_rotary_factor=0.5)), "partial"),
        (dict(quantization_config={"quant_method": "gptq"}), "'gptq'"),
        (dict(quantization_config={"quant_method": "bitsandbytes"}), "neither load_in_4bit"),
        (dict(quantization_config={"quant_method": "hqq", "load_in_4bit": True}), "'hqq'"),
        (dict(quantization_config="fp8"), "quantization_config"),
        (dict(rope_scaling={"type": "longrope"}), "short_factor is missing"),
        (dict(rope_scaling=LONGROPE | {"short_factor": []}), r"short_factor is \[\]"),
        (dict(rope_scaling=LONGROPE | {"long_factor": [1.0, -1.0]}), "long_factor is .*positive"),
        (dict(rope_scaling=LONGROPE | {"long_factor": [1.0] * 7}), "has 7 numbers.*the 8 pairs"),
        (
            dict(rope_scaling=LONGROPE | {"original_max_position_embeddings": 1}),
            "divides by its logarithm",
        ),
        (dict(model_type="phi3", partial_rotary_factor=1.5), "partial_rotary_factor is 1.5"),
        (dict(model_type="phi3", partial_rotary_factor=0.2), "RoPE would rotate 3 of 16 .* even"),
        (dict(model_type="phi3", rope_scaling={"type": "yarn"}), "short_factor is missing"),
        (dict(model_type="granite", logits_scaling=0), "logits_scaling is 0"),
        (dict(model_type="granite", residual_multiplier="1"), "residual_multiplier is '1'"),
        (dict(model_type="cwm", sliding_window=None), "sliding_window is null"),
        (dict(model_type="granitemoehybrid"), "num_local_experts is 8; only 0"),
        (DENSE | dict(position_embedding_type="nope"), "is 'nope'; only 'rope'"),
        (DENSE | dict(layer_types=["mamba"] * 6), "layer_types is"),
        (DENSE, "layer_types is"),  # absent: all are Mamba layers
        (dict(model_type="seed_oss", attention_out_bias=0), "attention_out_bias is 0"),
        (dict(rope_scaling={"rope_type": None, "type": "linear"}), "rope_type is None"),
        (dict(rope_scaling={"rope_type": ["yarn"]}), r"rope_type is \['yarn'\]"),
        (dict(rope_scaling=[1]), r"rope_parameters is \[1\]"),
        (dict(rope_scaling={"type": "linear"}), "factor is missing"),
        (dict(rope_scaling={"type": "linear", "factor": "2"}), "factor is '2'"),
        (dict(rope_scaling={"type": "linear", "factor": 0}), "factor is 0"),
        (dict(rope_scaling={"type": "llama3", "factor": 2.0}), "low_freq_factor is missing"),
        (dict(rope_scaling={"type": "llama3", **LLAMA3, "low_freq_factor": 4}), "high_freq_factor"),
        (dict(rope_parameters={"full_attention": {}}), "full_attention.*per layer type"),
        (dict(rope_theta=None), "rope_theta is None"),
        (dict(hidden_size="512"), "hidden_size is '512'; expected a positive integer"),
        (dict(hidden_size=True), "hidden_size is True"),
        (dict(hidden_size=512.0), "hidden_size is 512.0"),
        (dict(hidden_size=0), "hidden_size is 0"),
        (dict(hidden_size=500), "hidden_size is 500.*multiple"),
        (dict(hidden_size=10**400), "hidden_size is 1000"),
        (dict(num_hidden_layers=10**6), "num_hidden_layers"),
        (dict(num_key_value_heads=5), "multiple of num_key_value_heads 5"),
        (dict(head_dim=7), "head_dim is 7"),
        (dict(hidden_size=32), "head_dim is 1;"),
        (dict(rms_norm_eps=float("nan")), "rms_norm_eps is nan"),
        (dict(rms_norm_eps=10**400), "rms_norm_eps"),
        (dict(tie_word_embeddings="false"), "tie_word_embeddings is 'false'"),
        (dict(mlp_bias=1), "mlp_bias is 1"),
        (dict(eos_token_id="</s>"), "eos_token_id"),
        (dict(bos_token_id=True), "bos_token_id"),
        (dict(dtype="float8_e4m3fn"), "float8_e4m3fn"),
        (dict(dtype={"": "float32"}), "dtype"),
        (dict(model_type="qwen2", layer_types=["full_attention"]), "layer_types.*6 layers"),
        (dict(model_type="qwen2", layer_types=["chunked"] * 6), "layer_types"),
        (dict(model_type="qwen2", layer_types=[[]] * 6), "layer_types"),
        (dict(model_type="qwen2", layer_types=["sliding_attention"] * 6), "no window"),
        (dict(model_type="mistral", layer_types=["full_attention"] * 6), "mistral"),
        (dict(model_type="mistral", sliding_window=-1), "sliding_window is -1"),
        (dict(model_type="qwen2", max_window_layers=None), "max_window_layers is None"),
        (dict(model_type="smollm3", no_rope_layers=[1, 0]), "no_rope_layers.*6 layers"),
        (dict(model_type="smollm3", no_rope_layers=[2] * 6), "no_rope_layers"),
        (dict(model_type="smollm3", no_rope_layer_interval=0), "no_rope_layer_interval is 0"),
        (dict(model_type="gemma2", hidden_activation="gelu"), "hidden_activation is 'gelu'; only"),
        (
            dict(model_type="gemma2", use_bidirectional_attention=True),
            "use_bidirectional_att.*True",
        ),
        (dict(model_type="gemma2", query_pre_attn_scalar=0), "query_pre_attn_scalar is 0"),
        (dict(model_type="gemma2", attn_logit_softcapping=-1), "attn_logit_softcapping is -1"),
        (dict(model_type="gemma3_text", sliding_window=None), "some layers .* have a window"),
        (dict(model_type="gemma3_text", sliding_window_pattern=0), "sliding_window_pattern is 0"),
        (
            dict(model_type="gemma3_text", rope_local_base_freq=0),
            "sliding_attention.rope_theta is 0",
        ),
        (dict(model_type="olmo3", rope_parameters={"rope_theta": 1e4}), "expected full_attention"),
        (dict(model_type="olmo3", rope_parameters={"full_attention": 3}), "expected objects"),
        (dict(model_type="olmo3", rope_scaling=[2]), r"rope_parameters is \[2\]"),
    ],
    ids=lambda x: str(x)[:50],
)
def test_an_unsupported_configuration_is_refused_by_field(changed, words):
    with pytest.raises(ValueError, match=words):
        config_from_json(raw_config() | changed)


@pytest.mark.parametrize("name", SIZES)
def test_a_missing_size_is_named(name):
    raw = raw_config()
    del raw[name]
    with pytest.raises(ValueError, match=f"{name} is missing"):
        config_from_json(raw)


def test_all_problems_are_listed_at_once():
    raw = raw_config(hidden_act="gelu", num_key_value_heads=5, rope_scaling={"type": "su"}, dtype=1)
    with pytest.raises(ValueError) as refused:
        config_from_json(raw)
    for words in ("hidden_act", "num_key_value_heads", "'su'", "dtype"):
        assert words in str(refused.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)

MORE = ("rope_scaling", "quantization_config", "num_experts", "mlp_only_layers")
FIELDS = sorted({*transformers_says(raw_config()), *SIZES, *MORE, "decoder_sparse_step"})
ROPE_FIELDS = ["rope_type", "type", "rope_theta", *LLAMA3, "beta_fast", "mscale", "truncate"]


@settings(max_examples=150, deadline=None)
@given(
    model_type=st.sampled_from(MODEL_TYPES),
    changed=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3),
    rope=st.dictionaries(
        st.sampled_from(ROPE_FIELDS), JSON | st.sampled_from(["yarn", "llama3"]), max_size=4
    ),
)
def test_any_json_is_read_or_refused(model_type, changed, rope):
    try:
        config = config_from_json(raw_config(model_type, rope_parameters=rope) | changed)
    except ValueError:
        return
    assert hash(config) == hash(replace(config))
    json.loads(config.raw_json)
