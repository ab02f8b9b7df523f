"""config.json -> LlamaConfig. Oracle: transformers' own configuration classes."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from transformers import AutoConfig

from fastlora.models.config_json import config_from_json, config_to_json
from oracles.checkpoints import FAMILIES
from oracles.config_json import LLAMA3, MODEL_TYPES, WINDOWED, raw_config, transformers_says


def assert_reads_as_transformers(raw: dict) -> None:
    ours, theirs = asdict(config_from_json(raw)), transformers_says(raw)
    for name in ("rope_parameters", "sliding_rope_parameters"):
        rope, found = theirs.pop(name), ours[name]
        assert rope == (rope and {k: found[k] for k in rope})
    assert {k: ours[k] for k in theirs} == theirs


@pytest.mark.parametrize("model_type", [*MODEL_TYPES, *WINDOWED])
def test_absent_fields_get_the_defaults_of_transformers(model_type):
    assert_reads_as_transformers(raw_config(model_type))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_reads_as_in_transformers(family):
    assert_reads_as_transformers(FAMILIES[family])


@pytest.mark.parametrize(
    "changed",
    [
        dict(head_dim=20),
        dict(attention_bias=True),
        dict(attention_bias=True, mlp_bias=True),
        dict(sliding_window=None),
        dict(sliding_window=7),
        dict(use_sliding_window=True, sliding_window=7, max_window_layers=2),
        dict(use_sliding_window=True, sliding_window=7, max_window_layers=0),
        dict(use_sliding_window=True, sliding_window=7, max_window_layers=99),
        dict(use_sliding_window=True, sliding_window=None),
        dict(use_sliding_window=True, num_hidden_layers=30),
        dict(use_sliding_window=False, sliding_window=7, max_window_layers=2),
        dict(no_rope_layers=[0, 1, 0, 1, 1, 1]),
        dict(no_rope_layers=[0, 1, 0, 1, 1, 1, 0, 0]),
        dict(no_rope_layer_interval=2),
        dict(tie_word_embeddings=True),
        dict(tie_word_embeddings=False),
        dict(rope_theta=77.0),
        dict(rope_theta=77.0, rope_scaling=None),
        dict(rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
    ],
    ids=str,
)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_fields_read_as_in_transformers(model_type, changed):
    if model_type == "internlm3" and changed == dict(attention_bias=True):
        changed = dict(qkv_bias=True, bias=True)  # transformers too refuses only one of the two
    if model_type == "cwm" and "sliding_window" in changed:
        changed = dict(sliding_window=7)  # without a window transformers' model cannot run
    assert_reads_as_transformers(raw_config(model_type, **changed))


LONG = dict(type="longrope", short_factor=[1.0] * 8, long_factor=[2.5] * 8)
SU: dict = dict(
    type="su", original_max_position_embeddings=64, short_factor=[1.0] * 6, long_factor=[2.5] * 6
)


@pytest.mark.parametrize(
    ("model_type", "changed"),
    [
        ("ernie4_5", dict(use_bias=True)),
        ("ernie4_5", dict(use_bias=None, mlp_bias=True)),
        ("seed_oss", dict(attention_bias=False, attention_out_bias=True)),
        ("internlm3", dict(qkv_bias=False, bias=False)),
        ("granite", dict(embedding_multiplier=12, attention_multiplier=0.015625)),
        ("granite", dict(residual_multiplier=0.22, logits_scaling=8.0)),
        ("phi3", dict(partial_rotary_factor=0.5)),
        ("phi3", dict(rope_scaling=SU, partial_rotary_factor=0.75, sliding_window=7)),
        ("phi3", dict(rope_parameters=SU | dict(partial_rotary_factor=0.75))),
        ("llama", dict(rope_scaling=SU | LONG)),
        ("cwm", dict(rope_scaling=LLAMA3 | dict(rope_type="llama3"), rope_theta=77.0)),
        ("cwm", dict(layer_types=["full_attention", "sliding_attention"] * 3)),
        ("ministral", dict(layer_types=["sliding_attention", "full_attention"] * 3)),
    ],
    ids=str,
)
def test_a_familys_own_fields_read_as_in_transformers(model_type, changed):
    assert_reads_as_transformers(raw_config(model_type, **changed))


def test_one_switch_of_two_for_biases_is_refused_where_transformers_refuses_it():
    with pytest.raises(ValueError, match="expected both or neither for internlm3"):
        config_from_json(raw_config("internlm3", qkv_bias=True))


YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=77, beta_fast=8.0)


@pytest.mark.parametrize(
    "changed",
    [
        dict(rope_theta=7e5, rope_local_base_freq=2e4),
        dict(rope_scaling={"rope_type": "linear", "factor": 8.0}, rope_theta=7e5),
        dict(rope_scaling=dict(YARN, rope_theta=3e5)),
        dict(rope_parameters={"full_attention": dict(YARN, rope_theta=3e5)}),
        dict(rope_parameters={"sliding_attention": {"rope_type": "default", "rope_theta": 9e3}}),
        dict(sliding_window_pattern=2, sliding_window=7),
        dict(layer_types=["full_attention"] * 5 + ["sliding_attention"], sliding_window=7),
        dict(query_pre_attn_scalar=100, attn_logit_softcapping=None, final_logit_softcapping=8.0),
        dict(use_bidirectional_attention=False, hidden_act="gelu", head_dim=20),
    ],
    ids=str,
)
@pytest.mark.parametrize("model_type", WINDOWED)
def test_fields_of_windowed_families_read_as_in_transformers(model_type, changed):
    if model_type == "gemma2" and any(name.startswith("rope") for name in changed):
        changed = {}
    if model_type == "olmo3" and "hidden_act" in changed:
        changed = {}
    assert_reads_as_transformers(raw_config(model_type, **changed))


@pytest.mark.parametrize("name", ["num_key_value_heads", "head_dim"])
def test_null_reads_as_in_transformers(name):
    assert_reads_as_transformers(raw_config("llama", **{name: None}))


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize(
    "changed",
    [
        dict(num_experts=6, num_experts_per_tok=3),
        dict(num_local_experts=6, num_experts_per_tok=3),
        dict(num_local_experts=6, num_experts=5, num_experts_per_tok=3),
        dict(norm_topk_prob=True, moe_intermediate_size=40),
        dict(mlp_only_layers=[0, 4]),
        dict(mlp_only_layers=[1], decoder_sparse_step=2),
        dict(decoder_sparse_step=7),
        dict(output_router_logits=True, router_jitter_noise=0.1),
    ],
    ids=str,
)
def test_mixtures_read_as_in_transformers(model_type, changed):
    assert_reads_as_transformers(raw_config(model_type, **changed))


def test_a_mixture_with_zero_experts_is_a_dense_model():
    assert_reads_as_transformers(raw_config("qwen3_moe", num_experts=0))


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "smollm3"])
def test_layer_types_read_as_in_transformers(model_type):
    types = ["sliding_attention", "full_attention", "full_attention"] * 2
    raw = raw_config(model_type, layer_types=types, use_sliding_window=True, sliding_window=3)
    assert_reads_as_transformers(raw)


@pytest.mark.parametrize(
    "changed",
    [
        dict(rope_scaling={"type": "linear", "factor": 2}),
        dict(rope_scaling={"type": "linear", "factor": 2.0}, rope_theta=5.0),
        dict(rope_scaling={"rope_type": "dynamic", "type": "linear", "factor": 2.0}),
        dict(rope_scaling={"rope_type": "llama3", **LLAMA3}, rope_theta=5e5),
        dict(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}),
        # An old rope_scaling wins whole: the theta of rope_parameters is lost.
        dict(
            rope_scaling={"type": "linear", "factor": 2.0},
            rope_parameters={"rope_type": "default", "rope_theta": 11.0},
        ),
        dict(rope_scaling={}, rope_parameters={"rope_type": "default", "rope_theta": 11.0}),
        dict(
            rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 77},
        ),
        dict(rope_scaling={"type": "yarn", "factor": 4.0}, max_position_embeddings=99),
        dict(
            rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 77},
            original_max_position_embeddings=99,
        ),
        dict(
            rope_scaling=dict(
                rope_type="yarn",
                factor=4.0,
                beta_fast=16.0,
                beta_slow=2.0,
                mscale=0.9,
                mscale_all_dim=0.8,
                truncate=False,
            )
        ),
        dict(rope_scaling=dict(rope_type="yarn", factor=4.0, attention_factor=1.25)),
    ],
    ids=str,
)
def test_rope_resolves_as_in_transformers(changed):
    assert_reads_as_transformers(raw_config(**changed))


def test_yarn_without_a_factor_takes_the_ratio_of_contexts():
    scaling = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 512}
    config = config_from_json(raw_config(rope_scaling=scaling, max_position_embeddings=2048))
    assert config.rope_parameters.factor == 4.0


def test_one_mscale_without_the_other_is_unused():
    scaling = {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0}
    rope = config_from_json(raw_config(rope_scaling=scaling)).rope_parameters
    assert (rope.mscale, rope.mscale_all_dim) == (None, None)


# ── rope_scaling as an argument of load ───────────────────────────────────────────────────────


LINEAR = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    "stored",
    [
        dict(rope_theta=5e5, rope_scaling={"rope_type": "llama3", **LLAMA3}),
        dict(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}),
        dict(rope_theta=5e5),
    ],
    ids=str,
)
def test_given_rope_scaling_replaces_all_but_theta(stored):
    config = config_from_json(raw_config(**stored), rope_scaling=LINEAR)
    expected = config_from_json(raw_config(rope_theta=5e5, rope_scaling=LINEAR))
    assert config.rope_parameters == expected.rope_parameters
    assert_reads_as_transformers(config_to_json(config))


def test_given_original_context_wins_over_the_files():
    raw = raw_config(original_max_position_embeddings=99)
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 77}
    config = config_from_json(raw, rope_scaling=scaling)
    assert config.rope_parameters.original_max_position_embeddings == 77
    assert_reads_as_transformers(config_to_json(config))


# ── ids and dtype ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({"eos_token_id": 5}, {"eos_token_id": [7, 5, 9]}, (5, 7, 9)),
        ({"eos_token_id": [5, 6]}, {}, (5, 6)),
        ({}, {"eos_token_id": 9}, (9,)),  # and not Llama's default, 2
        ({}, {}, (2,)),
        ({"eos_token_id": None}, {}, ()),
        ({"eos_token_id": -1}, {"eos_token_id": None}, ()),
    ],
)
def test_stop_ids_are_those_of_both_files(config, generation, expected):
    raw = raw_config(**config)
    assert config_from_json(raw, generation=generation).eos_token_id == expected


def test_a_negative_pad_id_is_read_as_none():
    assert config_from_json(raw_config(pad_token_id=-1)).pad_token_id is None


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (dict(dtype="bfloat16"), "bfloat16"),
        (dict(torch_dtype="float16"), "float16"),
        (dict(torch_dtype="torch.float16"), "float16"),
        (dict(dtype="bfloat16", torch_dtype="float16"), "bfloat16"),
        ({}, "float32"),
    ],
)
def test_dtype_is_read_from_both_of_its_names(fields, expected):
    assert config_from_json(raw_config(**fields)).dtype == expected


# ── config_to_json ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", FAMILIES)
def test_a_written_config_reads_back_as_the_same_model(family):
    config = config_from_json(FAMILIES[family])
    again = config_from_json(config_to_json(config))
    assert replace(again, raw_json="") == replace(config, raw_json="")


def test_a_written_config_changes_only_the_changed_fields():
    raw = raw_config(torch_dtype="float32", tie_word_embeddings=True, some_unknown_field=[1])
    config = config_from_json(raw)
    changed = replace(config, tie_word_embeddings=False, dtype="bfloat16", vocab_size=97)
    expected = dict(tie_word_embeddings=False, torch_dtype="bfloat16", vocab_size=97)
    assert config_to_json(changed) == raw | expected
    theirs = AutoConfig.for_model(**config_to_json(changed))
    assert theirs.dtype == torch.bfloat16
    assert theirs.vocab_size == 97


def test_the_record_is_hashable_and_leaves_its_source_alone():
    raw = raw_config(rope_scaling={"rope_type": "yarn", "factor": 4.0})
    before = json.dumps(raw)
    assert hash(config_from_json(raw)) == hash(config_from_json(raw))
    assert json.dumps(raw) == before
