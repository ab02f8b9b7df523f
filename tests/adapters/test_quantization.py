"""quantize(), LoftQ in 4 bits, and initialisation over a quantised base."""

from dataclasses import replace

import pytest
import torch
from torch.utils._pytree import tree_leaves

import fastlora
from fastlora import functional as FL
from fastlora.errors import CheckpointError
from fastlora.models.params import is_quantized
from fastlora.ops.quant.dequantize import dequantize
from oracles.pairs import adapted
from oracles.quantized_bases import BATCH, IDS, _module, dense_twin, load, weights
from oracles.trees import relative_error, same_bits, token_ids

# ── quantize(), LoftQ ──


def test_quantize_is_loading_in_4_bits(dense_folder):
    plain = load(dense_folder())
    before = [x.clone() for x in tree_leaves(plain.base)]
    found = fastlora.quantize(plain)
    wanted = load(dense_folder(), load_in_4bit=True)
    assert found.spec == wanted.spec and same_bits(found.base, wanted.base)
    assert same_bits(tree_leaves(plain.base), before) and not is_quantized(plain.base)
    assert fastlora.quantize(found) is found
    assert found.base["embed_tokens"] is plain.base["embed_tokens"]
    tuned = adapted(plain, r=2)
    assert same_bits(fastlora.quantize(tuned).adapter, tuned.adapter)
    with pytest.raises(ValueError, match="initialisation took out"):
        fastlora.quantize(fastlora.lora(plain, r=2, init_lora_weights="pissa"))
    with pytest.raises(ValueError, match="experts"):
        fastlora.quantize(load(dense_folder("mixtral")))
    with pytest.raises(ValueError, match="float64"):
        fastlora.quantize(load(dense_folder(), dtype="float64"))


def test_loftq_reduces_the_error_of_4_bits(dense_folder, tmp_path):
    names = ["q_proj", "down_proj"]
    model = load(dense_folder(), load_in_4bit=True)
    tuned = fastlora.lora(model, r=8, lora_alpha=8, target_modules=names, init_lora_weights="loftq")
    assert same_bits(tuned.base, model.base)
    plain = weights(load(dense_folder()))
    for i, layer in enumerate(tuned.adapter["layers"]):
        for name, (a, b) in layer.items():
            key = f"model.layers.{i}.{_module(name)}.weight"
            lost = plain[key] - dequantize(weights(model)[key], torch.float32)
            u, s, vh = torch.linalg.svd(lost)  # peft 0.21.2, loftq_utils.py:_loftq_init_new
            torch.testing.assert_close(b @ a, (u[:, :8] * s[:8]) @ vh[:8], rtol=1e-4, atol=1e-5)
            assert a.norm() == pytest.approx(b.norm().item(), rel=1e-4)  # a root on either side
    plain = load(dense_folder())
    with torch.no_grad():
        gap = [(m(IDS) - plain(IDS)).square().mean() for m in (tuned, model)]
    assert gap[0] < gap[1]
    tuned.save_pretrained(tmp_path)  # it starts from the 4-bit base
    again = fastlora.load_adapter(model, tmp_path)
    assert same_bits(again.adapter, tuned.adapter) and not again.spec.changed


def test_loftq_with_dora_starts_as_the_sum(dense_folder):
    model = load(dense_folder(), load_in_4bit=True)
    tuned = fastlora.lora(model, r=8, init_lora_weights="loftq", use_dora=True)
    plain = fastlora.lora(model, r=8, init_lora_weights="loftq")
    with torch.no_grad():
        torch.testing.assert_close(tuned(IDS), plain(IDS), rtol=1e-4, atol=1e-4)


def test_loftq_without_the_original_is_reported(quantised_folder, dense_folder):
    with pytest.raises(CheckpointError, match=r"nf4 there too(.|\n)*load_in_4bit=True"):
        fastlora.lora(load(quantised_folder("nf4 nested")), init_lora_weights="loftq")
    model = load(dense_folder(), load_in_4bit=True)
    lost = replace(model, spec=replace(model.spec, name_or_path="./gone"))
    with pytest.raises(FileNotFoundError, match="gone"):
        fastlora.lora(lost, init_lora_weights="loftq")


@pytest.mark.parametrize("method", ["corda", "lora_ga", "eva"])
def test_initialising_from_data_reads_the_dequantised_weights(method, dense_folder):
    model = load(dense_folder(), load_in_4bit=True)
    lora = dict(r=2, target_modules=["q_proj", "down_proj"])
    batches = [
        {"input_ids": token_ids(4, 11, seed=s), "labels": token_ids(4, 11, seed=s)} for s in (1, 2)
    ]
    ours, theirs = (
        fastlora.initialize(fastlora.lora(m, **lora), batches, method)
        for m in (model, dense_twin(model))
    )
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS), theirs(IDS), rtol=1e-4, atol=1e-4)


# ── adapters, merging, saving ──


def test_the_vocabulary_may_grow(dense_folder, tmp_path):
    """New tokens, trained rows and LoRA on embedding and head work as over 16 bits."""
    model = load(dense_folder(), load_in_4bit=True)
    tuned = adapted(
        model, r=2, target_modules=["q_proj", "embed_tokens", "lm_head"],
    )  # fmt: skip
    twin = dense_twin(tuned)
    run = lambda m: fastlora.value_and_grad(FL.loss)(m.adapter, m.base, m.spec, BATCH)
    assert relative_error(run(tuned)[1], run(twin)[1]) <= 1e-5
    rows = adapted(model, r=2, trainable_token_indices=[3, 5])
    assert relative_error(run(rows)[1], run(dense_twin(rows))[1]) <= 1e-5
