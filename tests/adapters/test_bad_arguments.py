"""Bad arguments of lora, initialize and the edits: each is refused by name, before any work."""

import dataclasses
import inspect
from collections.abc import Callable
from time import process_time
from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError

import fastlora
from fastlora.adapters.edits.combine_checks import SETTINGS_OF_METHOD as COMBINE_METHODS
from fastlora.adapters.edits.combine_checks import CombineSettings
from fastlora.adapters.init_from_data.settings import SETTINGS_OF_METHOD as INIT_METHODS
from fastlora.adapters.init_from_data.settings import InitSettings
from fastlora.adapters.lora_arguments import LoraArguments
from fastlora.arguments import setting_problems
from oracles.peft_side import IDS, fast


class Stranger:
    """An object of a class that nothing expects."""


VALUES: dict[str, Any] = {
    "None": None,
    "a tuple": (1.5, None),
    "a text": "hot",
    "a float": 1.5,
    "a list": [3],
    "a dict": {3: 4},
    "an object": Stranger(),
    "a tensor": torch.zeros(()),
    "a flag": True,
    "a generator": (x for x in "q"),
    "a huge number": 10**400,
}

# Argument -> the values above that it accepts by their type. Everything else must be refused.
LORA: dict[str, set[str]] = {
    "model": set(),
    "r": set(),
    "target_modules": {"None"},
    "lora_alpha": {"a float"},
    "lora_dropout": set(),
    "bias": set(),
    "layers_to_transform": {"None"},
    "layers_pattern": {"None"},
    "use_gradient_checkpointing": {"None", "a flag"},
    "random_state": set(),
    "max_seq_length": {"None"},
    "use_rslora": {"a flag"},
    "modules_to_save": {"None"},
    "init_lora_weights": {"a flag"},
    "loftq_config": {"None"},
    "temporary_location": {"a text"},
    "qat_scheme": {"None"},
    "target_parameters": {"None"},
    "ensure_weight_tying": set(),  # True is refused too: this model is not tied
    "recompute": set(),
    "use_dora": {"a flag"},
    "lora_bias": {"a flag"},
    "rank_pattern": {"None"},
    "alpha_pattern": {"None"},
    "exclude_modules": {"None"},
    "finetune_last_n_layers": {"None"},
    "trainable_token_indices": {"None", "a list"},
    "adapter_dtype": set(),
}

INITIALIZE: dict[str, tuple[str, set[str]]] = {  # argument -> (a method that uses it, accepted)
    "model": ("eva", set()),
    "batches": ("eva", set()),
    "method": ("eva", set()),
    "rho": ("eva", {"a float"}),
    "tau": ("eva", set()),
    "use_label_mask": ("eva", {"a flag"}),
    "whiten": ("eva", {"a flag"}),
    "adjust_scaling_factors": ("eva", {"a flag"}),
    "corda_method": ("corda", set()),
    "direction": ("lora_ga", set()),
    "scale": ("lora_ga", set()),
    "stable_gamma": ("lora_ga", {"a float"}),
    "random_state": ("lora_ga", set()),
}

COMBINE: dict[str, tuple[str, set[str]]] = {
    "models": ("cat", set()),
    "weights": ("cat", set()),
    "method": ("cat", set()),
    "density": ("dare_ties", set()),
    "majority_sign_method": ("dare_ties", set()),
    "svd_rank": ("svd", {"None"}),
    "seed": ("dare_ties", {"None"}),
}


@pytest.fixture(scope="module")
def base():
    return fast("llama2")


@pytest.fixture(scope="module")
def adapted(base):
    return fastlora.lora(base, r=2)


def refuse(function: Callable[..., Any], argument: str, arguments: dict[str, Any]) -> str:
    """Call the function, past the type hook if the tests have one; return the error message."""
    started = process_time()
    with pytest.raises((ValueError, TypeError)) as refused:
        getattr(function, "__wrapped__", function)(**arguments)
    assert process_time() - started < 1
    assert not isinstance(refused.value, TypeCheckError)  # that of the tests' type hook
    assert argument in str(refused.value)
    return str(refused.value)


def bad(accepted: set[str]) -> list[Any]:
    return [value for name, value in VALUES.items() if name not in accepted]


@pytest.mark.parametrize("argument", LORA)
def test_lora_refuses_a_bad_argument_by_name(argument, base):
    for value in bad(LORA[argument]):
        arguments = {"model": base, argument: value}
        message = refuse(fastlora.lora, argument, arguments)
        assert not message.startswith("unhashable"), message


@pytest.mark.parametrize("argument", INITIALIZE)
def test_initialize_refuses_a_bad_argument_by_name(argument, adapted):
    method, accepted = INITIALIZE[argument]
    batch = {"input_ids": IDS, "labels": IDS}
    for value in bad(accepted):
        good = dict(model=adapted, batches=[batch], method=method)
        refuse(fastlora.initialize, argument, good | {argument: value})


@pytest.mark.parametrize("argument", COMBINE)
def test_combine_refuses_a_bad_argument_by_name(argument, adapted):
    method, accepted = COMBINE[argument]
    for value in bad(accepted):
        good: dict[str, Any] = dict(models=[adapted, adapted], weights=[1.0, 1.0], method=method)
        if "density" in COMBINE_METHODS[method]:
            good["density"] = 0.5
        refuse(fastlora.combine, argument, good | {argument: value})


@pytest.mark.parametrize("function", ["merge", "disable", "quantize"])
def test_edits_of_one_model_refuse_anything_else(function):
    for value in VALUES.values():
        refuse(getattr(fastlora, function), "model", dict(model=value))


def test_add_tokens_refuses_a_bad_argument_by_name(base):
    _, tokenizer = fastlora.load("demo", device="cpu")
    good = dict(model=base, tokenizer=tokenizer, tokens=["<new>"], special=False)
    accepted = {
        "model": set(),
        "tokenizer": set(),
        "tokens": {"a generator"},
        "special": {"a flag"},
    }
    for argument in good:
        for value in bad(accepted[argument]):
            refuse(fastlora.add_tokens, argument, good | {argument: value})
    refuse(fastlora.add_tokens, "tokens", good | {"tokens": ["\ud800"]})


def test_common_slips_are_answered_with_their_cure(base, adapted):
    pair = (base, None)
    cure = "model, tokenizer = fastlora.load(...)"
    for function in ("lora", "merge", "disable", "quantize"):
        assert cure in refuse(getattr(fastlora, function), "model", dict(model=pair))
    combined = dict(models=[pair], weights=[1.0])
    assert cure in refuse(fastlora.combine, "models[0]", combined)
    single = dict(models=adapted, weights=[1.0])
    assert "expected a list of models" in refuse(fastlora.combine, "models", single)
    batch = {"input_ids": IDS}
    one_batch = dict(model=adapted, batches=batch, method="eva")
    assert "put a single batch into a list" in refuse(fastlora.initialize, "batches", one_batch)
    pissa = dict(model=adapted, batches=[batch], method="pissa")
    assert "init_lora_weights='pissa'" in refuse(fastlora.initialize, "method", pissa)


def test_bad_and_impossible_arguments_are_listed_together(base):
    arguments = dict(model=base, use_rslora="yes", r=1.5, bias=None, target_modules=["wq"])
    message = refuse(fastlora.lora, "r=1.5", arguments)
    for part in ("use_rslora='yes'", "bias=None", "'wq' matches no module"):
        assert part in message
    no_model = refuse(fastlora.lora, "model", arguments | {"model": None})
    assert "r=1.5" in no_model and "bias=None" in no_model


@pytest.mark.parametrize(
    ("function", "settings", "others"),
    [
        (fastlora.lora, LoraArguments, {"model", "loftq_config"}),
        (fastlora.initialize, InitSettings, {"model", "batches", "method"}),
        (fastlora.combine, CombineSettings, {"models", "weights", "method"}),
    ],
)
def test_settings_have_the_names_and_defaults_of_the_signature(function, settings, others):
    parameters = inspect.signature(function).parameters
    names = {field.name for field in dataclasses.fields(settings)}
    assert names == parameters.keys() - others
    for field in dataclasses.fields(settings):
        assert field.default == parameters[field.name].default, field.name


def test_defaults_keep_their_rules():
    assert setting_problems(LoraArguments()) == []
    assert setting_problems(InitSettings()) == []
    for settings, methods in ((InitSettings, INIT_METHODS), (CombineSettings, COMBINE_METHODS)):
        used = {name for names in methods.values() for name in names}
        assert used == {field.name for field in dataclasses.fields(settings)}


def test_tables_hold_every_argument():
    tables = {fastlora.lora: LORA, fastlora.initialize: INITIALIZE, fastlora.combine: COMBINE}
    for function, table in tables.items():
        assert inspect.signature(function).parameters.keys() == table.keys()
