"""Gradients, transforms and generation of models whose adapter starts from an offset."""

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

import fastlora
from fastlora import functional
from fastlora.adapters.create import lora
from fastlora.adapters.edits.merging import merge
from fastlora.runtime.gradients import value_and_grad
from oracles.init_offset import shaken, start_leaves
from oracles.pairs import read_tiny


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Two layers in float64 with an offset, dropout 0.2, A and B moved from their first values."""
    base = fastlora.disable(read_tiny(tmp_path_factory.mktemp("tiny"), num_hidden_layers=2))
    settings = dict(r=2, init_lora_weights="pissa", lora_dropout=0.2, adapter_dtype="float64")
    return shaken(lora(base, **settings))


BATCH = {
    "input_ids": torch.tensor([[3, 5, 7, 11, 2, 9]]),
    "labels": torch.tensor([[3, 5, 7, 11, 2, 9]]),
}


@pytest.mark.parametrize("recompute", ["none", "selective", "full", "offload", 0.0, 0.3, 0.8])
@pytest.mark.parametrize("seed", [None, 3])
def test_every_policy_gives_torch_funcs_gradient(started, recompute, seed):
    model = started.with_spec(recompute=recompute, compile=False)
    args = (model.base, model.spec, BATCH)
    value, grads = value_and_grad(functional.loss)(model.adapter, *args, seed=seed)
    expected, plain = torch.func.grad_and_value(functional.loss)(model.adapter, *args, seed=seed)
    torch.testing.assert_close(value, plain)
    for g, e in zip(tree_leaves(grads), tree_leaves(expected), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-12)


def test_vmap_over_adapters_equals_the_adapters_one_by_one(started):
    two = [shaken(started, seed=s).adapter for s in (1, 2)]
    stacked = tree_map(lambda *xs: torch.stack(xs), *two)
    run = lambda adapter: functional.loss(adapter, started.base, started.spec, BATCH)
    together = torch.func.vmap(run)(stacked)
    torch.testing.assert_close(together, torch.stack([run(a) for a in two]))


def test_forward_derivative_is_the_limit_of_differences(started):
    direction = tree_map(torch.ones_like, started.adapter)
    run = lambda adapter: functional.loss(adapter, started.base, started.spec, BATCH)
    _, slope = torch.func.jvp(run, (started.adapter,), (direction,))
    ahead, behind = (
        run(tree_map(lambda x, d, h=h: x + h * d, started.adapter, direction))
        for h in (1e-6, -1e-6)
    )
    torch.testing.assert_close(slope, (ahead - behind) / 2e-6, rtol=1e-6, atol=1e-8)


@pytest.mark.compile
def test_compiled_gradient_equals_eager(started, fresh_dynamo, region_backend):
    region_backend("aot_eager")
    run = lambda compile: value_and_grad(functional.loss)(
        started.adapter, started.base, started.with_spec(compile=compile).spec, BATCH, seed=3
    )
    for c, e in zip(tree_leaves(run(True)), tree_leaves(run(False)), strict=True):
        torch.testing.assert_close(c, e, rtol=1e-9, atol=1e-12)


def test_generation_equals_that_of_the_merged_model(started):
    ids = torch.tensor([[3, 5, 7], [4, 9, 2]])
    args = dict(max_new_tokens=8, eos_token_id=())
    assert torch.equal(started.generate(ids, **args), merge(started).generate(ids, **args))


def test_moving_a_model_moves_its_offset(started):
    moved = started.to("cpu")
    assert torch.equal(moved(BATCH["input_ids"]), started(BATCH["input_ids"]))
    assert len(start_leaves(moved)) == len(start_leaves(started)) > 0
