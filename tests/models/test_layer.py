"""One decoder layer against transformers' and PEFT's arithmetic, term by term in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map

from fastlora import functional as FL
from fastlora.models.layer_spec import layer_spec
from fastlora.models.mlp import mlp_block
from fastlora.models.params import PROJECTIONS
from fastlora.models.projections import project
from fastlora.ops.dropout import dropout, fold
from oracles.pairs import adapted
from oracles.trees import token_ids

EVERY = tuple(PROJECTIONS)


@pytest.fixture
def model(pair):
    return adapted(pair("llama_bias").model, r=4, lora_alpha=6, lora_dropout=0.3)


def inputs(width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 5, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("key", [None, 11])
def test_a_projection_is_the_base_plus_a_scaled_low_rank_term(name, key, model):
    """y = x W' + bias + (alpha / r) dropout(x) A' B', with the projection's own mask."""
    params, adapter = model.base["layers"][0], model.adapter["layers"][0]
    x = inputs(params[name]["weight"].shape[1])
    key = None if key is None else torch.tensor(key)
    (y,) = project(x, (name,), params, adapter, layer_spec(model.spec, 0), key)
    masked = x if key is None else dropout(x, 0.3, fold(key, EVERY.index(name)))
    x_a = masked @ adapter[name].a.t() @ adapter[name].b.t()
    expected = x @ params[name]["weight"].t() + params[name]["bias"] + 6 / 4 * x_a
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("key", [None, 11])
def test_a_dora_projection_is_pefts_formula(name, key, pair):
    """peft 0.21.2, variants.py:230: base + (m/n - 1) W x' + m/n s B A x', x' = dropout(x)."""
    model = adapted(pair("llama_bias").model, r=4, lora_alpha=6, lora_dropout=0.3, use_dora=True)
    params, lora = model.base["layers"][0], model.adapter["layers"][0][name]
    weight, x = params[name]["weight"], inputs(params[name]["weight"].shape[1])
    key = None if key is None else torch.tensor(key)
    spec = layer_spec(model.spec, 0)
    (y,) = project(x, (name,), params, model.adapter["layers"][0], spec, key)
    masked = x if key is None else dropout(x, 0.3, fold(key, EVERY.index(name)))
    update = 6 / 4 * lora.b @ lora.a
    gain = lora.magnitude / (weight + update).norm(dim=1)
    base = F.linear(x, weight, params[name]["bias"])
    expected = base + (gain - 1) * (masked @ weight.t()) + gain * (masked @ update.t())
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_a_lora_bias_is_scaled_with_its_matrix(pair):
    model = adapted(pair("llama_bias").model, r=4, lora_alpha=6, lora_bias=True)
    params, lora = model.base["layers"][0], model.adapter["layers"][0]["up_proj"]
    x, spec = inputs(32), layer_spec(model.spec, 0)
    (y,) = project(x, ("up_proj",), params, model.adapter["layers"][0], spec, None)
    base = F.linear(x, params["up_proj"]["weight"], params["up_proj"]["bias"])
    expected = base + 6 / 4 * (x @ lora.a.t() @ lora.b.t() + lora.bias)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_projections_computed_together_equal_each_alone(model):
    params, adapter = model.base["layers"][0], model.adapter["layers"][0]
    x, spec = inputs(32), layer_spec(model.spec, 0)
    for key in (None, torch.tensor(5)):
        names = ("q_proj", "k_proj", "v_proj")
        together = project(x, names, params, adapter, spec, key)
        for name, y in zip(names, together, strict=True):
            (alone,) = project(x, (name,), params, adapter, spec, key)
            torch.testing.assert_close(y, alone, rtol=1e-6, atol=1e-6)


def test_a_projection_without_an_adapter_is_the_base(model):
    params, adapter = model.base["layers"][0], dict(model.adapter["layers"][0])
    del adapter["k_proj"]
    x, spec = inputs(32), layer_spec(model.spec, 0)
    q, k = project(x, ("q_proj", "k_proj"), params, adapter, spec, None)
    assert torch.equal(k, F.linear(x, params["k_proj"]["weight"], params["k_proj"]["bias"]))
    assert not torch.allclose(q, F.linear(x, params["q_proj"]["weight"], params["q_proj"]["bias"]))


def test_the_mlp_block_is_swiglu(model):
    params = model.base["layers"][0]
    x = inputs(32)
    normed = F.rms_norm(
        x, (32,), params["post_attention_layernorm"], model.spec.config.rms_norm_eps
    )
    linear = lambda x, name: F.linear(x, params[name]["weight"], params[name]["bias"])
    expected = x + linear(
        F.silu(linear(normed, "gate_proj")) * linear(normed, "up_proj"), "down_proj"
    )
    ours = mlp_block(x, params, {}, layer_spec(model.spec, 0), None)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_every_projection_and_layer_draws_its_own_mask(tiny):
    """One adapted projection at a time: no two of them drop the same inputs."""
    ids = token_ids(1, 6)
    plain = tiny.with_adapter(None)(ids)
    zero = tree_map(torch.zeros_like, tiny.adapter)
    drops = set()
    for layer in range(2):
        for name in EVERY:
            layers = [dict(x) for x in zero["layers"]]
            layers[layer][name] = tiny.adapter["layers"][layer][name]
            adapter = {"layers": tuple(layers)}
            moved = FL.forward(adapter, tiny.base, tiny.spec, ids, seed=1) - plain
            again = FL.forward(adapter, tiny.base, tiny.spec, ids, seed=2) - plain
            assert moved.any() and not torch.equal(moved, again), (layer, name)
            drops.add(moved.sum().item())
    assert len(drops) == 2 * len(EVERY)


def test_layers_with_equal_settings_share_a_spec(pair):
    smollm3 = pair("smollm3").model.spec  # every fourth layer has no RoPE
    specs = [layer_spec(smollm3, i) for i in range(4)]
    assert specs[0] == specs[1] == specs[2] != specs[3]
    assert hash(specs[0]) == hash(specs[2])
