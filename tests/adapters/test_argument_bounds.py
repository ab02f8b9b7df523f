"""Lengths and numbers that would take minutes, or overflow: refused within a second, by name."""

import math
import time

import pytest

import fastlora
from faults import folders
from faults.case import IDS

LONG = "x" * 5_000_000
BAD = {
    "target_modules": [LONG, [LONG], [f"x{i}" for i in range(10**6)]],
    "exclude_modules": [LONG, [LONG]],
    "modules_to_save": [[LONG]],
    "target_parameters": [[LONG]],
    "layers_pattern": [LONG],
    "rank_pattern": [{LONG: 4}, {"q_proj": 10**400}],
    "alpha_pattern": [{LONG: 4}, {"q_proj": 1e39}],
    "layers_to_transform": [range(10**12), [True], [0, False]],
    "trainable_token_indices": [range(10**12)],
    "r": [10**9, 2**31 - 1],
    "lora_alpha": [1e39, -1e308, 10**400, 10**39],
    "init_lora_weights": ["pissa_niter_1000", "pissa_niter_999999999", "pissa_niter_" + "9" * 5000],
}
CASES = [(name, i) for name, values in BAD.items() for i in range(len(values))]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    base = folders.write_all(tmp_path_factory.mktemp("models")) / "base"
    return fastlora.load(base, device="cpu")[0]


@pytest.mark.parametrize(("name", "i"), CASES)
def test_an_argument_beyond_its_bound_is_refused_at_once(model, name, i):
    start = time.process_time()
    with pytest.raises(ValueError, match=name):
        fastlora.lora(model, **{"r": 2, name: BAD[name][i]})
    assert time.process_time() - start < 1


@pytest.mark.parametrize("value", [0, 1001, 10**9, 10**400])
def test_loftq_iterations_have_a_bound(model, value):
    with pytest.raises(ValueError, match="loftq_iter"):
        fastlora.lora(model, r=2, init_lora_weights="loftq", loftq_config={"loftq_iter": value})


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora", "loftq"])
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_decompositions_name_a_matrix_with_nan(model, init, number):
    settings = {"loftq_config": {"loftq_bits": 8}} if init == "loftq" else {}
    weight = model.base["layers"][1]["v_proj"]["weight"]
    old = weight[0, 0].clone()
    try:
        weight[0, 0] = number
        with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.v_proj"):
            fastlora.lora(model, r=2, init_lora_weights=init, **settings)
    finally:
        weight[0, 0] = old


def test_the_policy_of_with_spec_stays_unless_another_is_given(model):
    full = model.with_spec(recompute="full")
    assert fastlora.lora(full, r=2).spec.recompute == "full"
    assert fastlora.lora(full, r=2, recompute="selective").spec.recompute == "selective"
    assert fastlora.lora(full, r=2, recompute=0.5).spec.recompute == 0.5
    unsloth = fastlora.lora(full, r=2, use_gradient_checkpointing="unsloth")
    assert unsloth.spec.recompute == "selective"
    assert fastlora.lora(model, r=2).spec.recompute == "selective"
    with pytest.raises(ValueError, match="two names of one setting"):
        fastlora.lora(full, r=2, recompute="selective", use_gradient_checkpointing=True)


@pytest.mark.parametrize("method", ["eva", "corda", "lora_ga"])
def test_initialisation_from_data_names_a_matrix_with_nan(model, method):
    fresh, weight = fastlora.lora(model, r=2), model.base["layers"][1]["v_proj"]["weight"]
    old = weight[0, 0].clone()
    try:
        weight[0, 0] = math.nan
        with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.v_proj"):
            fastlora.initialize(fresh, [{"input_ids": IDS, "labels": IDS}], method)
    finally:
        weight[0, 0] = old
