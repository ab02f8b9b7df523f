"""GGUF files of every family. Oracle: llama.cpp, in xllamacpp."""

from dataclasses import replace

import gguf
import pytest

import fastlora
from fastlora.formats.gguf import verify
from fastlora.models.families.registry import family_of
from oracles.checkpoints import FAMILIES
from oracles.gguf_models import adapted, model_of, tokenizer_of
from oracles.trees import token_ids
from oracles.wrapped import make_wrapped

REFUSED = {
    "dynamic": "rope_type 'dynamic'",
    "qwen3_moe_mixed": "layers without experts",
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tokenizer_of(tmp_path_factory.mktemp("tokenizer"))


def check(found, least=12):
    assert found.logprob_difference < 0.01
    # Fewer only if a token ends the text.
    assert found.equal_ids == found.greedy_ids > least


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in REFUSED])
def test_llama_cpp_computes_the_merged_model_and_the_adapter(family, tokenizer, tmp_path):
    # Five rows of the embedding have no token.
    model = adapted(model_of(family, tmp_path / "base", len(tokenizer) + 5))
    merged = model.save_gguf(tmp_path / "m.gguf", tokenizer, "f32", verify=True).verification
    check(merged)
    assert merged.equal_texts == merged.texts == 3
    check(model.save_gguf_adapter(tmp_path / "a.gguf", verify=True).verification)


def test_longropes_long_factors(tokenizer, tmp_path):
    """Prompts beyond the trained length, in a context beyond it."""
    short = dict(original_max_position_embeddings=16)
    model = model_of("phi4_mini", tmp_path / "base", len(tokenizer), **short)
    report = model.save_gguf(tmp_path / "m.gguf", tokenizer, "f32")
    assert "more than 16 tokens" in report.notes[0]
    prompts = token_ids(2, 20, vocab_size=len(tokenizer)).tolist()
    with verify.Engine(report.path, context=128) as engine:
        found = [engine.continuation(ids, 4) for ids in prompts]
    check(verify._compared(model, prompts, found, 0, 0), 4)


def test_the_text_model_beside_a_vision_tower(tokenizer, tmp_path):
    make_wrapped("gemma3", tmp_path, vocab_size=len(tokenizer), query_pre_attn_scalar=16)
    model = adapted(fastlora.load(tmp_path, device="cpu")[0])
    check(model.save_gguf(tmp_path / "m.gguf", tokenizer, "f32", verify=True).verification)


YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=64)
LLAMA3 = dict(rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0)
LONGROPE = dict(rope_type="longrope", rope_theta=1e4, factor=2.0)
LONGROPE |= dict(short_factor=[1.0] * 4, long_factor=[2.0] * 4)
LLAMA3 |= dict(high_freq_factor=4.0, original_max_position_embeddings=32)


TWO_ROPES = {
    "full_attention": dict(rope_type="default", rope_theta=5e5),
    "sliding_attention": dict(rope_type="default", rope_theta=1e4),
}


@pytest.mark.parametrize(
    "family, config",
    [
        ("llama2", dict(head_dim=16, rope_parameters=YARN | dict(beta_slow=4.0))),
        ("llama2", dict(rope_parameters=YARN | dict(attention_factor=1.7))),
        ("qwen3", dict(rope_parameters=YARN | dict(attention_factor=1.3))),
        ("smollm3", dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=4.0))),
        ("mistral", dict(rope_parameters=LLAMA3)),
        ("granite4", dict(rope_parameters=LLAMA3, attention_bias=True)),
    ],
)
def test_scaled_rope(family, config, tokenizer, tmp_path):
    config["max_position_embeddings"] = 256
    model = model_of(family, tmp_path / "base", len(tokenizer), **config)
    check(model.save_gguf(tmp_path / "m.gguf", tokenizer, "f32", verify=True).verification)


@pytest.mark.parametrize(
    "family, settings",
    [
        ("llama_head_dim", dict(use_rslora=True, rank_pattern={"k_proj": 2, "up_proj": 7})),
        ("qwen3", dict(alpha_pattern={"q_proj": 3.0}, target_modules=("q_proj", "lm_head"))),
        ("llama2", dict(init_lora_weights="pissa", layers_to_transform=[1])),
        ("mixtral", dict(rank_pattern={"experts.down_proj": 2}, lora_alpha=5)),
        ("granite4", dict(rank_pattern={"input_linear": 7}, init_lora_weights="pissa")),
    ],
)
def test_every_scaling_of_an_adapter_is_in_its_file(family, settings, tokenizer, tmp_path):
    model = adapted(model_of(family, tmp_path / "base", len(tokenizer)), **settings)
    check(model.save_gguf_adapter(tmp_path / "a.gguf", verify=True).verification)


@pytest.mark.parametrize(
    "family, config, message",
    [
        *((family, {}, message) for family, message in REFUSED.items()),
        ("qwen3_moe", dict(norm_topk_prob=False), "norm_topk_prob is false"),
        ("qwen3", dict(attention_bias=True), "bias of o_proj"),
        ("qwen2", dict(head_dim=12), "head_dim is 12"),
        ("qwen2", dict(rope_parameters=LLAMA3), "reads no factors"),
        ("qwen3", dict(rope_parameters=YARN | dict(beta_slow=2.0)), "reads no factors"),
        ("gemma2", dict(query_pre_attn_scalar=9), "query_pre_attn_scalar is 9: .* with 16"),
        ("gemma2", dict(attn_logit_softcapping=None), "attn_logit_softcapping is null"),
        ("olmo3", dict(rope_parameters=TWO_ROPES), "sliding layers is 'default' with theta 10000"),
        ("smollm3", dict(no_rope_layers=[1, 1, 0, 1]), "RoPE except in every 4th layer"),
        ("llama2", dict(rope_parameters=LONGROPE), "rope_type 'longrope'"),
        ("seed_oss", dict(attention_out_bias=True), "bias of o_proj"),
        ("ernie4_5", dict(use_bias=True), "bias of q_proj"),
    ],
)
def test_models_that_llama_cpp_computes_otherwise_are_refused(
    family, config, message, tokenizer, tmp_path
):
    model = model_of(family, tmp_path / "base", len(tokenizer), **config)
    with pytest.raises(ValueError, match=message):
        model.save_gguf(tmp_path / "m.gguf", tokenizer)
    with pytest.raises(ValueError, match=message):
        adapted(model).save_gguf_adapter(tmp_path / "a.gguf")
    assert not list(tmp_path.glob("*.gguf"))


def test_families_without_an_architecture_are_refused(tokenizer, tmp_path, monkeypatch):
    without = lambda config: replace(family_of(config), gguf=None)
    monkeypatch.setattr("fastlora.formats.gguf.metadata.family_of", without)
    model = model_of("llama2", tmp_path / "base", len(tokenizer))
    for save in (
        lambda: model.save_gguf(tmp_path / "m.gguf", tokenizer),
        lambda: adapted(model).save_gguf_adapter(tmp_path / "a.gguf"),
    ):
        with pytest.raises(ValueError, match="no architecture for model_type 'llama'"):
            save()
    assert not list(tmp_path.glob("*.gguf"))


def test_a_window_limits_the_context_of_the_file(tokenizer, tmp_path):
    model = model_of("mistral", tmp_path / "base", len(tokenizer), sliding_window=20)
    report = model.save_gguf(tmp_path / "m.gguf", tokenizer, "f32", verify=True)
    assert "no sliding window" in report.notes[0]
    field = gguf.GGUFReader(report.path).get_field("llama.context_length")
    assert field is not None and field.contents() == 20
    check(report.verification)
