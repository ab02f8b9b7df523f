"""Sampling: scores equal transformers' processors, and draws follow the filtered distribution."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fastlora.generation.sampling import (
    Sampling,
    choose,
    draw,
    penalised,
    row_seeds,
    uniform,
    variant_of,
)
from oracles.sampling import filter_all, rows_of
from oracles.transformers_side import prompt
from oracles.trees import token_ids

SCORES = 3 * torch.randn(5, 96, generator=torch.Generator().manual_seed(0))
TIES = SCORES.round()  # 5 rows of some 15 values: each is shared by many tokens

WARPERS: dict[str, tuple[dict[str, Any], list[LogitsProcessor]]] = {
    "temperature": ({"temperature": 0.7}, [TemperatureLogitsWarper(0.7)]),
    "top_k": ({"top_k": 7}, [TopKLogitsWarper(7)]),
    "top_k 1": ({"top_k": 1}, [TopKLogitsWarper(1)]),
    "top_k above v": ({"top_k": 1000}, [TopKLogitsWarper(1000)]),
    "top_p": ({"top_p": 0.8}, [TopPLogitsWarper(0.8)]),
    "top_p tiny": ({"top_p": 1e-6}, [TopPLogitsWarper(1e-6)]),
    "top_p 1": ({"top_p": 1.0}, []),
    "min_p": ({"min_p": 0.1}, [MinPLogitsWarper(0.1)]),
    "min_p 0": ({"min_p": 0.0}, [MinPLogitsWarper(0.0)]),
    "min_p 1": ({"min_p": 1.0}, [MinPLogitsWarper(1.0)]),
    "all": (
        {"temperature": 1.7, "top_k": 20, "top_p": 0.6, "min_p": 0.2},
        [
            TemperatureLogitsWarper(1.7),
            TopKLogitsWarper(20),
            TopPLogitsWarper(0.6),
            MinPLogitsWarper(0.2),
        ],
    ),
}


def warped(scores: Tensor, warpers: list[LogitsProcessor]) -> Tensor:
    for warper in warpers:
        scores = warper(torch.zeros(len(scores), 1, dtype=torch.int64), scores)  # pyright: ignore
    return scores


@pytest.mark.parametrize("scores", [SCORES, TIES], ids=["distinct", "ties"])
@pytest.mark.parametrize("name", WARPERS)
def test_filtered_scores_equal_transformers_warpers(name, scores):
    settings, warpers = WARPERS[name]
    ours = filter_all(scores, Sampling(**{"temperature": 1.0, **settings}))
    torch.testing.assert_close(ours, warped(scores, warpers), rtol=1e-6, atol=0)


def test_each_row_is_filtered_by_its_own_settings():
    """All filters run, because some row has each; a row is changed by its own only."""
    names = ["temperature", "top_k", "top_p", "min_p", "top_k above v"]
    settings = [Sampling(**{"temperature": 1.0, **WARPERS[name][0]}) for name in names]
    ours = filter_all(TIES, settings)
    for i, name in enumerate(names):
        expected = warped(TIES[i : i + 1], WARPERS[name][1])
        torch.testing.assert_close(ours[i : i + 1], expected, rtol=1e-6, atol=0)


def test_tokens_that_tie_with_the_kth_are_kept():
    scores = torch.tensor([[3.0, 2.0, 2.0, 1.0]])
    kept = filter_all(scores, Sampling(temperature=1.0, top_k=2)).isfinite()
    assert kept.tolist() == [[True, True, True, False]]


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3])
def test_the_repetition_penalty_equals_transformers(penalty):
    ids = token_ids(5, 8, vocab_size=96)
    seen = torch.zeros(5, 96, dtype=torch.bool).scatter(1, ids, True)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, SCORES.clone())
    assert torch.equal(penalised(SCORES, seen, torch.full((5,), penalty)), expected)


# ── random numbers ────────────────────────────────────────────────────────────────────────


def chi_square(counts: Tensor, p: Tensor) -> float:
    """The statistic, in standard deviations above its mean."""
    expected = counts.sum() * p[p > 0]
    assert not counts[p == 0].any()
    degrees = int((p > 0).sum()) - 1
    statistic = ((counts[p > 0] - expected) ** 2 / expected).sum().item()
    return (statistic - degrees) / math.sqrt(2 * degrees)


@pytest.mark.parametrize("along", ["tokens of a row", "rows of a batch", "seeds"])
def test_random_numbers_are_uniform_and_independent(along):
    """100,000 numbers and pairs of neighbours, chi-square on 16 x 16 cells; 4 deviations."""
    index = torch.arange(100_000)
    u = {
        "tokens of a row": lambda: uniform(torch.full_like(index, 7), index),
        "rows of a batch": lambda: uniform(torch.tensor(row_seeds(0, 100_000)), index * 0),
        "seeds": lambda: uniform(index, index * 0 + 3),
    }[along]()
    assert 0 <= u.min() and u.max() < 1
    cell = (16 * u).long()
    for counts in (torch.bincount(cell, minlength=16), torch.bincount(16 * cell[1:] + cell[:-1])):
        assert abs(chi_square(counts, torch.full_like(counts, 1 / len(counts), dtype=float))) < 4


def test_a_draw_never_takes_an_excluded_token():
    scores = torch.full((6, 4), -math.inf)
    scores[:, 1] = scores[:, 2] = 0.0
    u = torch.tensor([0.0, 0.25, 0.4999, 0.5, 0.75, 1 - 2.0**-53], dtype=torch.float64)
    assert draw(scores, u).tolist() == [1, 1, 1, 2, 2, 2]


def test_a_seed_reproduces_and_another_differs(pair):
    model, ids = pair("llama2").model, prompt(2, 4)
    how: dict[str, Any] = dict(max_new_tokens=16, temperature=1.0, eos_token_id=())
    draw = lambda seed: model.generate(ids, seed=seed, **how)
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert not torch.equal(draw(None), draw(None))


def test_rows_of_one_prompt_differ_and_equal_seeds_give_equal_rows(pair):
    model, ids = pair("llama2").model, prompt(1, 4).expand(3, 4).contiguous()
    how: dict[str, Any] = dict(max_new_tokens=16, temperature=1.0, eos_token_id=())
    first, second, third = model.generate(ids, seed=1, **how)
    assert not torch.equal(first, second) and not torch.equal(second, third)
    first, second, third = model.generate(ids, seed=[5, 6, 5], **how)
    assert torch.equal(first, third) and not torch.equal(first, second)


def test_a_sample_does_not_depend_on_its_neighbours(pair):
    """Other prompts, another place and another length of the batch; the row's seed is the same."""
    model, ids = pair("llama2").model, prompt(4, 6)
    how: dict[str, Any] = dict(max_new_tokens=16, temperature=1.5, top_p=0.9, eos_token_id=())
    together = model.generate(ids, seed=[3, 4, 5, 6], **how)
    for rows in ([2], [3, 2], [0, 2, 1]):
        seeds = [[3, 4, 5, 6][i] for i in rows]
        part = model.generate(ids[rows], seed=seeds, **how)
        assert torch.equal(part[rows.index(2)], together[2])


CHI_SQUARES: dict[str, dict[str, Any]] = {
    "temperature and top_k": dict(temperature=3.0, top_k=12),
    "top_p": dict(temperature=1.5, top_p=0.7),
    "min_p": dict(temperature=1.5, min_p=0.1),
}


@pytest.mark.parametrize("case", CHI_SQUARES)
def test_samples_follow_the_filtered_distribution(case, pair):
    """512 rows of one prompt: chi-square of the first token; 99.99 % of right samplers pass."""
    model, ids = pair("llama2").model, prompt(1, 4)
    p = filter_all(model(ids)[0, -1:], Sampling(**CHI_SQUARES[case])).softmax(-1)[0]
    rows = ids.expand(512, 4).contiguous()
    how: dict[str, Any] = dict(max_new_tokens=1, seed=0, eos_token_id=())
    tokens = model.generate(rows, **how, **CHI_SQUARES[case])[:, -1]
    assert chi_square(torch.bincount(tokens, minlength=96), p.double()) < 4
    other = filter_all(model(ids)[0, -1:], Sampling(temperature=0.5)).softmax(-1)[0]
    assert chi_square(torch.bincount(tokens, minlength=96), other.double()) > 4


def test_a_low_temperature_is_greedy(pair):
    model, ids = pair("llama2").model, prompt(2, 4)
    greedy, cold = (
        model.generate(ids, max_new_tokens=8, eos_token_id=(), **how)
        for how in ({}, {"temperature": 1e-4, "seed": 0})
    )
    assert torch.equal(greedy, cold)


def test_rows_without_temperature_take_the_likeliest_token_beside_rows_that_draw():
    settings = [Sampling(), Sampling(temperature=2.0), Sampling(), *[Sampling(temperature=2.0)] * 2]
    rows = rows_of(settings, 96)
    index = torch.zeros(5, dtype=torch.int64)
    tokens = choose(SCORES, None, rows, index, variant_of(settings, False, 96))
    assert torch.equal(tokens[[0, 2]], SCORES[[0, 2]].argmax(-1))
    assert not torch.equal(tokens, SCORES.argmax(-1))
