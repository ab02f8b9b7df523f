"""A decode step through kernel_layer.py equals the plain one, for every adapter kind and family."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fastlora.generation.angles import rope_table
from fastlora.generation.cache import Cache
from fastlora.generation.forward import decode, prefill
from fastlora.generation.kernel_layer import StepKernels, kernel_layer, step_kernels
from fastlora.generation.prepare import PreparedModel, prepare
from fastlora.ops.quant.weights import Weight4bit
from oracles.pairs import adapted, read_pair
from oracles.quantized_bases import load
from oracles.trees import token_ids

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTH = 16
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("llama3.2", {}),
    "few targets": ("llama2", dict(r=5, target_modules=["q_proj", "down_proj"])),
    "DoRA over biases": ("llama_bias", dict(use_dora=True)),
    "lora_bias over biases": ("qwen2", dict(lora_bias=True)),
    "offset": ("llama2", dict(r=4, init_lora_weights="pissa")),
    "q_norm": ("qwen3", {}),
    "window": ("mistral", {}),
    "layers without RoPE": ("smollm3", {}),
    "experts": ("qwen3_moe_mixed", {}),
    "RoPE of neighbours": ("helium", {}),
    "multipliers": ("granite", {}),
    "multipliers, DoRA": ("granite", dict(use_dora=True)),
    "Granite 4's MLP": ("granite4", {}),
    "fused": ("phi4_mini", {}),
    "fused, DoRA": ("phi3", dict(use_dora=True)),
    "norms behind, two RoPEs": ("olmo3", {}),
    "caps, GeGLU, scaled embedding": ("gemma2", {}),
    "q_norm of 1 + w": ("gemma3", dict(use_dora=True)),
    "LoRA on the embedding": ("llama2", dict(r=4, target_modules=["q_proj", "embed_tokens"])),
    "trained rows": ("llama2", dict(r=4, trainable_token_indices={"embed_tokens": [*range(90)]})),
}


def kernels_of(model: PreparedModel, b: int) -> StepKernels:
    """As on a GPU."""
    fused = tuple(
        layer._replace(spec=dataclasses.replace(layer.spec, fused=True)) for layer in model.layers
    )
    return step_kernels(model._replace(layers=fused), b)


def plain_step(model: PreparedModel) -> StepKernels:
    return StepKernels((None,) * len(model.layers), None)


def logits(model: PreparedModel, kernels: StepKernels, b: int) -> list[Tensor]:
    """Of two decode steps behind prompts of different lengths."""
    config = model.spec.config
    cache = Cache(config, model.base["norm"], b, LENGTH)
    ids = token_ids(b, 8, vocab_size=config.vocab_size).to(DEVICE)
    lengths, no_ids = (torch.arange(b) % 5 + 4).to(DEVICE), torch.zeros_like(ids[:, 0])
    prefill(model, cache, [*range(b)], ids, lengths, no_ids, kernels)
    table = rope_table(model, LENGTH)
    steps = []
    for i in range(2):
        steps.append(decode(model, cache, ids[:, i], lengths + i, no_ids, table, kernels, LENGTH))
    return steps


def check(model: PreparedModel, b: int) -> None:
    made = kernels_of(model, b)
    assert made.head is not None and None not in made.layers
    expected = logits(model, plain_step(model), b)
    for actual, plain in zip(logits(model, made, b), expected, strict=True):
        torch.testing.assert_close(actual, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_step_equals_the_plain_step(case, pair):
    family, settings = CASES[case]
    check(prepare(adapted(pair(family).model, **settings).to(DEVICE)), b=2)


@pytest.mark.parametrize("b", [1, 3])
@torch.no_grad()
def test_step_equals_the_plain_step_for_any_number_of_rows(b, pair):
    check(prepare(adapted(pair("llama2").model).to(DEVICE)), b)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_prompts_through_the_products_equal_the_plain_pass(case, pair):
    family, settings = CASES[case]
    model = prepare(adapted(pair(family).model, **settings).to(DEVICE))
    config, slots = model.spec.config, [0, 2]  # not consecutive: another kind of index
    ids = token_ids(2, LENGTH, vocab_size=config.vocab_size).to(DEVICE)
    lengths = torch.tensor([LENGTH + 1, LENGTH - 3], device=DEVICE)
    caches = []
    for kernels in (plain_step(model), kernels_of(model, 2)):
        caches.append(Cache(config, model.base["norm"], 3, LENGTH))
        prefill(model, caches[-1], slots, ids, lengths, torch.zeros_like(lengths), kernels)
    plain, made = caches
    for expected, actual in zip([*plain.k, *plain.v], [*made.k, *made.v], strict=True):
        assert float(expected[slots].abs().max()) > 0
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_layer_prepared_for_many_rows_serves_few(pair):
    model = prepare(adapted(pair("llama2").model).to(DEVICE))
    made = kernels_of(model, 4)
    logits(model, made, 4)
    actual = logits(model, made, 1)[1]
    expected = logits(model, plain_step(model), 1)[1]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_head_with_an_adapter_is_left_to_plain_torch(pair):
    model = adapted(pair("llama2").model, target_modules=["q_proj", "lm_head"])
    model = prepare(model.to(DEVICE))
    made = kernels_of(model, 2)
    assert made.head is None and None not in made.layers
    pairs = zip(logits(model, made, 2), logits(model, plain_step(model), 2), strict=True)
    for actual, plain in pairs:
        torch.testing.assert_close(actual, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("family", "b"), [("llama2", 1), ("llama2", 2), ("gemma2", 2)])
@torch.no_grad()
def test_step_over_nf4_equals_the_plain_step(family, b, tmp_path):
    sizes: dict[str, Any] = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    read_pair(family, tmp_path, **sizes)
    model = load(tmp_path, load_in_4bit=True)
    assert isinstance(model.base["layers"][0]["q_proj"]["weight"], Weight4bit)
    check(prepare(adapted(model).to(DEVICE)), b)


@torch.no_grad()
def test_products_of_fused_nf4_layers_equal_the_plain_step(tmp_path):
    """gate_up_proj in 4 bits is one product, whose halves torch multiplies."""
    read_pair("phi3", tmp_path, hidden_size=64, intermediate_size=128)
    model = prepare(adapted(load(tmp_path, load_in_4bit=True)))
    made = step_kernels(model, 2)
    layer = made.layers[0]
    assert layer is not None and layer.gate_up is not None and not layer.gate_up.gated
    pairs = zip(logits(model, made, 2), logits(model, plain_step(model), 2), strict=True)
    for actual, plain in pairs:
        torch.testing.assert_close(actual, plain, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_unsupported_layers_are_left_to_plain_torch(pair, quantised_folder):
    plain = pair("llama2").model
    for model in (
        adapted(plain, r=4, qat_scheme="int8"),
        load(quantised_folder("int8")),
    ):
        made = prepare(model)
        assert kernels_of(made, 1).layers == plain_step(made).layers
    half = tree_map(lambda x: x.half() if x.is_floating_point() else x, plain.base)
    layer = prepare(dataclasses.replace(plain, base=half)).layers[0]
    assert kernel_layer(layer, 1) is not None and kernel_layer(layer, 2) is None
    model = prepare(plain)
    assert kernels_of(model, 64).triton and not kernels_of(model, 65).triton
    assert kernel_layer(model.layers[0], 65) is None
    assert kernel_layer(prepare(pair("mistral").model).layers[0], 1) is None  # no window given
