"""config.json -> LlamaConfig; transformers' own configuration classes are the oracle."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import FAMILIES
from transformers import AutoConfig

from fastlora.models.config_json import config_from_json, config_to_json

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "mixtral", "qwen3_moe")
SIZES = dict(
    vocab_size=96,
    hidden_size=512,
    intermediate_size=64,
    num_hidden_layers=6,
    num_attention_heads=32,
)
LLAMA3 = dict(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=512
)


def raw_config(model_type: str = "llama", **changed) -> dict:
    return {"model_type": model_type, **SIZES, **changed}


def transformers_says(raw: dict) -> dict:
    """The same facts, from transformers' class and the lines of its model that read it."""
    c = AutoConfig.for_model(**json.loads(json.dumps(raw)))
    c.standardize_rope_params()  # as every rotary table does once more before it is computed
    n, family = c.num_hidden_layers, c.model_type
    window = getattr(c, "sliding_window", None)
    if family == "llama":
        types = ("full_attention",) * n
    elif family in ("mistral", "mixtral", "qwen3_moe"):
        types = ("full_attention" if window is None else "sliding_attention",) * n
    else:
        types = tuple(c.layer_types)
    bias = family == "qwen2" or (family not in ("mistral", "mixtral") and c.attention_bias)
    eos = c.eos_token_id
    return dict(
        num_key_value_heads=c.num_key_value_heads,
        head_dim=getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads,
        rms_norm_eps=c.rms_norm_eps,
        max_position_embeddings=c.max_position_embeddings,
        tie_word_embeddings=c.tie_word_embeddings,
        attention_bias=bias,
        attention_output_bias=bias and family != "qwen2",
        mlp_bias=family in ("llama", "smollm3") and c.mlp_bias,
        qk_norm=family in ("qwen3", "qwen3_moe"),
        layer_types=types,
        sliding_window=window if "sliding_attention" in types else None,
        no_rope_layers=tuple(c.no_rope_layers[:n]) if family == "smollm3" else (1,) * n,
        bos_token_id=c.bos_token_id,
        eos_token_id=() if eos is None else (eos,),
        pad_token_id=c.pad_token_id,
        **experts(c),
        rope_parameters={k: v for k, v in c.rope_parameters.items() if k != "type"},
    )


def experts(c) -> dict:
    """What the model classes of transformers read of a mixture; zeros for dense families."""
    n = c.num_hidden_layers
    if not hasattr(c, "num_experts_per_tok") or not c.num_experts:
        sizes = dict(num_local_experts=0, num_experts_per_tok=0, moe_intermediate_size=0)
        return sizes | dict(norm_topk_prob=False, sparse_layers=(False,) * n)
    mixtral = c.model_type == "mixtral"
    dense = [] if mixtral else c.mlp_only_layers
    step = 1 if mixtral else c.decoder_sparse_step
    return dict(
        num_local_experts=c.num_experts,
        num_experts_per_tok=c.num_experts_per_tok,
        moe_intermediate_size=c.intermediate_size if mixtral else c.moe_intermediate_size,
        norm_topk_prob=mixtral or c.norm_topk_prob,
        sparse_layers=tuple(i not in dense and (i + 1) % step == 0 for i in range(n)),
    )


def assert_reads_as_transformers(raw: dict) -> None:
    ours, theirs = asdict(config_from_json(raw)), transformers_says(raw)
    rope = theirs.pop("rope_parameters")
    assert {k: ours[k] for k in theirs} == theirs
    assert {k: ours["rope_parameters"][k] for k in rope} == rope


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_absent_fields_mean_what_they_mean_in_transformers(model_type):
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


def test_no_experts_are_a_dense_model():
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


def test_one_mscale_alone_is_unused():
    scaling = {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0}
    rope = config_from_json(raw_config(rope_scaling=scaling)).rope_parameters
    assert (rope.mscale, rope.mscale_all_dim) == (None, None)


# ── the user's rope_scaling ───────────────────────────────────────────────────────────────

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


def test_a_negative_pad_id_is_none():
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
def test_dtype_has_two_names(fields, expected):
    assert config_from_json(raw_config(**fields)).dtype == expected


# ── refusals ──────────────────────────────────────────────────────────────────────────────


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
        (dict(rope_scaling={"type": "longrope"}), "'longrope'"),
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
    ],
    ids=lambda x: str(x)[:50],
)
def test_what_cannot_be_run_is_refused_by_name(changed, words):
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


# ── to_hf ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", FAMILIES)
def test_to_hf_reads_back_as_the_same_model(family):
    config = config_from_json(FAMILIES[family])
    again = config_from_json(config_to_json(config))
    assert replace(again, raw_json="") == replace(config, raw_json="")


def test_to_hf_says_what_changed_and_keeps_the_rest():
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
