"""Folders that fastlora writes, read by PEFT. Oracle: PEFT's logits and its step of training."""

import dataclasses
import json
import os
from pathlib import Path

import huggingface_hub
import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from torch.utils._pytree import tree_leaves, tree_map

from fastlora.adapters.create import lora
from fastlora.checkpoints import tensors
from fastlora.formats.peft.reading import load_adapter
from fastlora.formats.peft.writing import push_to_hub, save_adapter
from oracles.checkpoints import FAMILIES
from oracles.peft_cases import ADAPTER_CASES, FORWARD, SEVEN, every_projection
from oracles.peft_side import (
    difference,
    edit,
    export_difference,
    fast,
    hf_logits,
    hugging_face,
    logits,
    peft_read,
    peft_saved,
    step_difference,
    with_random_adapter,
)


@pytest.mark.parametrize("case", ADAPTER_CASES)
def test_saved_adapters_have_the_same_logits_in_peft(case, tmp_path):
    assert export_difference(FORWARD, tmp_path, **ADAPTER_CASES[case]) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_reads_saved_adapters_of_every_family(family, tmp_path):
    assert export_difference(family, tmp_path, **every_projection(family)) <= 1e-5


@pytest.mark.parametrize(
    "case", [c for c in ADAPTER_CASES if c.split(",")[0] not in ("pissa", "olora")]
)
def test_saved_keys_shapes_and_dtypes_are_those_of_peft(case, tmp_path):
    model = lora(fast(FORWARD), **ADAPTER_CASES[case])
    save_adapter(model, tmp_path)
    native = get_peft_model(
        hugging_face(FORWARD), PeftConfig(**ADAPTER_CASES[case], task_type="CAUSAL_LM")
    )
    expected = {k: (t.shape, t.dtype) for k, t in get_peft_model_state_dict(native).items()}
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {k: (t.shape, t.dtype) for k, t in tensors.items()} == expected


def test_patterns_keep_their_meaning_in_any_order(tmp_path):
    # The first match wins here; PEFT's own folder of this adapter cannot be read back.
    patterns = {"q_proj": 2, r"layers\.1\.self_attn\.q_proj": 6}
    alphas = {"v_proj": 40, r"layers\.1\.self_attn\.v_proj": 1}
    settings = dict(r=4, target_modules=SEVEN, rank_pattern=patterns, alpha_pattern=alphas)
    assert export_difference(FORWARD, tmp_path, **settings) <= 1e-5


@pytest.mark.parametrize("order", [sorted, lambda keys: sorted(keys, reverse=True)])
def test_saved_patterns_may_be_written_again_in_any_order(order, tmp_path):
    # PEFT sorts the keys of what it read when it saves it.
    patterns = {r"layers\.1\.self_attn\.q_proj": 6, "q_proj": 2, "0.mlp.*": 5, r"\w+_proj": 3}
    model = lora(fast(FORWARD), r=4, rank_pattern=patterns, alpha_pattern=patterns)
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for field in ("rank_pattern", "alpha_pattern"):
        edit(tmp_path, **{field: {k: config[field][k] for k in order(config[field])}})
    assert load_adapter(fast(FORWARD), tmp_path).spec.lora.targets == model.spec.lora.targets


@pytest.mark.parametrize("case", ["seven names", "both patterns, rslora", "one layer"])
def test_a_step_of_training_equals_pefts(case, tmp_path):
    assert step_difference(FORWARD, tmp_path, **ADAPTER_CASES[case]) <= 1e-6


def test_transformers_loads_the_saved_adapter(tmp_path):
    model = with_random_adapter(lora(fast(FORWARD), r=4))
    save_adapter(model, tmp_path)
    hf = hugging_face(FORWARD)
    hf.load_adapter(str(tmp_path))
    assert difference(hf_logits(hf), logits(model), logits(fast(FORWARD))) <= 1e-5


@pytest.mark.parametrize("variant", [{}, {"use_dora": True}, {"lora_bias": True}])
def test_bfloat16_errs_no_more_than_peft(variant, tmp_path):
    half = with_random_adapter(lora(fast(FORWARD, torch.bfloat16), r=4, **variant), std=0.1)
    assert {t.dtype for t in tree_leaves(half.adapter)} == {torch.float32}
    save_adapter(half, tmp_path)
    wide = dataclasses.replace(half, base=tree_map(lambda t: t.float(), half.base))
    exact, base = logits(wide), logits(dataclasses.replace(wide, adapter=None))
    assert (exact - base).abs().max() > 0.1
    error = lambda found: (found.float() - exact).square().mean().sqrt().item()
    theirs = error(hf_logits(peft_read(FORWARD, tmp_path, torch.bfloat16)))
    assert 0 < error(logits(half)) <= 1.5 * theirs


def test_round_trips_are_exact(tmp_path):
    peft_saved(FORWARD, tmp_path / "theirs", **ADAPTER_CASES["both patterns, rslora"])
    first = load_adapter(fast(FORWARD), tmp_path / "theirs")
    save_adapter(first, tmp_path / "ours")
    again = load_adapter(fast(FORWARD), tmp_path / "ours")
    assert again.spec.lora.targets == first.spec.lora.targets
    leaves = zip(tree_leaves(first.adapter), tree_leaves(again.adapter), strict=True)
    assert all(torch.equal(x, y) for x, y in leaves)
    theirs, ours = (hf_logits(peft_read(FORWARD, tmp_path / n)) for n in ("theirs", "ours"))
    assert torch.equal(theirs, ours)


def test_the_folder_has_the_files_and_fields_of_peft(tmp_path):
    model = lora(fast(FORWARD), r=4, rank_pattern={"q_proj": 2})
    save_adapter(model, tmp_path)
    files = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert {f.name for f in tmp_path.iterdir()} == files
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == model.spec.name_or_path
    assert (config["target_modules"], config["rank_pattern"]) == (SEVEN, {"q_proj": 2})
    PeftConfig(target_modules=SEVEN).save_pretrained(tmp_path / "theirs")
    theirs = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    assert config.keys() == theirs.keys()
    ours = {"base_model_name_or_path", "inference_mode", "task_type", "rank_pattern"}
    ours |= {"r", "lora_alpha", "target_modules"}
    assert {k: v for k, v in config.items() if k not in ours} == {
        k: v for k, v in theirs.items() if k not in ours
    }


def test_a_card_names_the_base_only_if_it_is_a_valid_hub_id(tmp_path):
    for name, named in (("meta-llama/Llama-3.2-1B", True), ("/data/base", False)):
        model = lora(fast(FORWARD), r=4)
        spec = dataclasses.replace(model.spec, name_or_path=name)
        save_adapter(dataclasses.replace(model, spec=spec), tmp_path / str(named))
        card = (tmp_path / str(named) / "README.md").read_text()
        assert ("base_model:" in card.split("---")[1]) is named
        assert "library_name: peft" in card


def test_an_existing_readme_is_kept(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    model = lora(fast(FORWARD), r=4)
    save_adapter(model, tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_files(call, tmp_path, monkeypatch):
    old, new = (with_random_adapter(lora(fast(FORWARD), r=4), seed=s) for s in (1, 2))
    save_adapter(old, tmp_path)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full_disk)
        with pytest.raises(OSError, match="No space"):
            save_adapter(new, tmp_path)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before


def test_a_broken_adapter_is_not_saved(tmp_path):
    model = lora(fast(FORWARD), r=4)
    nan = tree_map(lambda t: t * float("nan"), model.adapter)
    other = lora(fast(FORWARD), r=5).adapter
    for adapter, message in ((nan, "NaN"), (other, "shape"), (None, "no adapter")):
        with pytest.raises(ValueError, match=message):
            save_adapter(dataclasses.replace(model, adapter=adapter), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_unwritable_folder_is_refused_before_any_work(tmp_path):
    model = lora(fast(FORWARD), r=4)
    (tmp_path / "file").write_text("x")
    base = Path(model.spec.name_or_path)
    for folder in (tmp_path / "file", tmp_path / "file" / "below", base):
        with pytest.raises(ValueError, match=folder.name):
            save_adapter(model, folder)
    assert not (base / "adapter_config.json").exists()


def test_a_read_only_folder_is_refused(tmp_path, monkeypatch):
    model = lora(fast(FORWARD), r=4)
    # Not chmod: root, who runs most containers, may write all the same.
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    with pytest.raises(PermissionError, match="not writable"):
        save_adapter(model, tmp_path / "new")


def test_an_interrupted_save_leaves_no_weights_with_other_settings(tmp_path, monkeypatch):
    """Equal shapes, another alpha: the old settings would be read with the new weights."""
    old, new = (
        with_random_adapter(lora(fast(FORWARD), r=4, lora_alpha=alpha)) for alpha in (4, 40)
    )
    old.save_pretrained(tmp_path)
    real = tensors.atomic_write

    def failing(path, write):
        if path.name == "adapter_config.json":
            raise OSError(28, "No space left on device")
        real(path, write)

    monkeypatch.setattr(tensors, "atomic_write", failing)
    with pytest.raises(OSError, match="No space"):
        new.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="adapter_config"):
        load_adapter(fast(FORWARD), tmp_path)
    monkeypatch.setattr(tensors, "atomic_write", real)
    new.save_pretrained(tmp_path)
    assert torch.equal(logits(load_adapter(fast(FORWARD), tmp_path)), logits(new))


def test_push_uploads_the_peft_folder(monkeypatch):
    seen = {}

    class Api:
        def __init__(self, token):
            seen["token"] = token

        def create_repo(self, repo_id, private, exist_ok):
            seen["repo"] = (repo_id, private, exist_ok)
            return f"https://huggingface.co/{repo_id}"

        def upload_folder(self, repo_id, folder_path, commit_message):
            seen["files"] = sorted(os.listdir(folder_path))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    model = lora(fast(FORWARD), r=4)
    url = push_to_hub(model, "me/it", token="secret", private=True)
    assert url == "https://huggingface.co/me/it"
    assert seen["token"] == "secret" and seen["repo"] == ("me/it", True, True)
    assert seen["files"] == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
