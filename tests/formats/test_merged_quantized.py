"""Adapters over a quantised base saved, merged, and written in 16 and 4 bits."""

import json
import shutil
import warnings
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import fastlora
from fastlora.errors import CheckpointError
from fastlora.formats import merged, tensors_out
from fastlora.models.params import PROJECTIONS, is_quantized
from oracles.checkpoints import make_checkpoint
from oracles.pairs import adapted
from oracles.quantized_bases import FAMILY, IDS, SETTINGS, load, oracle, weights
from oracles.trees import same_bits

pytestmark = pytest.mark.usefixtures("right_bitsandbytes")


def test_adapters_are_saved_and_loaded_like_those_over_16_bits(dense_folder, tmp_path):
    model = adapted(load(dense_folder(), load_in_4bit=True), r=4)
    model.save_pretrained(tmp_path)
    assert same_bits(fastlora.load_adapter(model, tmp_path).adapter, model.adapter)
    again = load(tmp_path, load_in_4bit=True)
    assert same_bits(again.base, model.base) and same_bits(again.adapter, model.adapter)
    base = oracle(dense_folder(), "nf4 nested", torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)  # transformers' to PEFT
        theirs = PeftModel.from_pretrained(base, str(tmp_path)).train()
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), theirs(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", ["plain", "DoRA", "bias", "norms and head", "pissa"])
def test_merging_gives_the_model_in_16_bits(settings, dense_folder):
    model = adapted(load(dense_folder(), load_in_4bit=True), r=4, **SETTINGS[settings])
    merged = fastlora.merge(model)
    assert not is_quantized(merged.base) and is_quantized(model.base)
    assert all(w.dtype == torch.float32 for w in weights(merged).values())
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS), model(IDS), rtol=1e-4, atol=1e-4)


def kinds_of(folder: Path) -> dict[str, torch.dtype]:
    return {k: x.dtype for k, x in load_file(folder / "model.safetensors").items()}


@pytest.mark.parametrize("how_merged", ["dequantized", "original", "auto", "folder"])
def test_the_report_names_the_base_that_the_adapter_was_added_to(
    how_merged, dense_folder, tmp_path
):
    model = adapted(load(dense_folder(FAMILY, torch.bfloat16), load_in_4bit=True), r=4)
    given: Any = dense_folder(FAMILY, torch.bfloat16) if how_merged == "folder" else how_merged
    report = model.save_pretrained_merged(tmp_path / "out", base=given)
    assert report.base == ("dequantized" if how_merged == "dequantized" else "original")
    assert {*kinds_of(tmp_path / "out").values()} == {torch.bfloat16}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    base = model if report.base == "dequantized" else load(dense_folder(FAMILY, torch.bfloat16))
    whole = fastlora.merge(replace(model, base=base.base))
    with torch.no_grad():
        assert torch.equal(theirs(IDS).logits, whole(IDS))
        ids = (7919 * torch.arange(1, 33) % model.spec.config.vocab_size)[None]
        difference = (theirs(ids).logits.double() - model(ids).double()).abs().max()
    assert report.logit_difference == pytest.approx(float(difference), rel=0.3)
    # Against the dequantised weights only rounding differs. The original weights differ more.
    assert (report.logit_difference < 0.5) == (report.base == "dequantized")


def test_a_missing_base_is_replaced_only_with_auto(dense_folder, quantised_folder, tmp_path):
    model = adapted(load(quantised_folder("nf4 nested")), r=4)
    assert model.save_pretrained_merged(tmp_path / "auto").base == "dequantized"
    with pytest.raises(CheckpointError, match="nf4 there too"):
        model.save_pretrained_merged(tmp_path / "original", base="original")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        model.save_pretrained_merged(tmp_path / "original", base="./nowhere")
    other = tmp_path / "other"
    make_checkpoint(FAMILY, other, seed=1)
    with pytest.raises(CheckpointError, match="not the matrix that was quantised"):
        model.save_pretrained_merged(tmp_path / "original", base=other)
    for wrong in (5, "", None):
        with pytest.raises((ValueError, TypeCheckError)):
            model.save_pretrained_merged(tmp_path / "original", base=wrong)
    with pytest.raises(FileNotFoundError, match=r'dequantised.*"dequantized"'):
        model.save_pretrained_merged(tmp_path / "original", base="dequantised")
    assert not (tmp_path / "original").exists()
    report = model.save_pretrained_merged(tmp_path / "given", base=dense_folder())
    assert report.base == "original"
    copy = tmp_path / "copy"
    shutil.copytree(dense_folder(), copy)
    with pytest.raises(ValueError, match="read from; choose another"):
        model.save_pretrained_merged(copy, base=copy)
    assert (copy / "model.safetensors").read_bytes() == (
        dense_folder() / "model.safetensors"
    ).read_bytes()


def test_a_base_trained_before_quantisation_is_not_an_original(dense_folder, tmp_path):
    """spec.name_or_path still names the folder; only the bytes tell."""
    first = load(dense_folder())
    tuned = adapted(first, r=4, lora_alpha=0.2)  # moves the weights by some hundredths
    again = fastlora.quantize(fastlora.merge(tuned))
    model = adapted(again, r=4)
    report = model.save_pretrained_merged(tmp_path / "auto")
    assert report.base == "dequantized"
    with pytest.raises(CheckpointError, match="not the matrix that was quantised"):
        model.save_pretrained_merged(tmp_path / "original", base="original")
    with pytest.raises(CheckpointError, match="loftq"):
        fastlora.lora(again, init_lora_weights="loftq")


def test_a_changed_folder_is_not_an_original(dense_folder, tmp_path):
    folder = tmp_path / "moving"
    shutil.copytree(dense_folder(), folder)
    model = adapted(
        fastlora.load(folder, load_in_4bit=True, dtype="bfloat16", device="cpu")[0], r=4
    )
    make_checkpoint(FAMILY, folder, seed=5)
    assert model.save_pretrained_merged(tmp_path / "out").base == "dequantized"
    long = replace(model, spec=replace(model.spec, name_or_path="x" * 5000))
    assert long.save_pretrained_merged(tmp_path / "again").base == "dequantized"


@pytest.mark.parametrize("kind", ["nf4", "fp4 nested", "int8"])
def test_the_original_is_recognised_by_its_bytes(kind, dense_folder, quantised_folder, tmp_path):
    model = adapted(load(quantised_folder(kind, torch.bfloat16)), r=4)
    folder = dense_folder(FAMILY, torch.bfloat16)
    assert model.save_pretrained_merged(tmp_path / "out", base=folder).base == "original"
    other = tmp_path / "other"
    make_checkpoint(FAMILY, other, torch.bfloat16, seed=1)
    with pytest.raises(CheckpointError, match="not the matrix"):
        model.save_pretrained_merged(tmp_path / "no", base=other)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("method", ["merged_16bit", "merged_4bit"])
def test_the_report_counts_start_factors_once(method, init, dense_folder, tmp_path):
    model = load(dense_folder(FAMILY, torch.bfloat16), load_in_4bit=True)
    model = adapted(model, r=4, init_lora_weights=init)
    report = model.save_pretrained_merged(tmp_path / "out", None, method, base="dequantized")
    ids = (7919 * torch.arange(1, 33) % model.spec.config.vocab_size)[None]
    with torch.no_grad():
        difference = (load(tmp_path / "out")(ids).double() - model(ids).double()).abs().max()
    assert report.logit_difference == pytest.approx(float(difference), rel=0.3)


def test_an_interrupted_save_leaves_the_older_folder(dense_folder, tmp_path, monkeypatch):
    model = adapted(load(dense_folder(), load_in_4bit=True), r=4)
    monkeypatch.setattr(tensors_out, "SHARD_BYTES", 20_000)
    out = tmp_path / "out"
    fastlora.merge(model).save_pretrained_merged(out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    assert len(before) > 3
    write, count = merged.write_safetensors, 0

    def full(path, tensors, *rest):
        nonlocal count
        count += 1
        if count == 2:
            raise OSError("No space left on device")
        write(path, tensors, *rest)

    monkeypatch.setattr(merged, "write_safetensors", full)
    with pytest.raises(OSError, match="No space"):
        model.save_pretrained_merged(out, base="dequantized")
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    count = 0
    with pytest.raises(OSError, match="No space"):
        model.save_pretrained_merged(tmp_path / "new", base="dequantized")
    assert not (tmp_path / "new").exists()


def test_matrices_without_an_adapter_keep_their_bytes(dense_folder, tmp_path):
    model = load(dense_folder(FAMILY, torch.bfloat16), load_in_4bit=True)
    model = adapted(model, r=4, target_modules=["q_proj"])
    model.save_pretrained_merged(tmp_path / "out", None, "merged_4bit", base="dequantized")
    again = load(tmp_path / "out")
    for name, weight in weights(model).items():
        same = same_bits(weight, weights(again)[name])
        assert same == ("q_proj" not in name)


def test_a_tokenizer_is_written_before_the_folder_is_read_back(tmp_path, monkeypatch):
    model, tokenizer = fastlora.load("demo", load_in_4bit=True, device="cpu")
    monkeypatch.setattr(merged, "largest_difference", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.save_pretrained_merged(tmp_path / "out", tokenizer)
    assert (tmp_path / "out/tokenizer.json").is_file()


def test_a_checkpoint_whose_head_alone_is_quantised_is_put_into_4_bits(dense_folder, tmp_path):
    theirs = oracle(dense_folder(), "nf4", torch.float32, llm_int8_skip_modules=list(PROJECTIONS))
    theirs.save_pretrained(tmp_path)
    assert not is_quantized(load(tmp_path).base)
    assert is_quantized(load(tmp_path, load_in_4bit=True).base)


def test_quantising_refuses_adapters_for_another_quantisation(dense_folder):
    with pytest.raises(ValueError, match="qat_scheme='int8'"):
        fastlora.quantize(fastlora.lora(load(dense_folder()), qat_scheme="int8"))


def test_a_base_argument_without_a_quantised_base_is_refused(dense_folder, tmp_path):
    plain = adapted(load(dense_folder()), r=4)
    with pytest.raises(ValueError, match="base='original'"):
        plain.save_pretrained_merged(tmp_path / "out", base="original")
    assert plain.save_pretrained_merged(tmp_path / "out") is None
    model = adapted(load(dense_folder(), load_in_4bit=True), r=4)
    with pytest.raises(ValueError, match="base='dequantized'"):
        model.save_pretrained_merged(tmp_path / "lora", save_method="lora", base="dequantized")
    assert model.save_pretrained_merged(tmp_path / "lora", save_method="lora") is None


@pytest.mark.parametrize("quantised", [True, False])
@pytest.mark.parametrize("family", [FAMILY, "llama3.2", "qwen3"])
def test_merged_4_bit_is_read_by_transformers_and_by_us(family, quantised, dense_folder, tmp_path):
    folder = dense_folder(family, torch.bfloat16)
    model = adapted(load(folder, load_in_4bit=quantised), r=4)
    report = model.save_pretrained_merged(tmp_path / "out", save_method="merged_4bit")
    again = load(tmp_path / "out")
    assert is_quantized(again.base) and again.adapter is None
    source = load(folder) if quantised and report.base == "original" else model
    merged = fastlora.quantize(fastlora.merge(replace(model, base=source.base)))
    assert same_bits(again.base, merged.base)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map="cpu").train()
    assert theirs.is_loaded_in_4bit
    with torch.no_grad():
        ours, logits = again(IDS), theirs(IDS).logits
    assert (ours - logits).abs().max() <= 1e-2 * max(1.0, logits.abs().max())
    # The same bytes and names as bitsandbytes makes of the model merged in 16 bits.
    model.save_pretrained_merged(tmp_path / "dense")
    oracle(tmp_path / "dense", "nf4 nested", torch.bfloat16).save_pretrained(tmp_path / "theirs")
    wanted, found = (load_file(tmp_path / d / "model.safetensors") for d in ("theirs", "out"))
    assert wanted.keys() == found.keys()
    for key in wanted:
        if "quant_state" in key:
            states = [json.loads(t[key].numpy().tobytes()) for t in (found, wanted)]
            assert states[0] == states[1]
        else:
            assert torch.equal(found[key], wanted[key])


def test_shards_keep_a_weight_and_its_statistics_together(dense_folder, tmp_path, monkeypatch):
    model = adapted(load(dense_folder(), load_in_4bit=True), r=4)
    model.save_pretrained_merged(tmp_path / "one", save_method="merged_4bit")
    monkeypatch.setattr(tensors_out, "SHARD_BYTES", 30_000)
    model.save_pretrained_merged(tmp_path / "many", save_method="merged_4bit")
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    homes: dict[str, set[str]] = {}
    for key, file in index["weight_map"].items():
        homes.setdefault(key.partition(".weight")[0], set()).add(file)
    assert len(set.union(*homes.values())) > 2 and all(len(f) == 1 for f in homes.values())
    assert same_bits(load(tmp_path / "many").base, load(tmp_path / "one").base)
    AutoModelForCausalLM.from_pretrained(tmp_path / "many", device_map="cpu")


def test_a_mixture_is_refused_in_4_bits(dense_folder, tmp_path):
    with pytest.raises(ValueError, match="experts"):
        load(dense_folder("mixtral")).save_pretrained_merged(
            tmp_path / "x", save_method="merged_4bit"
        )
    assert not (tmp_path / "x").exists()


def test_one_tensor_at_a_time_is_made(dense_folder, tmp_path, monkeypatch):
    """Each merged matrix is freed before the next one is made."""
    from fastlora.adapters.edits import merging

    alive: list[Any] = []
    most = 0
    real = merging.merged_weight

    def watched(*args: Any) -> Tensor:
        nonlocal most
        out = real(*args)
        alive.append(weakref.ref(out))
        most = max(most, sum(ref() is not None for ref in alive))
        return out

    monkeypatch.setattr(merging, "merged_weight", watched)
    model = adapted(load(dense_folder(), load_in_4bit=True), r=4)
    model.save_pretrained_merged(tmp_path / "out", base="dequantized")
    assert len(alive) == 28 and most <= 2
