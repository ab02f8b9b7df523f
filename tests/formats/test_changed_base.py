"""Adapters over a base that is not the checkpoint's: saved with equal logits, or refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastlora
from faults import folders
from faults.case import IDS, tuned

CURE = "save_pretrained_merged"


@pytest.fixture
def base(tmp_path) -> Path:
    """A model's folder with its tokenizer."""
    return folders.write_all(tmp_path) / "base"


def load(folder, **settings):
    return fastlora.load(folder, device="cpu", **settings)[0]


def assert_same_logits(folder, model):
    torch.testing.assert_close(load(folder)(IDS), model(IDS), rtol=1e-5, atol=1e-5)


MERGES = {
    "projections": {},
    "a norm": dict(modules_to_save=["norm"]),
    "one projection": dict(target_modules=["q_proj"], layers_to_transform=[1]),
}


@pytest.mark.parametrize("settings", MERGES.values(), ids=MERGES)
def test_an_adapter_over_a_merged_base_is_refused_before_any_file(base, tmp_path, settings):
    # In bfloat16, which merged folders have, so that the folder below holds the same bits.
    model = tuned(fastlora.merge(tuned(load(base, dtype="bfloat16"), **settings)), seed=1)
    before = model(IDS)
    for save in (model.save_pretrained, lambda to: model.save_pretrained_merged(to, None, "lora")):
        with pytest.raises(ValueError, match=CURE) as error:
            save(tmp_path / "out")
        assert str(base) in str(error.value)
    with pytest.raises(ValueError, match=CURE):
        model.push_to_hub("a/b", token="hf_x")
    assert not (tmp_path / "out").exists()
    assert torch.equal(model(IDS), before)
    # The cure holds what it says.
    model.save_pretrained_merged(tmp_path / "both")
    assert_same_logits(tmp_path / "both", fastlora.merge(model))


def test_adapters_over_a_merged_folder_are_saved(base, tmp_path):
    changed = tuned(fastlora.merge(tuned(load(base))), seed=1)
    fastlora.disable(changed).save_pretrained_merged(tmp_path / "merged")
    model = tuned(load(tmp_path / "merged"), seed=1)
    model.save_pretrained(tmp_path / "adapter")
    assert_same_logits(tmp_path / "adapter", model)


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
def test_a_merged_embedding_or_head_is_written_beside_the_adapter(base, tmp_path, name):
    first = tuned(load(base), target_modules=[name])
    model = tuned(fastlora.merge(first), seed=1)
    model.save_pretrained(tmp_path / "adapter")
    assert_same_logits(tmp_path / "adapter", model)


def test_a_pair_that_came_apart_is_refused(tmp_path):
    base = folders.write_model(tmp_path / "base", tie_word_embeddings=True)
    path = base / "model.safetensors"
    tensors = {k: x.clone() for k, x in load_file(path).items() if k != "lm_head.weight"}
    save_file(tensors, path, {"format": "pt"})
    first = tuned(load(base), target_modules=["lm_head"])
    with pytest.raises(ValueError, match=CURE):
        tuned(fastlora.merge(first), seed=1).save_pretrained(tmp_path / "adapter")


def test_other_functions_keep_what_merging_changed(base, tmp_path):
    model, tokenizer = fastlora.load(base, device="cpu")
    merged = fastlora.merge(tuned(model))
    grown, _, _ = fastlora.add_tokens(merged, tokenizer, ["<new>"])
    both = [tuned(merged, seed) for seed in (1, 2)]
    saved = tuned(model)
    saved.save_pretrained(tmp_path / "over-the-original")
    models = {
        "add_tokens": tuned(grown),
        "combine": fastlora.combine(both, [1.0, 1.0]),
        "load_adapter": fastlora.load_adapter(merged, tmp_path / "over-the-original"),
        "disable": tuned(fastlora.disable(both[0])),
        "pissa": fastlora.lora(merged, r=2, init_lora_weights="pissa"),
        "twice": tuned(fastlora.merge(both[0])),
    }
    for name, changed in models.items():
        with pytest.raises(ValueError, match=CURE):
            changed.save_pretrained(tmp_path / name)
        assert not (tmp_path / name).exists(), name


def test_training_into_a_folder_is_refused_before_the_first_step(base, tmp_path):
    model, tokenizer = fastlora.load(base, device="cpu")
    changed, steps = tuned(fastlora.merge(tuned(model))), []
    settings = dict(max_steps=1, packing=False, progress=False, log=steps.append)
    with pytest.raises(ValueError, match=rf"output_dir(.|\n)*{CURE}"):
        fastlora.train(changed, tokenizer, folders.rows(4), output_dir=tmp_path / "run", **settings)
    assert not steps
    assert not (tmp_path / "run").exists()


def test_a_local_base_has_no_revision(base, tmp_path):
    model = tuned(load(base, revision="v1"))
    assert model.spec.revision is None
    model.save_pretrained(tmp_path / "adapter")
    assert (
        json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["revision"] is None
    )
