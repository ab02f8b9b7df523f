"""Stacks of adapters in compiled regions: the eager values, and one graph for every number n."""

import pytest
import torch

import fastlora
from fastlora import functional as FL
from oracles.pairs import adapted
from oracles.trees import relative_error, token_ids

ROWS = {"blocks": None, "unequal": [2, 0, 2, 2, 0, 0], "documents": "documents"}


def models_of(model, n, **settings):
    base = fastlora.disable(model)
    return [adapted(base, seed=i, r=2 + i % 2, lora_alpha=2 + i, **settings) for i in range(n)]


def step(models, rows, *, compile, seed=None, t=9):
    """(loss, gradients) of two rows for each adapter."""
    stack, spec = FL.stack([m.with_spec(compile=compile) for m in models])
    ids = token_ids(2 * len(models), t)
    batch, which = {"input_ids": ids, "labels": ids}, None
    if rows == "documents":
        segments = (torch.arange(t) // 4).expand_as(ids)
        batch["segment_ids"], which = segments, (segments + ids[:, :1]) % len(models)
    elif rows is not None:
        which = torch.tensor(rows)
    loss = lambda s: FL.loss(s, models[0].base, spec, batch, adapter_ids=which, seed=seed)
    return fastlora.value_and_grad(loss)(stack)


@pytest.mark.compile
@pytest.mark.parametrize(
    ("rows", "policy"), [("blocks", "none"), ("unequal", "selective"), ("documents", "full")]
)
def test_compiled_stacks_give_the_eager_gradients(rows, policy, shallow, region_backend):
    region_backend("aot_eager")
    models = models_of(shallow, 3, lora_dropout=0.2, recompute=policy)
    run = lambda compile: step(models, ROWS[rows], compile=compile, seed=3)
    assert relative_error(run(True), run(False)) < 1e-9


@pytest.mark.compile
def test_one_dynamic_graph_serves_every_number_of_adapters_and_every_scaling(tiny, graphs):
    """The first number gets a static graph, the second a dynamic one, and the others none."""
    counts = []
    for n in (2, 3, 5, 8, 4):
        step(models_of(tiny, n), None, compile=True, t=7 + n)
        counts.append(len(graphs))
    assert counts[1] > counts[0] > 0
    assert counts[1:] == [counts[1]] * 4
