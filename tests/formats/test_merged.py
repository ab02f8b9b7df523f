"""Merged models saved as Hugging Face folders. Oracle: transformers."""

import dataclasses
import json
from pathlib import Path

import pytest
import tokenizers
import torch
from safetensors.torch import load_file
from torch.utils._pytree import tree_map
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import fastlora
from fastlora.adapters.create import lora
from fastlora.adapters.edits.merging import merge
from fastlora.formats import tensors_out
from fastlora.formats.merged import save_merged
from fastlora.formats.peft.writing import save_adapter
from fastlora.models.names import tensors_from_base
from fastlora.text.tokenizer import Tokenizer
from faults import folders
from faults.case import tuned
from oracles.checkpoints import FAMILIES
from oracles.peft_cases import FORWARD
from oracles.peft_side import difference, fast, hf_logits, logits, with_random_adapter


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_folders_load_in_transformers(family, tmp_path):
    model = with_random_adapter(lora(fast(family, torch.bfloat16), r=4))
    save_merged(model, tmp_path)
    hf = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
    assert hf.dtype == torch.bfloat16
    merged = merge(model)
    state = hf.state_dict()
    for name, tensor in tensors_from_base(merged.spec.config, merged.base).items():
        assert torch.equal(state[name], tensor), name
    found, expected = hf_logits(hf).float(), logits(merged).float()
    base = logits(fast(family, torch.bfloat16)).float()
    # bf16 noise; the weights above are equal to the bit. transformers rounds OLMo, Gemma, RoPE of
    # neighbours and multipliers in other places than we do; neither errs more
    # (test_transformers_parity.py).
    config = merged.spec.config
    rounds_otherwise = config.rope_of_neighbours or config.residual_scale != 1.0
    noise = 2e-2 if any(config.sparse_layers) else 1e-2 if config.norm_kind == "narrow" else 6e-2
    assert difference(found, expected, base) <= max(noise, 3e-2 * rounds_otherwise)
    assert (expected - base).abs().max() > 0.1


def test_a_float32_base_is_rounded_to_bfloat16_after_the_merge(tmp_path):
    model = with_random_adapter(lora(fast(FORWARD), r=4))
    save_merged(model, tmp_path)
    merged = tensors_from_base(model.spec.config, merge(model).base)
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == merged.keys()
    assert all(torch.equal(found[k], t.to(torch.bfloat16)) for k, t in merged.items())
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_shards_hold_the_same_tensors_as_one_file(tmp_path, monkeypatch):
    model = with_random_adapter(lora(fast(FORWARD, torch.bfloat16), r=4))
    save_merged(model, tmp_path / "one")
    monkeypatch.setattr(tensors_out, "SHARD_BYTES", 10_000)
    save_merged(model, tmp_path / "many")
    shards = sorted((tmp_path / "many").glob("model-*.safetensors"))
    assert len(shards) > 3
    assert all(s.stat().st_size < 12_000 for s in shards)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {s.name for s in shards}
    whole = load_file(tmp_path / "one" / "model.safetensors")
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "many", dtype="auto")
    assert all(torch.equal(hf.state_dict()[k], t) for k, t in whole.items())


def test_stop_ids_go_into_the_generation_config(tmp_path):
    model = fast(FORWARD)
    config = dataclasses.replace(model.spec.config, eos_token_id=(2, 5))
    spec = dataclasses.replace(model.spec, config=config)
    save_merged(dataclasses.replace(model, spec=spec, adapter=None), tmp_path)
    hf = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert hf.generation_config.eos_token_id == [2, 5]
    assert hf.generation_config.bos_token_id == 1


def test_the_lora_method_writes_the_peft_folder(tmp_path):
    model = lora(fast(FORWARD), r=4)
    save_merged(model, tmp_path, save_method="lora")
    assert (tmp_path / "adapter_config.json").is_file()
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("method", ["merged_16bit", "lora"])
def test_the_tokenizer_is_saved_too(method, tmp_path):
    words = {"<unk>": 0, "a": 1, "rank": 2}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path / "in")
    model = lora(fast(FORWARD), r=4)
    tokenizer = Tokenizer.from_folder(tmp_path / "in", config_folder=Path(model.spec.name_or_path))
    save_merged(model, tmp_path / "out", tokenizer, method)
    read = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    assert read("a rank of")["input_ids"] == [1, 2, 0]


def test_an_unknown_save_method_is_refused(tmp_path):
    model = fast(FORWARD)
    with pytest.raises(ValueError, match="merged_8bit"):
        save_merged(dataclasses.replace(model, adapter=None), tmp_path, save_method="merged_8bit")


def test_a_merged_model_does_not_overwrite_another(tmp_path):
    model = with_random_adapter(lora(fast(FORWARD), r=4))
    base = Path(model.spec.name_or_path)
    before = {f.name: f.read_bytes() for f in base.iterdir()}
    with pytest.raises(ValueError, match="loaded from"):
        save_merged(model, base)
    assert {f.name: f.read_bytes() for f in base.iterdir()} == before
    save_adapter(model, tmp_path)
    # transformers would lay the adapter over the weights that hold it already.
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        save_merged(model, tmp_path)


def test_a_broken_merge_writes_nothing(tmp_path):
    model = lora(fast(FORWARD), r=4)
    nan = tree_map(lambda t: t * float("nan"), model.adapter)
    with pytest.raises(ValueError, match="NaN"):
        save_merged(dataclasses.replace(model, adapter=nan), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_files_keep_what_the_config_class_does_not_model(tmp_path):
    base = folders.write_all(tmp_path) / "base"
    more = {"attention_dropout": 0.1, "_name_or_path": "a/b", "use_cache": False, "my_field": [1]}
    generation = {"temperature": 0.6, "top_k": 50, "max_length": 77, "transformers_version": "4.1"}
    for name, fields in (("config.json", more), ("generation_config.json", generation)):
        path = base / name
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    model, _ = fastlora.load(base, device="cpu")
    tuned(model).save_pretrained_merged(tmp_path / "merged")
    read = lambda folder, name: json.loads((folder / name).read_text())
    written = read(tmp_path / "merged", "config.json")
    assert written == read(base, "config.json") | {"dtype": "bfloat16"}
    name = "generation_config.json"
    assert read(tmp_path / "merged", name) == read(base, name)


def test_without_a_generation_config_the_ids_of_the_config_are_written(tmp_path):
    base = folders.write_model(tmp_path / "base")
    model, _ = fastlora.load(base, device="cpu")
    tuned(model).save_pretrained_merged(tmp_path / "merged")
    written = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert written == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}


def test_a_linked_template_folder_is_refused_before_the_weights(tmp_path):
    model, tokenizer = fastlora.load(folders.write_all(tmp_path) / "base", device="cpu")
    out, outside = tmp_path / "out", tmp_path / "outside"
    out.mkdir()
    outside.mkdir()
    (out / "additional_chat_templates").symlink_to(outside)
    with pytest.raises(ValueError, match="additional_chat_templates"):
        tuned(model).save_pretrained_merged(out, tokenizer)
    assert [path.name for path in out.iterdir()] == ["additional_chat_templates"]
