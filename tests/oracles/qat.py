"""Logits of a fake quantised model, here and in torchao."""

import torch
from transformers import AutoModelForCausalLM

import fastlora
from fastlora.models.names import tensors_from_base
from oracles.pairs import adapted
from oracles.torchao_side import prepare
from oracles.trees import token_ids

IDS = token_ids(2, 9, vocab_size=96)

WIDE = dict(hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2)

SOME = ["q_proj", "k_proj", "o_proj", "up_proj", "down_proj"]


def trained(model, scheme, **settings):
    return adapted(model, r=4, lora_alpha=6, target_modules=SOME, qat_scheme=scheme, **settings)


def transformers_with(model):
    """transformers' model with a merged model's weights, in float32 and untied.

    A folder would round to 16 bit, and torchao gives a tied head a separate quantised tensor.
    """
    oracle = AutoModelForCausalLM.from_pretrained(model.spec.name_or_path, dtype=torch.float32)
    tensors = tensors_from_base(model.spec.config, model.base)
    tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
    oracle.lm_head.weight = torch.nn.Parameter(oracle.lm_head.weight.clone())
    oracle.load_state_dict(tensors)
    return oracle.eval()


def torchao_difference(base, scheme):
    """Mean error of the logits, relative to their mean size."""
    model = trained(base, scheme)
    merged = fastlora.merge(model)
    oracle = transformers_with(merged)
    with torch.no_grad():
        plain = oracle(IDS).logits
        expected = prepare(oracle, scheme)(IDS).logits
        ours = model(IDS)
    assert (expected - plain).abs().mean() / expected.abs().mean() > 2e-3
    assert ((ours - expected).abs() < 1e-4 * expected.abs().max()).double().mean() > 0.5
    return ((ours - expected).abs().mean() / expected.abs().mean()).item()
