"""self_contained: the same function without an initial offset and without parked originals."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_map

import fastlora
from fastlora.adapters.parked_originals import park_originals
from fastlora.models.init_offset import has_offset
from fastlora.models.self_contained import parked_originals, self_contained
from oracles.init_offset import MOVING, shaken
from oracles.pairs import read_tiny
from oracles.trees import same_bits, token_ids

IDS = token_ids(2, 9)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Two layers in float64, without an adapter."""
    return fastlora.disable(read_tiny(tmp_path_factory.mktemp("tiny"), num_hidden_layers=2))


def with_offset(base, dtype, **settings):
    """A model with an initial offset whose A and B have moved from their first values."""
    base = replace(base, base=tree_map(lambda x: x.to(dtype), base.base))
    return shaken(fastlora.lora(base, adapter_dtype=str(dtype).removeprefix("torch."), **settings))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", MOVING)
def test_a_model_with_an_offset_computes_the_same_without_it(name, dtype, base):
    model = with_offset(base, dtype, **MOVING[name])
    assert has_offset(model.base)
    alone = self_contained(model)
    assert not has_offset(alone.base) and type(alone) is type(model)
    torch.testing.assert_close(alone(IDS), model(IDS), rtol=1e-5, atol=1e-5)


def test_the_adapter_has_twice_the_rank_and_the_base_its_own_tensors(base):
    model = with_offset(base, torch.float64, r=3, init_lora_weights="pissa")
    alone = self_contained(model)
    for mine, theirs in zip(alone.adapter["layers"], model.adapter["layers"], strict=True):
        for name, (a, b) in mine.items():
            r = theirs[name].a.shape[0]
            assert a.shape[0] == b.shape[1] == 2 * r
            assert torch.equal(a[:r], theirs[name].a) and torch.equal(b[:, :r], theirs[name].b)
    assert [t.r for t in alone.spec.lora.targets[0]] == [6] * len(alone.spec.lora.targets[0])
    for mine, theirs in zip(alone.base["layers"], model.base["layers"], strict=True):
        assert mine["q_proj"].keys() == {"weight"} < theirs["q_proj"].keys()
        assert mine["q_proj"]["weight"] is theirs["q_proj"]["weight"]


def test_a_second_call_changes_nothing(base):
    alone = self_contained(with_offset(base, torch.float64, r=2, init_lora_weights="pissa"))
    assert self_contained(alone) is alone


@pytest.mark.parametrize(
    "settings", [None, {}, {"use_dora": True}, {"modules_to_save": ["norm"]}], ids=str
)
def test_a_model_with_neither_is_returned_as_the_same_object(settings, base):
    model = base if settings is None else fastlora.lora(base, r=2, **settings)
    assert self_contained(model) is model


@pytest.fixture
def parked(base, tmp_path, monkeypatch):
    """A model with both originals in files. The CPU plays both devices."""
    always = lambda base, extras, folder: park_originals(base, extras, folder, always=True)
    monkeypatch.setattr("fastlora.adapters.create.park_originals", always)
    settings = dict(r=2, modules_to_save=["embed_tokens", "lm_head"])
    return fastlora.lora(base, temporary_location=tmp_path, **settings)


def test_parked_originals_return(base, parked, tmp_path: Path, monkeypatch):
    assert len([*tmp_path.iterdir()]) == 2
    # To the functions that look for parked tensors, this norm is on an accelerator whose tensors
    # they move by .to(), and the CPU's embedding and head are on the host.
    elsewhere = torch.empty(base.base["norm"].shape, device="meta")
    model = replace(parked, base={**parked.base, "norm": elsewhere})
    assert parked_originals(model.base).keys() == {"embed_tokens", "lm_head"}
    returned = self_contained(model)
    assert parked_originals(returned.base) == {}
    for key in ("embed_tokens", "lm_head"):
        assert returned.base[key].device.type == "meta"
        assert returned.base[key].shape == base.base[key].shape
        assert parked.base[key].device.type == "cpu"  # the given model keeps its own
    assert self_contained(model, unpark=False) is model


def test_parked_originals_hold_the_same_values(base, parked):
    for key in ("embed_tokens", "lm_head"):
        assert parked.base[key] is not base.base[key]
    assert same_bits(self_contained(parked).base, base.base)
