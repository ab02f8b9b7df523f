"""Cached decoding equals a forward pass over every prefix, for every adapter kind and base."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import fastlora
from fastlora import functional as FL
from fastlora.generation.generate import adapter_ids_problems
from fastlora.model import Model
from oracles.expert_cases import EXPERT_CASES
from oracles.extras_cases import EXTRAS_CASES
from oracles.pairs import adapted
from oracles.peft_cases import ADAPTER_CASES, FORWARD
from oracles.quantized_bases import load
from oracles.transformers_side import left_padding, prompt
from oracles.trees import randomised

NEW = 12
CASES = {name: (FORWARD, settings) for name, settings in ADAPTER_CASES.items()}
CASES |= EXTRAS_CASES | EXPERT_CASES
CASES |= {
    "QAT": ("llama2", dict(r=4, qat_scheme="int8")),
    "QAT, DoRA": ("llama2", dict(r=4, qat_scheme="int8", use_dora=True)),
}


def uncached(model: Model, ids: Tensor, prompt_length: int) -> tuple[Tensor, Tensor]:
    """(likeliest token after each prefix, log-probabilities of the tokens of `ids`)."""
    logits = model(ids[:, :-1])[:, prompt_length - 1 :]
    chosen = ids[:, prompt_length:, None]
    return logits.argmax(-1), logits.float().log_softmax(-1).gather(-1, chosen)[..., 0]


def check(model: Model) -> None:
    how: dict[str, Any] = dict(max_new_tokens=NEW, eos_token_id=(), return_logprobs=True)
    ids, logprobs = model.generate(prompt(2, 5), **how)
    likeliest, expected = uncached(model, ids, 5)
    assert torch.equal(likeliest, ids[:, 5:])
    torch.testing.assert_close(logprobs, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_greedy_ids_and_logprobs_equal_an_uncached_forward_pass(case, pair):
    family, settings = CASES[case]
    model, plain = adapted(pair(family).model, **settings), pair(family).model
    check(model)
    ids = prompt(2, 5)
    assert not torch.allclose(model(ids), plain(ids), atol=1e-3)  # the adapter matters


@pytest.mark.parametrize("settings", [None, {}, {"use_dora": True}], ids=["base", "LoRA", "DoRA"])
@pytest.mark.parametrize("kind", ["nf4", "nf4 nested", "fp4", "int8"])
def test_greedy_ids_over_quantised_bases_equal_an_uncached_forward_pass(
    kind, settings, quantised_folder
):
    model = load(quantised_folder(kind))
    check(model if settings is None else adapted(model, r=4, **settings))


def test_logprobs_equal_token_logprobs_of_the_result(pair):
    """Of sampled tokens, under a penalty and filters: the model's own log-probabilities."""
    model, ids, mask = adapted(pair("qwen2").model, r=4), prompt(3, 9), left_padding(9, 4, 1)
    settings: dict[str, Any] = dict(temperature=2.0, top_p=0.9, repetition_penalty=1.3, seed=0)
    out, logprobs = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=20,
        eos_token_id=(),
        return_logprobs=True,
        **settings,
    )
    assert logprobs.shape == (3, 20) and logprobs.dtype == torch.float32
    everything = torch.cat((mask, torch.ones(3, 20, dtype=torch.int64)), 1)
    labels = torch.where(everything.bool(), out, -100)
    expected = FL.token_logprobs(
        model.adapter, model.base, model.spec, out, labels, attention_mask=everything
    )
    torch.testing.assert_close(logprobs, expected[:, 9:], rtol=1e-5, atol=1e-5)


# ── stacks of adapters ────────────────────────────────────────────────────────────────────

STACKS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("llama2", {}),
    "DoRA": ("llama2", {"use_dora": True}),
    "lora_bias": ("llama2", {"lora_bias": True}),
    "an initial offset": ("llama2", {"init_lora_weights": "pissa"}),
    "a window": ("qwen2_window", {}),
    "embedding and head": (
        "llama2",
        {"target_modules": ["q_proj", "down_proj", "embed_tokens", "lm_head"]},
    ),
    "tied rows": ("llama3.2", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 7]}),
    "norms, biases, head": ("llama_bias", {"bias": "all", "modules_to_save": ["norm", "lm_head"]}),
    "DoRA on the embedding": (
        "llama2",
        {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    ),
    "experts": EXPERT_CASES["experts, router and attention"],
    "experts only": EXPERT_CASES["both, Mixtral"],
    "routers only": EXPERT_CASES["router"],
    "biases of a layer without LoRA": (
        "llama_bias",
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "bias": "all"},
    ),
}


def stacked(model: Model, n: int = 3) -> tuple[list[Model], Model]:
    """(n models, one model with a stack of their adapters)."""
    trees = [randomised(model.adapter, seed) for seed in range(n)]
    stack = tree_map(lambda *leaves: torch.stack(leaves), *trees)
    return [model.with_adapter(tree) for tree in trees], fastlora.Model(
        spec=model.spec, base=model.base, adapter=stack
    )


@pytest.mark.parametrize("case", STACKS)
def test_each_row_of_a_stack_generates_with_its_own_adapter(case, pair):
    family, settings = STACKS[case]
    models, stack = stacked(adapted(pair(family).model, **{"r": 4} | settings))
    ids, mask, which = prompt(4, 9), left_padding(9, 4, 9, 1), [2, 0, 1, 2]
    how: dict[str, Any] = dict(max_new_tokens=NEW, eos_token_id=(), return_logprobs=True)
    together, logprobs = stack.generate(ids, attention_mask=mask, adapter_ids=which, **how)
    for i, number in enumerate(which):
        row = ids[i : i + 1, 9 - int(mask[i].sum()) :]
        alone, expected = models[number].generate(row, **how)
        assert torch.equal(alone[0, -NEW:], together[i, -NEW:])
        torch.testing.assert_close(logprobs[i], expected[0], rtol=1e-4, atol=1e-4)


WRONG_IDS: list[Any] = [None, [0], [0, 3], [0, -1], [0, True], [0.0, 1.0], "01", 0]


@pytest.mark.parametrize("which", WRONG_IDS)
def test_wrong_adapter_ids_are_problems(which, pair):
    _, stack = stacked(adapted(pair("llama2").model, r=2))
    (problem,) = adapter_ids_problems(stack, which, 2)
    assert problem.startswith("adapter_ids=") and "2 whole numbers in [0, 3)" in problem
    assert not adapter_ids_problems(stack, [2, 0], 2)
    assert not adapter_ids_problems(stack, torch.tensor([2, 0]), 2)


def test_adapter_ids_and_a_stack_need_each_other(pair):
    _, stack = stacked(adapted(pair("llama2").model, r=2))
    with pytest.raises(ValueError, match="adapter_ids=None"):
        stack.generate(prompt(2, 4))
    with pytest.raises(ValueError, match="not a stack"):
        pair("llama2").model.generate(prompt(2, 4), adapter_ids=[0, 0])
