"""Several runs in compiled regions: one graph for every number of runs."""

import pytest

from fastlora.training.loop import train
from oracles.pairs import adapted
from oracles.training_runs import ROWS
from oracles.trees import relative_error


@pytest.mark.compile
def test_dropping_runs_compiles_nothing_after_the_second_number(base, tokenizer, graphs):
    """Five runs end one after the other. The first number gets a static graph, the second a dynamic
    one, and the others none."""
    counts = []
    targets = ["q_proj", "down_proj"]
    models = [adapted(base, seed=i, r=2 + i % 2, target_modules=targets) for i in range(5)]
    run = dict(max_steps=[1, 2, 3, 4, 5], batch_size=1, progress=False, warmup_ratio=0.0)
    log = lambda record: counts.append(len(graphs)) if record["run"] == 4 else None
    compiled = [model.with_spec(compile=True) for model in models]
    mine, _ = train(compiled, tokenizer, ROWS, log=log, **run)
    # The last pass is a stack of one adapter, whose dimension of size 1 torch takes as a constant.
    assert counts[1] > counts[0] > 0 and counts[1:4] == [counts[1]] * 3
    eager, _ = train(models, tokenizer, ROWS, **run)
    for a, b in zip(mine, eager, strict=True):
        assert relative_error(a.adapter, b.adapter) < 1e-3
