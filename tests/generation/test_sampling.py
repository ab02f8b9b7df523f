"""Sampling: scores equal transformers' processors, and draws follow the filtered distribution."""

import math
from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fastlora.generation.sampling import Sampling, filtered, penalised
from oracles.transformers_side import prompt
from oracles.trees import token_ids

SCORES = 3 * torch.randn(5, 96, generator=torch.Generator().manual_seed(0))

WARPERS: dict[str, tuple[dict[str, Any], list[LogitsProcessor]]] = {
    "temperature": ({"temperature": 0.7}, [TemperatureLogitsWarper(0.7)]),
    "top_k": ({"top_k": 7}, [TopKLogitsWarper(7)]),
    "top_k 1": ({"top_k": 1}, [TopKLogitsWarper(1)]),
    "top_k above v": ({"top_k": 1000}, [TopKLogitsWarper(1000)]),
    "top_p": ({"top_p": 0.8}, [TopPLogitsWarper(0.8)]),
    "top_p tiny": ({"top_p": 1e-6}, [TopPLogitsWarper(1e-6)]),
    "top_p 1": ({"top_p": 1.0}, []),
    "all": (
        {"temperature": 1.7, "top_k": 20, "top_p": 0.6},
        [TemperatureLogitsWarper(1.7), TopKLogitsWarper(20), TopPLogitsWarper(0.6)],
    ),
}


@pytest.mark.parametrize("name", WARPERS)
def test_filtered_scores_equal_transformers_warpers(name):
    settings, warpers = WARPERS[name]
    expected = SCORES
    for warper in warpers:
        expected = warper(torch.zeros(5, 1, dtype=torch.int64), expected)
    ours = filtered(SCORES, Sampling(**{"temperature": 1.0, **settings}))
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)


def test_tokens_that_tie_with_the_kth_are_kept():
    scores = torch.tensor([[3.0, 2.0, 2.0, 1.0]])
    kept = filtered(scores, Sampling(temperature=1.0, top_k=2)).isfinite()
    assert kept.tolist() == [[True, True, True, False]]


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3])
def test_the_repetition_penalty_equals_transformers(penalty):
    ids = token_ids(5, 8, vocab_size=96)
    seen = torch.zeros(5, 96, dtype=torch.bool).scatter(1, ids, True)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, SCORES.clone())
    assert torch.equal(penalised(SCORES, seen, penalty), expected)


def test_a_seed_reproduces_and_another_differs(pair):
    model, ids = pair("llama2").model, prompt(2, 4)
    how: dict[str, Any] = dict(max_new_tokens=16, temperature=1.0, eos_token_id=())
    draw = lambda seed: model.generate(ids, seed=seed, **how)
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert not torch.equal(draw(None), draw(None))


def test_samples_follow_the_filtered_distribution(pair):
    """512 rows of one prompt: chi-square of the first token; 99.99 % of right samplers pass."""
    model, ids = pair("llama2").model, prompt(1, 4)
    settings = dict(temperature=3.0, top_k=12)
    p = filtered(model(ids)[0, -1:], Sampling(**settings)).softmax(-1)[0]
    rows = ids.expand(512, 4).contiguous()
    tokens = model.generate(rows, max_new_tokens=1, seed=0, eos_token_id=(), **settings)[:, -1]
    counts = torch.bincount(tokens, minlength=96)
    assert not counts[p == 0].any()
    expected = 512 * p[p > 0]
    statistic = ((counts[p > 0] - expected) ** 2 / expected).sum().item()
    assert statistic < 11 + 4 * math.sqrt(2 * 11)


def test_a_low_temperature_is_greedy(pair):
    model, ids = pair("llama2").model, prompt(2, 4)
    greedy, cold = (
        model.generate(ids, max_new_tokens=8, eos_token_id=(), **how)
        for how in ({}, {"temperature": 1e-4, "seed": 0})
    )
    assert torch.equal(greedy, cold)
