"""Text models beside vision towers: logits, adapters both ways, and folders of the text model."""

import json
from functools import cache

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import fastlora
from fastlora.errors import CheckpointError
from fastlora.formats.mlx import save_mlx_adapter
from fastlora.models.config_json import config_from_json
from fastlora.models.wrapped_names import text_name, wrapped_name
from oracles.peft_side import with_random_adapter
from oracles.transformers_side import difference
from oracles.trees import token_ids
from oracles.wrapped import WRAPPED, make_wrapped, read_wrapped

IDS = token_ids(2, 24, vocab_size=90)


@pytest.fixture(scope="module")
def wrapped(tmp_path_factory):
    """wrapped(kind): (folder, fastlora's model, transformers' model)."""

    @cache
    def of(kind: str):
        folder = tmp_path_factory.mktemp(kind)
        oracle = make_wrapped(kind, folder)
        return folder, fastlora.load(folder, device="cpu")[0], oracle

    return of


@torch.no_grad()
def logits(oracle) -> torch.Tensor:
    return oracle(input_ids=IDS).logits


@pytest.mark.parametrize("kind", WRAPPED)
def test_logits_equal_transformers(kind, wrapped):
    _, model, oracle = wrapped(kind)
    assert model.spec.config.wrapper == kind
    assert difference(model(IDS), logits(oracle)) <= 1e-5
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    how = dict(max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=[])
    expected = oracle.generate(IDS, attention_mask=mask, **how)
    found = model.generate(IDS, attention_mask=mask, max_new_tokens=4, eos_token_id=())
    assert torch.equal(found, expected)


@pytest.mark.parametrize("respelled", ["model.{}", "language_model.{}"])
def test_files_of_other_ages_hold_the_same(respelled, wrapped, tmp_path):
    """transformers 5's own names, and those of a model without a head."""
    folder, model, oracle = wrapped("gemma3")
    prefix = respelled.removesuffix("{}")
    names = {n: n if prefix == "model." else n.removeprefix("model.") for n in oracle.state_dict()}
    tensors = {names[n]: x.clone() for n, x in oracle.state_dict().items() if "lm_head" not in n}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    assert torch.equal(fastlora.load(tmp_path, device="cpu")[0](IDS), model(IDS))


SETTINGS = {
    "names": dict(target_modules=["q_proj", "down_proj"]),
    "layers and patterns": dict(
        target_modules=["q_proj", "up_proj"],
        layers_to_transform=[1],
        rank_pattern={"layers.1.self_attn.q_proj": 2},
        alpha_pattern={"up_proj": 3},
    ),
    "copies": dict(target_modules=["v_proj"], modules_to_save=["input_layernorm", "model.norm"]),
    "embedding": dict(target_modules=["embed_tokens", "o_proj"], use_rslora=True),
    "dora": dict(target_modules=["k_proj"], use_dora=True),
    "rows": dict(target_modules=["q_proj"], trainable_token_indices=[3, 7]),
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("kind", WRAPPED)
def test_peft_computes_what_fastlora_saves(kind, settings, wrapped, tmp_path, recwarn):
    folder, model, _ = wrapped(kind)
    adapted = with_random_adapter(fastlora.lora(model, r=4, **settings))
    adapted.save_pretrained(tmp_path)
    assert (adapted(IDS) - model(IDS)).abs().max() > 1e-2
    theirs = PeftModel.from_pretrained(read_wrapped(folder), tmp_path).eval()
    assert difference(adapted(IDS), logits(theirs)) <= 1e-5
    assert not [w for w in recwarn if "missing" in str(w.message)]
    # PEFT adapted nothing in the vision tower.
    assert not [n for n, _ in theirs.named_parameters() if "vision" in n and "lora" in n]
    again = fastlora.load_adapter(model, tmp_path)
    assert torch.equal(again(IDS), adapted(IDS))
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(fastlora.load_adapter(model, tmp_path / "again")(IDS), adapted(IDS))


REGEX = r".*language_model.*\.(q_proj|gate_proj)"


@pytest.mark.parametrize(
    "settings",
    [
        dict(target_modules=REGEX),
        dict(target_modules=REGEX, modules_to_save=["language_model.norm"]),
        dict(target_modules=["model.language_model.layers.1.self_attn.v_proj"]),
        dict(target_modules=["q_proj", "v_proj"], exclude_modules=".*vision_tower.*"),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", WRAPPED)
def test_fastlora_computes_what_peft_saves(kind, settings, wrapped, tmp_path):
    folder, model, _ = wrapped(kind)
    config = LoraConfig(r=3, task_type="CAUSAL_LM", **settings)
    theirs = get_peft_model(read_wrapped(folder), config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    theirs.save_pretrained(tmp_path)
    found = fastlora.load_adapter(model, tmp_path)
    assert difference(found(IDS), logits(theirs)) <= 1e-5
    assert (found(IDS) - model(IDS)).abs().max() > 1e-2


def test_an_adapter_of_the_vision_tower_is_refused(wrapped, tmp_path):
    folder, model, _ = wrapped("gemma3")
    config = LoraConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(read_wrapped(folder), config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"vision_tower.*2 tensors are not of the text model"):
        fastlora.load_adapter(model, tmp_path)


@pytest.mark.parametrize("kind", WRAPPED)
def test_a_merged_folder_holds_the_text_model(kind, wrapped, tmp_path):
    _, model, _ = wrapped(kind)
    adapted = with_random_adapter(fastlora.lora(model, r=4))
    adapted.save_pretrained_merged(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    again = fastlora.load(tmp_path, dtype="float32", device="cpu")[0]
    raw = json.loads((tmp_path / "config.json").read_text())
    assert [type(theirs).__name__] == raw["architectures"]
    assert again.spec.config.wrapper is None and "vision_config" not in raw
    assert difference(again(IDS), logits(theirs)) <= 1e-5
    bfloat16 = 0.05 * adapted(IDS).abs().max()
    assert (again(IDS) - adapted(IDS)).abs().max() <= bfloat16


def test_mlx_names_have_the_prefix(wrapped, tmp_path):
    model = with_random_adapter(fastlora.lora(wrapped("gemma3")[1], r=4))
    save_mlx_adapter(model, tmp_path)
    names = load_file(tmp_path / "adapters.safetensors")
    assert all(name.startswith("language_model.model.layers.") for name in names)


def test_other_text_models_are_refused_by_name():
    raw = {"model_type": "mistral3", "text_config": {"model_type": "ministral3"}}
    with pytest.raises(ValueError, match=r"'mistral3' has model_type 'ministral3', but fast"):
        config_from_json(raw)
    with pytest.raises(ValueError, match="text_config is 3; expected an object"):
        config_from_json({"model_type": "gemma3", "text_config": 3})


def test_fields_beside_the_text_model_count():
    raw = WRAPPED["gemma3"] | dict(dtype="bfloat16", eos_token_id=[1, 106])
    config = config_from_json(raw, rope_scaling=dict(rope_type="linear", factor=2.0))
    assert config.dtype == "bfloat16" and config.eos_token_id == (1, 106)
    assert config.rope_parameters.factor == 2.0 and config.logit_cap is None
    assert config.sliding_rope_parameters is not None


def test_names_go_both_ways():
    for name in ("model", "model.norm.weight", "model.layers.3.mlp.up_proj", "lm_head.weight"):
        assert text_name(wrapped_name(name)) == name or name == "model"
    assert text_name("language_model.lm_head.weight") == "lm_head.weight"
    assert text_name("language_model.model.norm.weight") == "model.norm.weight"
    assert text_name("model.vision_tower.x") is None and text_name("vision_tower.x") is None
    assert text_name("something.else") == "something.else"
