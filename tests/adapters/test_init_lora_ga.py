"""initialize(method="lora_ga"). Oracle: PEFT on the same batches, up to signs."""

import pytest
import torch
from peft import LoraGAConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora.loraga import preprocess_loraga
from torch.utils._pytree import tree_leaves

from fastlora.adapters.init_from_data.dispatch import initialize
from fastlora.adapters.init_from_data.lora_ga import weight_gradients
from fastlora.formats.peft.names import peft_state_dict
from fastlora.models.names import projection_path
from fastlora.models.params import PROJECTIONS
from oracles.init_from_data import batches, fresh, padded, peft_config
from oracles.peft_cases import FORWARD
from oracles.peft_side import hugging_face
from oracles.trees import same_bits


def up_to_signs(x, dim):
    """With the largest value along a dimension positive."""
    return x * x.gather(dim, x.abs().argmax(dim, keepdim=True)).sign()


def exact_svd(matrix, q, niter):
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :q], s[:q], vh[:q].T


def peft_gradients(data, config):
    model = hugging_face(FORWARD)

    def step():
        for batch in data:
            model(**batch).loss.backward()

    preprocess_loraga(model, config, step)
    return model


@pytest.mark.parametrize("data", [batches(), padded()], ids=["whole", "padded"])
def test_gradients_of_the_weights_are_those_of_autograd(data):
    oracle = peft_gradients(data, peft_config("lora_ga", lora_ga_config=LoraGAConfig()))
    found = dict(weight_gradients(fresh(), data))
    for i in range(2):
        for name in PROJECTIONS:
            expected = oracle.get_submodule(projection_path(i, name))._peft_loraga_grad
            assert (found[i][name] - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"direction": "ArBr"},
        {"direction": "A2rBr"},
        {"scale": "weight_svd"},
        {"scale": "gd_scale"},
        {"scale": "unit"},
        {"stable_gamma": 64},
    ],
)
def test_lora_ga_is_that_of_peft_up_to_signs(how, monkeypatch):
    # With r = 8 fastlora's randomised decompositions hold all directions (16 or 32).
    monkeypatch.setattr(torch, "svd_lowrank", exact_svd)
    config = peft_config("lora_ga", r=8, lora_ga_config=LoraGAConfig(**how))
    oracle = get_peft_model(peft_gradients(batches(), config), config)
    theirs = get_peft_model_state_dict(oracle)
    model = initialize(fresh(r=8), batches(), "lora_ga", **how)
    ours = peft_state_dict(model.adapter, model.spec.lora)
    assert ours.keys() == theirs.keys()
    for key, found in ours.items():
        expected = theirs[key]
        dim = 1 if "lora_A" in key else 0
        found, expected = up_to_signs(found, dim), up_to_signs(expected, dim)
        # Directions of close singular values turn into each other: 4e-5 where the gradients, which
        # are PEFT's to 1e-6, differ.
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max(), key


def test_random_directions_follow_random_state():
    make = lambda seed: initialize(
        fresh(), batches(), "lora_ga", direction="random", random_state=seed
    )
    one, two, other = (tree_leaves(make(s).adapter) for s in (1, 1, 2))
    assert same_bits(one, two) and not same_bits(one, other)


def test_a_small_step_from_lora_ga_follows_the_gradient():
    """A0 and B0 span singular directions of the gradient, computed here by an exact SVD."""
    model = initialize(fresh(r=2), batches(), "lora_ga")
    gradient = dict(weight_gradients(model, batches()))[0]["gate_proj"]
    u, _, vh = torch.linalg.svd(gradient)
    record = model.adapter["layers"][0]["gate_proj"]
    torch.testing.assert_close((record.a @ vh[:2].T).abs(), torch.eye(2), rtol=0, atol=2e-2)
    unit = record.b / record.b.norm(dim=0)
    torch.testing.assert_close((u[:, 2:4].T @ unit).abs(), torch.eye(2), rtol=0, atol=2e-2)
