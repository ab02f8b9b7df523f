"""A stack of the base and adapters computes what each of them computes alone."""

import pytest
import torch
from serving.models import load_served, stack

import fastlora
from fastlora import functional as FL
from oracles.trees import randomised, relative_error, token_ids

IDS = token_ids(5, 9, vocab_size=4096)
KINDS = {
    "ranks and scalings": {"r": 3, "lora_alpha": 24},
    "rank-stabilised": {"r": 5, "lora_alpha": 7, "use_rslora": True},
    "other modules": {"r": 2, "target_modules": ["down_proj"], "layers_to_transform": [1, 4]},
    "an initial offset": {"r": 2, "init_lora_weights": "pissa"},
}


@pytest.fixture(scope="module")
def base():
    return fastlora.load("demo", dtype="float32")[0]


@pytest.fixture(scope="module")
def adapted(base):
    made = {name: fastlora.lora(base, **settings) for name, settings in KINDS.items()}
    return {
        name: model.with_adapter(randomised(model.adapter, i, std=0.1))
        for i, (name, model) in enumerate(made.items())
    }


def test_each_row_of_the_stack_is_one_model(base, adapted):
    stacked = stack(base, adapted)
    rows = torch.arange(5)
    mixed = FL.forward(stacked.adapter, stacked.base, stacked.spec, IDS, adapter_ids=rows)
    alone = [base, *adapted.values()]
    with torch.no_grad():
        expected = torch.cat([model(IDS[i : i + 1]) for i, model in enumerate(alone)])
    assert relative_error(mixed, expected) < 1e-5
    assert relative_error(mixed[0], expected[1]) > 1e-2


def test_an_adapters_folder_serves_its_base_too(tmp_path, base, adapted):
    adapted["ranks and scalings"].save_pretrained(tmp_path / "sql")
    served = load_served(str(tmp_path / "sql"), {})
    assert served.adapter_ids == {"demo": 0, "sql": 1}
    with pytest.raises(ValueError, match="'demo' is used twice"):
        load_served("demo", {"demo": str(tmp_path / "sql")})
