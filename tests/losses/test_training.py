"""train(loss=...): what each loss minimises, with every way of splitting and resuming a run."""

import dataclasses
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

import fastlora
from fastlora import functional as FL
from fastlora import losses
from fastlora.model import Model
from fastlora.training.loop import train
from oracles.preference_data import LABELLED, PAIRS
from oracles.training_runs import ROWS, Killed, stop_at
from oracles.trees import randomised, relative_error, same_bits

RUN: dict[str, Any] = dict(
    max_steps=4, batch_size=4, learning_rate=1e-2, warmup_ratio=0.0, progress=False
)
DATA = {"dpo": PAIRS, "orpo": PAIRS, "simpo": PAIRS, "kto": LABELLED}
ALL = {**DATA, "dft": ROWS, "distill": ROWS}


def loss_of(name: str, model: Model) -> Any:
    """A value of train(loss=...)."""
    if name != "distill":
        return name
    return losses.Distill(teacher=model.with_adapter(randomised(model.adapter, seed=11)))


def with_dropout(model: Model) -> Model:
    assert model.spec.lora is not None
    lora = dataclasses.replace(model.spec.lora, lora_dropout=0.3)
    return dataclasses.replace(model, spec=dataclasses.replace(model.spec, lora=lora))


@pytest.mark.parametrize("loss", DATA)
def test_the_loss_of_preference_rows_falls(loss, model, tokenizer):
    run = RUN | dict(max_steps=12, batch_size=7, learning_rate=2e-2, lr_scheduler="constant")
    trained, history = train(model, tokenizer, DATA[loss], loss=loss, **run)
    assert history.losses[-1] < history.losses[0] - 0.05
    assert trained.spec == model.spec


def test_dpo_starts_at_log_2_and_raises_the_margin(model, tokenizer):
    trained, history = train(
        model, tokenizer, PAIRS, loss="dpo", **RUN | dict(max_steps=10, batch_size=7)
    )
    assert history.losses[0] == pytest.approx(torch.tensor(2.0).log().item(), rel=1e-6)
    pairs = losses.encode_pairs(PAIRS, tokenizer, max_seq_length=64)
    batch = next(losses.preference_batches(pairs, 7, seed=None))
    sums = [
        losses.row_logprobs(m.adapter, m.base, m.spec, batch)[0].chunk(2) for m in (model, trained)
    ]
    before, after = (chosen - rejected for chosen, rejected in sums)
    assert (after > before).all()


@pytest.mark.parametrize("loss", sorted(ALL.keys() - {"kto"}))
def test_only_the_product_of_batch_size_and_accumulation_counts(loss, model, tokenizer):
    """Seven rows in steps of four: each epoch ends in a smaller step. KTO's baseline is estimated
    from each micro-batch."""
    rows, run = ALL[loss][:7], RUN | dict(packing=False, loss=loss_of(loss, model))
    split = dict(batch_size=2, gradient_accumulation_steps=2)
    whole, one = train(model, tokenizer, rows, **run)
    parts, two = train(model, tokenizer, rows, **run | split)
    assert two.losses == pytest.approx(one.losses, rel=1e-9)
    assert two.grad_norms == pytest.approx(one.grad_norms, rel=1e-7)
    assert relative_error(parts.adapter, whole.adapter) < 1e-6


def test_a_function_that_is_the_supervised_loss_gives_its_bits(model, tokenizer):
    def supervised(adapter: Any, base: Any, spec: Any, batch: Any, *, seed: Any) -> torch.Tensor:
        return FL.loss_sum(adapter, base, spec, batch, seed=seed)[0]

    results = [
        train(model, tokenizer, ROWS, loss=loss, packing=False, **RUN)
        for loss in ("sft", supervised)
    ]
    assert results[0][1].losses == results[1][1].losses
    assert same_bits(results[0][0].adapter, results[1][0].adapter)


@pytest.mark.parametrize("loss", ["dft", "distill"])
def test_packed_and_padded_rows_have_the_same_loss(loss, model, tokenizer):
    run = RUN | dict(max_steps=1, batch_size=16, loss=loss_of(loss, model))
    packed, padded = (
        train(model, tokenizer, ROWS, packing=packing, **run) for packing in (True, False)
    )
    assert packed[1].losses == pytest.approx(padded[1].losses, rel=1e-9)
    assert relative_error(packed[0].adapter, padded[0].adapter) < 1e-6


class Margin(losses.Objective):
    """A user's loss of pairs: minus the difference of log-probabilities."""

    rows = "pairs"

    def loss_sum(self, adapter, base, spec, batch, seed):
        chosen, rejected = losses.row_logprobs(adapter, base, spec, batch, seed=seed)[0].chunk(2)
        return (rejected - chosen).sum()

    def count(self, batch):
        return len(batch["input_ids"]) // 2


def test_a_users_record_trains_pairs(model, tokenizer):
    _, history = train(model, tokenizer, PAIRS, loss=Margin(), **RUN | dict(batch_size=7))
    assert history.losses[-1] < history.losses[0] - 1


@pytest.mark.parametrize("packing", [True, False])
def test_dft_and_distillation_train_supervised_rows(packing, model, tokenizer):
    teacher = model.with_adapter(randomised(model.adapter, seed=11))
    run = RUN | dict(max_steps=12, learning_rate=3e-2, lr_scheduler="constant", packing=packing)
    _, dft = train(model, tokenizer, ROWS, loss="dft", **run)
    _, sft = train(model, tokenizer, ROWS, loss="sft", **run)
    assert dft.tokens == sft.tokens and dft.losses[0] < sft.losses[0]
    student, history = train(
        model, tokenizer, ROWS, loss=losses.Distill(teacher=teacher, beta=0.0), **run
    )
    assert history.losses[-1] < 0.7 * history.losses[0]
    assert not same_bits(student.adapter, model.adapter)


@pytest.mark.parametrize("loss", ALL)
def test_eval_data_have_the_same_loss(loss, model, tokenizer):
    """Without dropout; of all rows together, also if the last batch is smaller. A run of rate 0
    over the same rows has that loss in its first step."""
    rows = ALL[loss][:6]
    run = dict(max_steps=2, batch_size=6, learning_rate=1e-2, warmup_ratio=0.0, progress=False)
    run |= dict(packing=False, eval_every=1, eval_data=rows, loss=loss_of(loss, model))
    trained, history = train(with_dropout(model), tokenizer, rows, **run)
    again = dict(max_steps=1, learning_rate=1e-30, eval_data=None, eval_every=None)
    if loss in ("dpo", "kto"):  # whose reference is the start of a run
        again |= dict(loss={"dpo": losses.DPO, "kto": losses.KTO}[loss](reference=model))
    plain = dataclasses.replace(trained, spec=model.spec)
    _, at_the_end = train(plain, tokenizer, rows, **run | again)
    # KTO's baseline depends on the order of the rows, DPO's loss does not.
    close = 0.05 if loss == "kto" else 1e-6
    assert history.eval_steps == (1, 2)
    assert history.eval_losses[1] == pytest.approx(at_the_end.losses[0], rel=close)
    assert history.eval_losses[1] != pytest.approx(history.eval_losses[0], rel=1e-6)


def test_the_given_model_does_not_change(model, tokenizer):
    before = tree_map(torch.clone, model.adapter)
    train(model, tokenizer, PAIRS, loss="dpo", **RUN)
    assert same_bits(model.adapter, before)


@pytest.mark.parametrize("loss", ALL)
def test_a_resumed_run_gives_the_same_bits(loss, model, tokenizer, tmp_path):
    """With dropout, and two micro-batches in a step."""
    model, data, objective = with_dropout(model), ALL[loss], loss_of(loss, model)
    run = RUN | dict(max_steps=3, batch_size=2, gradient_accumulation_steps=2, loss=objective)
    whole, one = train(model, tokenizer, data, **run)
    run |= dict(output_dir=tmp_path / "run", save_every=1)
    with pytest.raises(Killed):
        train(model, tokenizer, data, log=stop_at(2), **run)
    resumed, two = train(model, tokenizer, data, resume=True, **run)
    assert two.losses == one.losses
    assert same_bits(resumed.adapter, whole.adapter)
    run |= dict(output_dir=None, save_every=None, seed=4)
    _, other = train(model, tokenizer, data, **run)
    assert other.losses != one.losses


def test_another_reference_or_teacher_is_another_run(model, tokenizer, tmp_path):
    """The start adapter is DPO's reference, and a resumed run could not know it otherwise."""
    other = model.with_adapter(randomised(model.adapter, seed=12))
    third = other.with_adapter(randomised(model.adapter, seed=13))
    cases = {
        "reference": (PAIRS, model, losses.DPO(), other, losses.DPO()),
        "teacher": (
            ROWS, model, losses.Distill(teacher=other), model, losses.Distill(teacher=third)
        ),
    }  # fmt: skip
    for name, (data, start, loss, new_start, new_loss) in cases.items():
        run = RUN | dict(max_steps=2, output_dir=tmp_path / name, save_every=1)
        with pytest.raises(Killed):
            train(start, tokenizer, data, loss=loss, log=stop_at(1), **run)
        with pytest.raises(ValueError, match=f"hash of the loss's {name}:"):
            train(new_start, tokenizer, data, loss=new_loss, resume=True, **run)


@pytest.mark.parametrize("loss", ALL)
def test_a_base_in_4_bits_is_trained_and_left_unchanged(loss, quantised, tokenizer):
    before = [x.clone() for x in tree_leaves(quantised.base)]
    run = RUN | dict(max_steps=8, batch_size=7, learning_rate=2e-2, lr_scheduler="constant")
    _, history = train(quantised, tokenizer, ALL[loss], loss=loss_of(loss, quantised), **run)
    # DFT's loss, -p log p, rises with p below 1/e.
    assert (history.losses[-1] < history.losses[0]) != (loss == "dft")
    assert same_bits(tree_leaves(quantised.base), before)


def test_kto_with_one_row_in_a_micro_batch_compares_with_another_prompt(model, tokenizer):
    """Its own reply would make the baseline equal to its log-ratio, and the loss 1/2."""
    other = losses.KTO(reference=None)
    run = RUN | dict(max_steps=2, batch_size=1, loss=other, lr_scheduler="constant")
    _, history = train(model, tokenizer, LABELLED, **run)
    assert history.losses[0] != pytest.approx(0.5, abs=1e-6)


@pytest.mark.compile
def test_compiled_layers_train_as_eager_ones(model, tokenizer, region_backend):
    """All losses in one test: they share the compiled layer."""
    region_backend("aot_eager")
    model = with_dropout(model)
    for loss, rows in ALL.items():
        run = RUN | dict(max_steps=2, batch_size=7, packing=False, loss=loss_of(loss, model))
        rows = rows[:7] if loss in DATA else ROWS[:7]
        eager, one = train(model.with_spec(compile=False), tokenizer, rows, **run)
        compiled, two = train(model.with_spec(compile=True), tokenizer, rows, **run)
        assert two.losses == pytest.approx(one.losses, rel=1e-9), loss
        assert relative_error(compiled.adapter, eager.adapter) < 1e-6, loss


def test_another_loss_is_another_run(model, tokenizer, tmp_path):
    run = RUN | dict(output_dir=tmp_path / "run", save_every=1)
    with pytest.raises(Killed):
        train(model, tokenizer, PAIRS, loss="dpo", log=stop_at(2), **run)
    with pytest.raises(ValueError, match="loss"):
        train(model, tokenizer, PAIRS, loss=losses.DPO(beta=0.2), resume=True, **run)


def test_rows_of_another_kind_are_refused(model, tokenizer):
    with pytest.raises(ValueError, match="row 1: no chosen and no rejected"):
        train(model, tokenizer, ROWS, loss="dpo", **RUN)
    with pytest.raises(ValueError, match="row 1: no completion and no label"):
        train(model, tokenizer, PAIRS, loss="kto", **RUN)
    with pytest.raises(ValueError, match="eval_data"):
        train(model, tokenizer, PAIRS, eval_data=ROWS, loss="dpo", **RUN)


def test_a_teacher_with_another_vocabulary_is_refused_before_the_first_step(model, tokenizer):
    config = dataclasses.replace(model.spec.config, vocab_size=5000)
    spec = dataclasses.replace(model.spec, config=config)
    teacher = dataclasses.replace(model, spec=spec)
    with pytest.raises(ValueError, match="5,000 ids"):
        train(model, tokenizer, ROWS, loss=losses.Distill(teacher=teacher), **RUN)


def test_a_nan_of_a_preference_loss_names_its_tensor(model, tokenizer):
    broken = tree_map(torch.clone, model.adapter)
    broken["layers"][0]["q_proj"].a[0, 0] = float("nan")
    for loss in ("dpo", "kto"):
        with pytest.raises(FloatingPointError, match=r"q_proj\.lora_A"):
            train(model.with_adapter(broken), tokenizer, DATA[loss], loss=loss, **RUN)


@pytest.mark.parametrize("value", ["distill", "ppo", None, 3, losses.DPO])
def test_a_value_that_is_no_loss_is_refused_by_name(value, model, tokenizer):
    plain: Any = getattr(fastlora.train, "__wrapped__", fastlora.train)
    with pytest.raises(ValueError, match=r"loss=.*losses\.DPO\(beta"):
        plain(model, tokenizer, PAIRS, loss=value, **RUN)
