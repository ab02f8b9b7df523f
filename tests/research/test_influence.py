"""research.influence against the papers' formulas; training_points against the run behind them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import fastlora
from fastlora import functional as FL
from fastlora import research
from fastlora.errors import CheckpointError
from fastlora.research import TrainingPoint
from fastlora.training.checkpoint import read_state
from oracles.batches import batch_of
from oracles.trees import randomised, relative_error

DATA, TARGETS = [batch_of(2, 6), batch_of(1, 6, seed=3)], [batch_of(2, 6, seed=5)]


def mean_losses(model: Any) -> Any:
    def losses(a: Any, batch: Any) -> Tensor:
        total, tokens = FL.row_losses(a, model.base, model.spec, batch)
        return total / tokens

    return losses


def gradients(model: Any, adapter: Any, batches: list) -> Tensor:
    """[n, p], one example at a time."""
    row = lambda batch, i: {k: x[i : i + 1] for k, x in batch.items()}
    rows = [row(batch, i) for batch in batches for i in range(len(batch["labels"]))]
    gradient = fastlora.value_and_grad(lambda a, row: mean_losses(model)(a, row).sum())
    return torch.stack([research.ravel(gradient(adapter, row)[1]) for row in rows])


@pytest.fixture(scope="module")
def points(shallow) -> list[TrainingPoint]:
    moments = lambda seed: randomised(shallow.adapter, seed)
    return [
        TrainingPoint(
            adapter=randomised(shallow.adapter, seed),
            learning_rate=rate,
            step=step,
            exp_avg=moments(seed + 1),
            exp_avg_sq=tree_map(torch.square, moments(seed + 2)),
        )
        for seed, rate, step in ((1, 0.1, 3), (4, 0.03, 7))
    ]


def expected(model: Any, points: list[TrainingPoint], method: str) -> Tensor:
    total = torch.zeros(3, 2, dtype=torch.float64)
    for p in points:
        g, h = gradients(model, p.adapter, DATA), gradients(model, p.adapter, TARGETS)
        if method == "less":
            m, v = research.ravel(p.exp_avg), research.ravel(p.exp_avg_sq)
            m = (0.9 * m + 0.1 * g) / (1 - 0.9 ** (p.step + 1))
            v = (0.999 * v + 0.001 * g**2) / (1 - 0.999 ** (p.step + 1))
            g = m / (v.sqrt() + 1e-8)
            g, h = g / g.norm(dim=1, keepdim=True), h / h.norm(dim=1, keepdim=True)
        total += p.learning_rate * g @ h.T
    return total


def test_an_example_whose_gradient_is_nan_is_named(shallow, points):
    untrained = {**DATA[0], "labels": DATA[0]["labels"].clone()}
    untrained["labels"][1] = -100
    with pytest.raises(ValueError, match=r"(?s)data: examples \[1\].*tokens\.clamp"):
        research.influence(mean_losses(shallow), points, [untrained], TARGETS)


@pytest.mark.parametrize("method", ["less", "tracin"])
def test_influence_is_the_papers_formula(method, shallow, points):
    found = research.influence(
        mean_losses(shallow), points, iter(DATA), TARGETS, method=method, sketch=None
    )
    assert relative_error(found, expected(shallow, points, method)) <= 1e-9


@pytest.mark.parametrize("method", ["less", "tracin"])
def test_sketches_approximate_it(method, shallow, points):
    run = lambda sketch: research.influence(
        mean_losses(shallow), points, DATA, TARGETS, method=method, sketch=sketch
    )
    exact = run(None)
    assert 0 < relative_error(run(fastlora.Sketch(2**14, 1)), exact) <= 0.2
    assert not torch.equal(run(fastlora.Sketch(64, 1)), run(fastlora.Sketch(64, 2)))


def test_a_step_on_an_example_lowers_a_target_s_loss_by_its_influence(shallow):
    """To first order, at a learning rate of 1e-6."""
    point = TrainingPoint(adapter=shallow.adapter, learning_rate=1e-6)
    losses = mean_losses(shallow)
    scores = research.influence(losses, [point], DATA, TARGETS, method="tracin", sketch=None)
    g = fastlora.value_and_grad(losses, per_example=True)(shallow.adapter, DATA[0])[1]
    moved = tree_map(lambda x, g: x - 1e-6 * g[1], shallow.adapter, g)
    lowered = losses(shallow.adapter, TARGETS[0]) - losses(moved, TARGETS[0])
    torch.testing.assert_close(scores[1], lowered, rtol=1e-3, atol=1e-9)


# ── the points of a run ───────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Any, Path, Any]:
    """(the model before, the folder, the model after) three steps, each with a checkpoint."""
    folder = tmp_path_factory.mktemp("run") / "out"
    model, tokenizer = fastlora.load("demo", dtype="float32", device="cpu", max_seq_length=32)
    model = fastlora.lora(model, r=2, target_modules=["v_proj"], layers_to_transform=[0])
    model = model.with_adapter(randomised(model.adapter, 3, std=0.05))
    rows = [{"text": f"def f{i}(a, b): return a + {i}"} for i in range(8)]
    how: dict[str, Any] = dict(max_steps=3, batch_size=2, save_every=1, progress=False)
    how |= dict(lr_scheduler="linear", warmup_ratio=0.0)  # three rates that differ
    trained, _ = fastlora.train(
        model, tokenizer, rows, output_dir=folder, weight_decay=0.1, learning_rate=1e-2, **how
    )
    return model, folder, trained


def test_the_points_of_a_run_hold_its_adapters_moments_and_rates(run):
    """Each update of AdamW is that of the moments of its point."""
    model, folder, trained = run
    points = research.training_points(model, folder)
    assert [p.step for p in points] == [1, 2, 3]
    assert relative_error(points[-1].adapter, trained.adapter) == 0
    before = model.adapter
    for p in points:

        def update(x: Tensor, m: Tensor, v: Tensor, p: TrainingPoint = p) -> Tensor:
            m, v = m / (1 - 0.9**p.step), v / (1 - 0.999**p.step)
            return x - p.learning_rate * (0.1 * x + m / (v.sqrt() + 1e-8))

        wanted = tree_map(update, before, p.exp_avg, p.exp_avg_sq)
        assert relative_error(p.adapter, wanted) <= 1e-5
        before = p.adapter
    assert len({p.learning_rate for p in points}) == 3


def test_a_point_counts_with_the_mean_rate_since_the_last_one(run, tmp_path):
    model, folder, _ = run
    (tmp_path / "checkpoint-1").symlink_to(folder / "checkpoint-1")
    (tmp_path / "checkpoint-3").symlink_to(folder / "checkpoint-3")
    rates = [p.learning_rate for p in research.training_points(model, folder)]
    found = [p.learning_rate for p in research.training_points(model, tmp_path)]
    assert found == pytest.approx([rates[0], (rates[1] + rates[2]) / 2])


def test_a_damaged_checkpoint_and_an_empty_folder_are_refused(run, tmp_path):
    model, folder, _ = run
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        research.training_points(model, tmp_path)
    copy = tmp_path / "checkpoint-1"
    copy.mkdir()
    for path in (folder / "checkpoint-1").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / "optimizer.safetensors").write_bytes(b"0")
    with pytest.raises(CheckpointError, match="damaged"):
        research.training_points(model, tmp_path)


def test_a_run_without_adam_has_no_moments(run, monkeypatch):
    model, folder, _ = run

    def of_another_optimizer(path: Path) -> dict[str, Any]:
        state = read_state(path)
        return state | {"settings": state["settings"] | {"optimizer": "adamw_8bit"}}

    monkeypatch.setattr("fastlora.research.run_points.read_state", of_another_optimizer)
    assert all(p.exp_avg is None for p in research.training_points(model, folder))


def plain(name: str) -> Any:
    """Below the type hook that the tests may run with: its error would come first."""
    function = getattr(research, name)
    return getattr(function, "__wrapped__", function)


def test_wrong_arguments_are_refused(shallow, points):
    wrong = (5, [], "x", 5)
    message = "(?s)fn=5.*data='x'.*targets=5.*method='best'.*sketch=9.*points"
    with pytest.raises(ValueError, match=message):
        plain("influence")(*wrong, method="best", sketch=9)
    losses, bare = mean_losses(shallow), TrainingPoint(adapter=shallow.adapter, learning_rate=1.0)
    with pytest.raises(ValueError, match=r"points \[1\] have no moments.*tracin"):
        research.influence(losses, [points[0], bare], DATA, TARGETS)
    with pytest.raises(ValueError, match="at least one batch"):
        research.influence(losses, points, [], TARGETS)
    with pytest.raises(ValueError, match=r"(?s)model=.*output_dir="):
        plain("training_points")(5, "")
