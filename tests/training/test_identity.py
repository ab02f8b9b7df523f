"""What makes two runs the same run."""

import copy
import dataclasses
import json
from functools import partial

import pytest
import torch
from torch.utils._pytree import tree_map

import fastlora
from fastlora.data.batches import batches
from fastlora.model import Model
from fastlora.models.config import LlamaConfig, RopeParameters
from fastlora.models.spec import LoraConfig
from fastlora.training import identity as training_identity
from fastlora.training.identity import differences, run_identity
from fastlora.training.run import Run
from oracles.pairs import adapted
from oracles.training_runs import settings


def identity(model: Model) -> dict:
    return run_identity(Run(settings(max_steps=3), [], [], partial(batches)), model)


def names_of(a: Model, b: Model) -> list[str]:
    """The names of the settings in which two runs differ."""
    lines = differences(identity(a), identity(b))
    return [line.partition(":")[0] for line in lines]


def with_fields(record, **changed):
    """A copy with other values of any type, which the type hook would refuse in a call."""
    made = copy.copy(record)
    for name, value in changed.items():
        object.__setattr__(made, name, value)
    return made


def with_config(model: Model, **changed) -> Model:
    config = with_fields(model.spec.config, **changed)
    return dataclasses.replace(model, spec=dataclasses.replace(model.spec, config=config))


def with_lora(model: Model, **changed) -> Model:
    lora = with_fields(model.spec.lora, **changed)
    return dataclasses.replace(model, spec=dataclasses.replace(model.spec, lora=lora))


def other(value):
    """Another value, for every type of a field."""
    if isinstance(value, bool | str) or value is None:
        return "other"
    return (value or 0) + 1 if isinstance(value, int | float) else (*value, "other")


CONFIG = [f.name for f in dataclasses.fields(LlamaConfig)]
ROPE = [f.name for f in dataclasses.fields(RopeParameters)]
TEXTS = [name for name in CONFIG if name.startswith("raw_")]  # of the files, for exports
LORA = [f.name for f in dataclasses.fields(LoraConfig)]


def test_an_identity_is_json_and_equal_to_itself(model):
    assert json.loads(json.dumps(identity(model))) == identity(model)
    names = ["down_proj", "v_proj", "q_proj"]  # in another order
    again = adapted(model.with_adapter(None), seed=7, r=2, target_modules=names)
    assert names_of(model, again) == []


@pytest.mark.parametrize("name", sorted({*CONFIG} - {*TEXTS, "rope_parameters"}))
def test_every_field_of_the_config_counts(model, name, monkeypatch):
    monkeypatch.setattr(training_identity, "_hash_base", lambda _: "")  # no tensors for this config
    changed = with_config(model, **{name: other(getattr(model.spec.config, name))})
    assert names_of(model, changed) == [f"config.{name}"]


@pytest.mark.parametrize("name", ROPE)
def test_every_field_of_rope_counts(model, name):
    rope = model.spec.config.rope_parameters
    rope = with_fields(rope, **{name: other(getattr(rope, name))})
    assert names_of(model, with_config(model, rope_parameters=rope)) == [f"config.{name}"]


def test_the_texts_of_the_configs_files_do_not_count(model):
    assert names_of(model, with_config(model, **dict.fromkeys(TEXTS, "{}"))) == []


@pytest.mark.parametrize("name", sorted({*LORA} - {"targets", "extras"}))
def test_every_setting_of_lora_counts(model, name):
    changed = with_lora(model, **{name: other(getattr(model.spec.lora, name))})
    assert names_of(model, changed) == [name]


def all_tensors() -> list[tuple]:
    return [("embed_tokens",), ("norm",), ("lm_head",), ("layers", 1, "input_layernorm"),
            ("layers", 1, "down_proj", "weight"), ("layers", 0, "q_proj", "weight")]  # fmt: skip


@pytest.mark.parametrize("path", all_tensors())
@pytest.mark.parametrize("place", [0, 0.37, 1])
def test_one_changed_element_of_any_tensor_counts(model, path, place):
    base = tree_map(torch.clone, model.base)
    leaf = base
    for key in path:
        leaf = leaf[key]
    leaf.view(-1)[round(place * (leaf.numel() - 1))] += 1e-3
    assert names_of(model, dataclasses.replace(model, base=base)) == ["hash of the base model"]


def test_two_elements_that_change_places_count(model):
    """The sum does not change, so samples must tell: all of them in a small tensor."""
    base = tree_map(torch.clone, model.base)
    base["norm"][[0, 1]] = base["norm"][[1, 0]]
    assert not torch.equal(base["norm"], model.base["norm"])
    assert names_of(model, dataclasses.replace(model, base=base)) == ["hash of the base model"]


def test_the_bases_dtype_counts(model):
    base = tree_map(lambda x: x.bfloat16(), model.base)
    names = names_of(model, dataclasses.replace(model, base=base))
    assert names == ["hash of the base model", "base dtype"]


def test_the_bases_precision_is_named(model):
    dense, packed = (fastlora.load("demo", load_in_4bit=x, device="cpu")[0] for x in (False, True))
    names = names_of(fastlora.lora(dense, r=2), fastlora.lora(packed, r=2))
    assert names == ["hash of the base model", "base quantized to"]
