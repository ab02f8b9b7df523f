"""train with a list of models equals a single run for each of them."""

from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

import fastlora
from fastlora.model import Model
from fastlora.training.learner import make_learner
from fastlora.training.loop import train
from fastlora.training.many import loop as passes
from fastlora.training.many import stack as stacks
from fastlora.training.many import step
from fastlora.training.many.batches import join
from fastlora.training.many.stack import make_stack
from oracles.checkpoints import make_checkpoint
from oracles.pairs import adapted
from oracles.training_runs import ROWS, settings
from oracles.trees import relative_error, same_bits

# What differs between the runs: ranks, scalings, targets, rates, seeds, data.
ADAPTERS: tuple[dict, ...] = (
    dict(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "down_proj", "up_proj"]),
    dict(r=4, lora_alpha=4, target_modules=["q_proj", "gate_proj", "up_proj"]),
    dict(r=3, lora_alpha=16, use_rslora=True, target_modules=["q_proj", "v_proj", "o_proj"]),
)
OWN: dict[str, list[Any]] = dict(
    data=[ROWS, ROWS[:7], ROWS[2:]],
    learning_rate=[1e-2, 3e-3, 1e-3],
    learning_rates=[None, {"B": 2e-2}, None],
    seed=[1, 2, 3],
    weight_decay=[0.0, 0.1, 0.01],
    warmup_ratio=[0.0, 0.2, 0.4],
    lr_scheduler=["cosine", "linear", "constant"],
    max_grad_norm=[None, 0.1, 1.0],
)
RUN: dict[str, Any] = dict(
    max_steps=5, batch_size=2, gradient_accumulation_steps=2, packing=False, progress=False
)


def models_of(base: Model, **settings: Any) -> list[Model]:
    return [adapted(base, seed=i, **(own | settings)) for i, own in enumerate(ADAPTERS)]


def assert_equal_to_singles(models, tokenizer, own, weights=1e-9, losses=1e-9, **run):
    """Weights relative to the largest of a leaf, losses and norms relative."""
    together, histories = train(models, tokenizer, **own, **run)
    for i, model in enumerate(models):
        mine = {name: values[i] for name, values in own.items()}
        alone, history = train(model, tokenizer, **mine, **run)
        assert relative_error(together[i].adapter, alone.adapter) < weights, i
        assert not same_bits(alone.adapter, model.adapter)
        for name in ("losses", "grad_norms", "eval_losses", "learning_rates"):
            close = pytest.approx(getattr(history, name), rel=losses)
            assert getattr(histories[i], name) == close, (i, name)
        # Estimates of the gradient's noise are differences of norms, which lose digits.
        for name in ("gradient_signals", "gradient_noises"):
            close = pytest.approx(getattr(history, name), rel=1e4 * losses)
            assert getattr(histories[i], name) == close, (i, name)
        several = run.get("gradient_accumulation_steps", 1) > 1 and not run.get("packing", True)
        assert bool(history.gradient_noises) >= several
        assert histories[i].tokens == history.tokens
        assert histories[i].eval_steps == history.eval_steps
        assert together[i].spec == model.spec and together[i].base is model.base


@pytest.fixture(scope="module")
def wide(folder) -> Model:
    """Without an adapter, in float64."""
    return fastlora.load(folder, dtype="float64", max_seq_length=64, device="cpu")[0]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_each_run_equals_a_single_run(wide, tokenizer, packing, dropout):
    """In float64, with evaluation. The data have other lengths and last batches of other sizes."""
    models = models_of(wide, lora_dropout=dropout)
    own = OWN | dict(eval_data=[ROWS[:3], ROWS[:5], ROWS[:3]])
    assert_equal_to_singles(models, tokenizer, own, **RUN | dict(packing=packing, eval_every=2))


def test_each_run_has_the_noise_of_its_single_run(wide, tokenizer):
    run = RUN | dict(max_steps=2, neftune_alpha=5.0)
    assert_equal_to_singles(models_of(wide), tokenizer, OWN, **run)


def test_losses_of_20_float32_steps_are_equal(base, tokenizer):
    models = models_of(base, lora_dropout=0.1)
    run = RUN | dict(max_steps=20, gradient_accumulation_steps=1)
    # Adam turns a rounding of a tiny gradient into a step of full size.
    assert_equal_to_singles(models, tokenizer, OWN, weights=1e-2, losses=1e-5, **run)


def test_runs_over_a_4_bit_base_equal_single_runs(folder, tokenizer):
    base, _ = fastlora.load(folder, load_in_4bit=True, max_seq_length=64, device="cpu")
    models = models_of(base, lora_dropout=0.2)
    run = RUN | dict(max_steps=3)
    assert_equal_to_singles(models, tokenizer, OWN, weights=1e-2, losses=1e-5, **run)


def test_runs_of_experts_and_routers_equal_single_runs(tmp_path, tokenizer):
    make_checkpoint("qwen3_moe_mixed", tmp_path, config=dict(vocab_size=4096))
    base, _ = fastlora.load(tmp_path, dtype="float64", max_seq_length=64, device="cpu")
    experts = dict(target_parameters=["gate.weight", "gate_up_proj", "down_proj"])
    models = models_of(base, **experts | dict(target_modules=["q_proj", "o_proj"]))
    assert_equal_to_singles(models, tokenizer, OWN, **RUN | dict(max_steps=3))


@pytest.mark.parametrize(
    "optimizer", ["adamw_8bit", lambda groups: torch.optim.SGD(groups, momentum=0.9)]
)
def test_other_optimizers_see_the_tensors_of_single_runs(base, tokenizer, optimizer):
    """Blocks of 8-bit moments, for example, lie as in a single run."""
    run = RUN | dict(max_steps=3, optimizer=optimizer)
    own = {k: v for k, v in OWN.items() if k != "learning_rates"}
    assert_equal_to_singles(models_of(base), tokenizer, own, weights=1e-3, losses=1e-5, **run)


def test_padding_and_absent_targets_stay_exactly_zero(base, tokenizer, monkeypatch):
    stacks, real = [], passes.make_stack
    monkeypatch.setattr(passes, "make_stack", lambda *a: stacks.append(real(*a)) or stacks[-1])
    train(models_of(base), tokenizer, **OWN, **RUN)
    (stack,) = stacks
    for leaf, own in zip(stack.leaves, stack.own, strict=True):
        for part, x in zip(leaf, own, strict=True):
            outside = torch.ones_like(part, dtype=torch.bool)
            if x is not None:
                outside[tuple(map(slice, x.shape))] = False
                assert x.any() and torch.equal(part[tuple(map(slice, x.shape))], x)
            assert not part[outside].any()


def test_gradients_of_padding_are_exactly_zero(base, tokenizer):
    models = models_of(base)
    stack = make_stack([make_learner(m, settings()) for m in models], settings())
    ids = torch.arange(3 * 8).view(3, 8) + 300
    trained = {"adapters": stack.adapters, "weights": torch.ones(3)}
    batch = {"input_ids": ids, "labels": ids}
    _, grads = stack.loss_and_grad(trained, stack.base, stack.spec, batch, None, None)
    for part, own in zip(tree_leaves(grads["adapters"]), stack.own, strict=True):
        for g, x in zip(part, own, strict=True):
            outside = torch.ones_like(g, dtype=torch.bool)
            if x is not None:
                outside[tuple(map(slice, x.shape))] = False
            assert not g[outside].any()


def test_a_run_that_ends_early_does_not_change_the_others(wide, tokenizer):
    models = models_of(wide, lora_dropout=0.2)
    run = {k: v for k, v in RUN.items() if k != "max_steps"}
    assert_equal_to_singles(models, tokenizer, OWN | dict(max_steps=[2, 5, 3]), **run)


def test_a_list_of_one_model_is_a_run(wide, tokenizer):
    (model, *_), own = models_of(wide), {name: values[:1] for name, values in OWN.items()}
    assert_equal_to_singles([model], tokenizer, own, **RUN)


def test_the_given_models_are_unchanged(base, tokenizer):
    models = models_of(base)
    before = [[x.clone() for x in tree_leaves(m.adapter)] for m in models]
    train(models, tokenizer, **OWN, **RUN)
    assert all(same_bits(m.adapter, old) for m, old in zip(models, before, strict=True))


def test_a_float16_base_rescales_only_the_run_that_overflows(folder, tokenizer, monkeypatch):
    """The sum over the tokens of ten rows is beyond 65,504, that over one row's two is not."""
    half, _ = fastlora.load(folder, dtype="float16", max_seq_length=64, device="cpu")
    half.base["lm_head"] *= 1000.0
    targets = ["q_proj", "v_proj", "down_proj"]
    models = [adapted(half, seed=i, r=2 + i, target_modules=targets) for i in range(2)]
    own = dict(data=[ROWS[4:5], ROWS], learning_rate=[1e-3, 1e-3])
    run = dict(max_steps=1, batch_size=10, packing=False, progress=False)
    scales, real = [], step._pass
    note = lambda *given: scales.append(given[-1].tolist()) or real(*given)
    monkeypatch.setattr(step, "_pass", note)
    assert_equal_to_singles(models, tokenizer, own, weights=0.05, losses=0.02, **run)
    assert scales == [[1.0, 1.0], [1.0, 2.0**-6]]


def test_a_stack_is_recorded_as_a_single_run_with_all_rows_is(base, monkeypatch):
    """Where micro-batches of n times the rows are small enough for a CUDA graph."""
    asked, graphs = [], []
    note = lambda spec, device, given, stacked: asked.append(given.batch_size) or len(asked) < 2
    monkeypatch.setattr(stacks, "should_use_cuda_graph", note)
    graph = lambda fn, cuda_graph: graphs.append(cuda_graph) or fn
    monkeypatch.setattr(stacks, "value_and_grad", graph)
    learners = [make_learner(model, settings()) for model in models_of(base)]
    make_stack(learners, settings(batch_size=4))
    make_stack(learners[:2], settings(batch_size=4))
    assert (asked, graphs) == ([12, 8], [True, False])


# ── batches ──


def batch_of(rows: int, t: int, first: int) -> dict[str, torch.Tensor]:
    ids = torch.arange(rows * t).view(rows, t) + first
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def test_joined_rows_are_padded_and_filled_up_without_labels():
    joined, widths = join([batch_of(2, 3, 10), None, batch_of(1, 5, 90)])
    assert widths is not None and widths.tolist() == [3, 5, 5]
    assert {name: x.shape for name, x in joined.items()} == dict.fromkeys(joined, (6, 5))
    assert joined["input_ids"][:2].tolist() == [[10, 11, 12, 0, 0], [13, 14, 15, 0, 0]]
    assert joined["attention_mask"][1].tolist() == [1, 1, 1, 0, 0]
    assert joined["labels"][1].tolist() == [13, 14, 15, -100, -100]
    assert joined["labels"][4].tolist() == [90, 91, 92, 93, 94]
    assert (joined["labels"][[2, 3, 5]] == -100).all()
    assert joined["attention_mask"].any(1).all()


def test_batches_of_equal_width_have_no_widths():
    assert join([batch_of(2, 3, 0), batch_of(1, 3, 0)]).widths is None
