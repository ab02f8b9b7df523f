"""A stack of the base and adapters computes what each of them computes alone."""

from typing import Any

import pytest
import torch
from serving.models import load_served
from serving.stacking import stack

import fastlora
from fastlora import functional as FL
from oracles.expert_cases import BOTH
from oracles.transformers_side import prompt
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


ENDS = ["q_proj", "embed_tokens", "lm_head"]
# (family, settings of adapters that are served together)
MIXED: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "DoRA": ("llama2", [{"use_dora": True}, {"r": 2, "lora_alpha": 9}, {"r": 5, "use_dora": True}]),
    "lora_bias": ("llama2", [{"r": 3, "lora_alpha": 12}, {"lora_bias": True, "lora_alpha": 2}]),
    "embedding and head": (
        "llama2",
        [{"target_modules": ENDS, "lora_alpha": 3}, {}, {"target_modules": ENDS[:2], "r": 2}],
    ),
    "embedding and head with DoRA": (
        "llama2",
        [{"target_modules": ENDS}, {"target_modules": ENDS, "use_dora": True}],
    ),
    "tied embedding and head": (
        "llama3.2",
        [{"target_modules": ENDS, "ensure_weight_tying": True, "lora_alpha": 3}, {}],
    ),
    "token rows": (
        "llama3.2",
        [{"trainable_token_indices": [7, 3]}, {}, {"trainable_token_indices": [11, 3, 60]}],
    ),
    "norms and biases": (
        "llama_bias",
        [{"bias": "all"}, {"modules_to_save": ["norm"]}, {"bias": "lora_only", "use_dora": True}],
    ),
    "experts": (
        "qwen3_moe_mixed",
        [
            {"target_modules": ["q_proj"], "target_parameters": [*BOTH, "gate.weight"], "r": 2},
            {},
            {"target_modules": [], "target_parameters": BOTH[1:], "lora_alpha": 30},
        ],
    ),
}


@pytest.mark.parametrize("case", MIXED)
def test_adapters_of_different_kinds_generate_together_as_alone(case, pair):
    family, settings = MIXED[case]
    base = pair(family).model
    plain = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    made = [fastlora.lora(base, **plain | more) for more in settings]
    models = [m.with_adapter(randomised(m.adapter, i, std=0.2)) for i, m in enumerate(made)]
    stacked = stack(base, {f"a{i}": model for i, model in enumerate(models)})
    ids = prompt(len(models) + 1, 6)
    how: dict[str, Any] = dict(max_new_tokens=10, eos_token_id=(), return_logprobs=True)
    together, logprobs = stacked.generate(ids, adapter_ids=range(len(ids)), **how)
    for i, model in enumerate([base, *models]):
        alone, expected = model.generate(ids[i : i + 1], **how)
        assert torch.equal(together[i], alone[0])
        torch.testing.assert_close(logprobs[i], expected[0], rtol=1e-4, atol=1e-4)
        if i:  # the adapter matters
            assert not torch.allclose(model(ids[:1]), base(ids[:1]), atol=1e-3)


REFUSED: dict[str, tuple[list[dict[str, Any]], str]] = {
    "a copy of a matrix": ([{"modules_to_save": ["embed_tokens"]}], "'a0'.*model.embed_tokens"),
    "fake quantisation": ([{"qat_scheme": "int8"}], "'a0': it is fake quantised"),
    "DoRA and lora_bias": ([{"use_dora": True}, {"lora_bias": True}], "DoRA .* lora_bias"),
    "tied and not": (
        [{"target_modules": ENDS, "ensure_weight_tying": True}, {"target_modules": ENDS[:2]}],
        "ensure_weight_tying",
    ),
    "token rows and embedding": (
        [{"trainable_token_indices": [3]}, {"target_modules": ENDS[:2]}],
        "one adapter trains token rows",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_adapters_that_do_not_fit_together_are_refused(case, pair):
    settings, message = REFUSED[case]
    base = pair("llama3.2").model
    plain = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    models = {f"a{i}": fastlora.lora(base, **plain | more) for i, more in enumerate(settings)}
    with pytest.raises(ValueError, match=message):
        stack(base, models)


def test_an_adapters_folder_serves_its_base_too(tmp_path, base, adapted):
    adapted["ranks and scalings"].save_pretrained(tmp_path / "sql")
    served = load_served(str(tmp_path / "sql"), [])
    assert served.adapter_ids == {"demo": 0, "sql": 1}
    with pytest.raises(ValueError, match="'demo' is used twice"):
        load_served("demo", [("demo", str(tmp_path / "sql"))])
