"""Loading bases in 4 and 8 bits. Oracle: transformers with bitsandbytes."""

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from fastlora.ops.quant.dequantize import dequantize
from fastlora.ops.quant.weights import Weight4bit, Weight8bit
from oracles.checkpoints import FAMILIES
from oracles.quantized_bases import FAMILY, IDS, load, oracle, quantised_difference, weights
from oracles.trees import same_bits

pytestmark = pytest.mark.usefixtures("right_bitsandbytes")


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "mixtral" and "moe" not in f])
def test_every_dense_family_equals_transformers_in_4_bits(family, dense_folder):
    found = quantised_difference(dense_folder(family), torch.float32)
    assert found is not None and found <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", [FAMILY, "llama3.2", "qwen2", "qwen3", "smollm3", "mistral"])
def test_quantised_on_load_equals_transformers_model(family, dtype, dense_folder):
    folder = dense_folder(family, dtype)
    model, theirs = load(folder, load_in_4bit=True), oracle(folder, "nf4 nested", dtype)
    state = theirs.state_dict()
    for name, weight in weights(model).items():
        assert isinstance(weight, Weight4bit) and weight.form.dtype == dtype
        assert torch.equal(weight.packed, state[name].flatten())
        own = theirs.get_parameter(name).quant_state
        assert torch.equal(dequantize(weight, dtype), bnb.dequantize_4bit(state[name], own))
    assert same_bits(
        [model.base["embed_tokens"], model.base["norm"]],
        [state["model.embed_tokens.weight"], state["model.norm.weight"]],
    )
    with torch.no_grad():
        ours, logits = model(IDS), theirs(IDS).logits
        plain = load(folder)(IDS)
    scale = max(1.0, logits.abs().max().item())
    assert (ours - logits).abs().max() <= (1e-5 if dtype == torch.float32 else 1e-2) * scale
    assert (plain - logits).abs().max() > 0.05 * scale  # 4 bits are another model


@pytest.mark.parametrize("storage", ["uint8", "bfloat16", "float32"])
@pytest.mark.parametrize("kind", ["nf4", "nf4 nested", "fp4", "fp4 nested", "int8"])
def test_a_quantised_checkpoint_loads_bit_exactly(kind, storage, quantised_folder):
    if kind == "int8" and storage != "uint8":
        return  # it has one storage
    folder = quantised_folder(kind, torch.bfloat16, storage)
    model = load(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu").train()
    for name, weight in weights(model).items():
        own = theirs.get_parameter(name)
        if kind == "int8":
            assert isinstance(weight, Weight8bit)
            wanted = bnb.int8_vectorwise_dequant(own.data, own.SCB)
        else:
            assert isinstance(weight, Weight4bit)
            wanted = bnb.dequantize_4bit(own.data, own.quant_state)
        assert torch.equal(dequantize(weight, wanted.dtype), wanted)
    if kind != "int8":  # its products quantise the input as well
        with torch.no_grad():
            ours, logits = model(IDS), theirs(IDS).logits
        assert (ours - logits).abs().max() <= 1e-2 * max(1.0, logits.abs().max())
    assert load(folder, load_in_4bit=True).spec == model.spec  # never quantised twice
    assert same_bits(load(folder, load_in_4bit=True).base, model.base)


def test_a_head_in_4_bits_is_dequantised(dense_folder, tmp_path):
    """llm_int8_skip_modules may skip no layer, but fastlora's head is always dense."""
    theirs = oracle(dense_folder(), "nf4", torch.float32, llm_int8_skip_modules=["none"])
    theirs.save_pretrained(tmp_path)
    head = theirs.lm_head.weight
    model = load(tmp_path)
    assert torch.equal(model.base["lm_head"], bnb.dequantize_4bit(head.data, head.quant_state))


def test_a_skipped_layer_stays_dense(dense_folder, tmp_path):
    theirs = oracle(
        dense_folder(), "nf4", torch.float32, llm_int8_skip_modules=["q_proj", "lm_head"]
    )
    theirs.save_pretrained(tmp_path)
    model = load(tmp_path)
    kinds = {n: type(x) for n, x in weights(model).items()}
    assert {t for n, t in kinds.items() if "q_proj" in n} == {Tensor}
    assert {t for n, t in kinds.items() if "q_proj" not in n} == {Weight4bit}
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), theirs(IDS).logits, rtol=1e-5, atol=1e-5)


def test_loading_in_4_bits_changes_no_other_tensor(dense_folder):
    model = load(dense_folder(), load_in_4bit=True, dtype="bfloat16")
    assert model.base["norm"].dtype == model.base["embed_tokens"].dtype == torch.bfloat16
    assert all(w.form.dtype == torch.bfloat16 for w in weights(model).values())
    assert model.spec.config.dtype == "bfloat16"
    plain = load(dense_folder(), dtype="bfloat16")
    assert model.num_parameters() == plain.num_parameters()
    again = model.to("cpu")
    assert same_bits(again.base, model.base)
