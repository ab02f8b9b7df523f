"""The loss that train() minimises and the steps that it takes."""

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

import fastlora
from fastlora.data.batches import batches
from fastlora.data.encoding import encode_rows
from fastlora.distributed.ranks import Ranks
from fastlora.formats.peft.names import peft_state_dict
from fastlora.ops.attention.context_group import ContextGroup
from fastlora.training import learner, step
from fastlora.training.loop import train
from fastlora.training.nonfinite import nonfinite_cause
from fastlora.training.step import learning_rate_factor
from oracles.pairs import adapted
from oracles.training_runs import QUIET, ROWS, settings
from oracles.trees import relative_error, same_bits


def test_training_learns_what_can_be_memorised(base, tokenizer):
    model = fastlora.lora(base, r=16)
    trained, history = train(
        model, tokenizer, ROWS[:3], max_steps=60, learning_rate=2e-2, packing=False, **QUIET
    )
    assert history.losses[0] > 9
    # A random head 32 wide and 4096 tall cannot be surer than this of any token.
    assert history.losses[-1] < 1.7
    said = trained.generate_text(tokenizer, ROWS[1]["prompt"], max_new_tokens=24)
    assert said == ROWS[1]["completion"]


@pytest.mark.parametrize("max_grad_norm", [0.5, None])
def test_steps_equal_adamw_over_gradients_of_transformers_and_peft(
    folder, model, tokenizer, tmp_path, max_grad_norm
):
    model.save_pretrained(tmp_path)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    oracle = peft.PeftModel.from_pretrained(base, str(tmp_path), is_trainable=True).eval()
    leaves = [p for p in oracle.parameters() if p.requires_grad]
    rate, decay = 3e-3, 0.1
    optimizer = torch.optim.AdamW(leaves, lr=rate, weight_decay=decay)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 1, 4)
    examples = encode_rows(ROWS, tokenizer, max_seq_length=64)
    stream = (b for e in itertools.count() for b in batches(examples, 4, seed=7, epoch=e))
    losses, norms = [], []
    for batch in itertools.islice(stream, 4):
        loss = oracle(**batch).loss
        loss.backward()
        limit = max_grad_norm or math.inf
        norms.append(torch.nn.utils.clip_grad_norm_(leaves, limit).item())
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()

    trained, history = train(
        model,
        tokenizer,
        ROWS,
        max_steps=4,
        batch_size=4,
        learning_rate=rate,
        warmup_ratio=0.25,
        weight_decay=decay,
        max_grad_norm=max_grad_norm,
        packing=False,
        seed=7,
        progress=False,
    )
    assert history.losses == pytest.approx(losses, rel=1e-6)
    assert history.grad_norms == pytest.approx(norms, rel=1e-5)
    assert min(norms) > 0.5, "else nothing is clipped"
    theirs = peft.get_peft_model_state_dict(oracle)
    for name, leaf in peft_state_dict(trained.adapter, trained.spec.lora).items():
        # Adam divides by the gradient's size, so its rounding shows where that is near 0.
        assert relative_error(leaf, theirs[name].detach()) < 1e-4, name
    moved = relative_error(trained.adapter, model.adapter)
    assert moved > 100 * 1e-4


@pytest.mark.parametrize("packing", [True, False])
def test_only_the_product_of_batch_size_and_accumulation_counts(exact, tokenizer, packing):
    """Ten rows of 1 to 14 words; 8 do not divide them, so each epoch ends in a smaller step."""
    short = dataclasses.replace(exact, spec=dataclasses.replace(exact.spec, max_seq_length=24))
    results = [
        train(
            short,
            tokenizer,
            ROWS,
            batch_size=8 // accumulation if not packing else 4 // accumulation,
            gradient_accumulation_steps=accumulation,
            num_epochs=2,
            learning_rate=1e-3,
            packing=packing,
            **QUIET,
        )
        for accumulation in (1, 2, 4)
    ]
    (whole, one), *rest = results
    assert len(one.steps) >= 4 and len(set(one.tokens)) > 1
    for split, history in rest:
        assert history.tokens == one.tokens
        assert history.losses == pytest.approx(one.losses, rel=1e-12)
        assert history.grad_norms == pytest.approx(one.grad_norms, rel=1e-12)
        assert relative_error(split.adapter, whole.adapter) < 1e-9


def test_accumulation_is_exact_to_1e_6_in_float32(model, tokenizer):
    """The mean over all tokens of a step; a mean of the micro-batches' means is off by percents."""
    run = dict(max_steps=1, packing=False, **QUIET)
    _, whole = train(model, tokenizer, ROWS, batch_size=10, **run)
    _, split = train(model, tokenizer, ROWS, batch_size=5, gradient_accumulation_steps=2, **run)
    assert split.losses == pytest.approx(whole.losses, rel=1e-6)
    assert split.grad_norms == pytest.approx(whole.grad_norms, rel=1e-6)
    stream = batches(encode_rows(ROWS, tokenizer, max_seq_length=64), 5, seed=3407)
    means = [model.loss(batch).item() for batch in stream]
    assert abs(np.mean(means) / whole.losses[0] - 1) > 1e-4


def test_packing_changes_neither_loss_nor_gradient(exact, tokenizer):
    run = dict(max_steps=1, batch_size=10, **QUIET)
    _, packed = train(exact, tokenizer, ROWS, packing=True, **run)
    _, padded = train(exact, tokenizer, ROWS, packing=False, **run)
    assert packed.tokens == padded.tokens
    assert packed.losses == pytest.approx(padded.losses, rel=1e-12)
    assert packed.grad_norms == pytest.approx(padded.grad_norms, rel=1e-12)


def test_packed_sequences_are_as_long_as_max_seq_length(model, tokenizer, monkeypatch):
    seen = []
    shape = lambda *args, **kw: seen.append(args[3]["input_ids"].shape) or real(*args, **kw)
    real = learner.loss_sum
    monkeypatch.setattr(learner, "loss_sum", shape)
    train(model, tokenizer, ROWS, max_steps=1, batch_size=2, **QUIET)
    assert {s[1] for s in seen} == {64}


def test_clipping_off_is_none_or_zero(model, tokenizer):
    run = dict(max_steps=2, batch_size=4, **QUIET)
    none, zero, small = (
        train(model, tokenizer, ROWS, max_grad_norm=limit, **run)[0].adapter
        for limit in (None, 0, 1e-9)
    )
    assert same_bits(none, zero)
    assert not same_bits(none, small)


@pytest.mark.parametrize("scheduler", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("warmup_steps", "steps"), [(0, 7), (3, 20), (5, 5), (1, 1)])
def test_schedules_are_those_of_transformers(scheduler, warmup_steps, steps):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    counts: dict[str, Any] = {"num_warmup_steps": warmup_steps}
    counts |= {} if scheduler == "constant" else {"num_training_steps": steps}
    name = "constant_schedule_with_warmup" if scheduler == "constant" else f"{scheduler}_schedule"
    name = name.removesuffix("_with_warmup") + "_with_warmup"
    theirs = getattr(transformers, f"get_{name}")(optimizer, **counts)
    for index in range(steps):
        ours = learning_rate_factor(scheduler, index, warmup_steps, steps)
        assert ours == theirs.get_last_lr()[0], index
        optimizer.step()
        theirs.step()


def test_warm_up_is_a_share_of_all_steps_rounded_up(model, tokenizer):
    _, history = train(
        model,
        tokenizer,
        ROWS[:1],
        max_steps=5,
        learning_rate=1e-3,
        lr_scheduler="constant",
        warmup_ratio=0.21,
        progress=False,
    )
    assert history.learning_rates == pytest.approx((0, 5e-4, 1e-3, 1e-3, 1e-3))


def test_a_run_of_one_step_has_no_warm_up(model, tokenizer):
    trained, history = train(model, tokenizer, ROWS, max_steps=1, progress=False)
    assert history.learning_rates == (2e-4,)
    assert not same_bits(trained.adapter, model.adapter)
    _, two = train(model, tokenizer, ROWS, max_steps=2, progress=False)
    assert two.learning_rates[0] == 0


def half(folder, head_scale: float = 1.0):
    """The model over a float16 base, and over the same base in float32."""
    for dtype in ("float16", "float32"):
        base, _ = fastlora.load(folder, dtype=dtype, max_seq_length=64, device="cpu")
        if dtype == "float32":  # with float16's rounding
            rounded = lambda x: x.half().float()
            base = dataclasses.replace(base, base=torch.utils._pytree.tree_map(rounded, base.base))
        base.base["lm_head"] *= head_scale
        yield adapted(base, r=2, target_modules=["q_proj", "v_proj", "down_proj"])


@pytest.mark.parametrize("rows", [1, 256])
def test_the_gradient_of_a_float16_base_does_not_depend_on_the_tokens(folder, tokenizer, rows):
    """A mean over 256 rows, taken before the backward pass, had an error of 10 % here."""
    run = dict(max_steps=1, packing=False, train_on="all", **QUIET)
    norms = [
        train(m, tokenizer, ROWS[1:2] * rows, batch_size=rows, **run)[1].grad_norms[0]
        for m in half(folder, head_scale=0.02)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=0.01)


def test_a_float16_gradient_that_overflows_is_taken_again_in_a_smaller_scale(
    folder, tokenizer, monkeypatch
):
    """With 3,000 times the head's weights, the sum over the tokens is beyond 65,504."""
    run = dict(max_steps=1, batch_size=10, packing=False, **QUIET)
    norms = [train(m, tokenizer, ROWS, **run)[1].grad_norms[0] for m in half(folder, 3000.0)]
    assert norms[0] == pytest.approx(norms[1], rel=0.05)
    monkeypatch.setattr(step, "FLOAT16_SCALES", (1.0,))
    with pytest.raises(FloatingPointError, match=r"the gradient of .*lora_"):
        train(next(half(folder, 3000.0)), tokenizer, ROWS, **run)


def test_a_forward_pass_that_was_not_searched_is_not_called_finite(model):
    """Ranks that have rows together do not run whole rows to search for a cause."""
    of_run, ranks = learner.make_learner(model, settings()), Ranks()
    gradient = [torch.full_like(x, math.nan) for x in of_run.leaves.values()]
    assert "the forward pass is finite" in nonfinite_cause(of_run, [], [], gradient)
    ranks.context = ContextGroup("", 0, 2)
    cause = nonfinite_cause(of_run, [], [], gradient, ranks)
    assert "the gradient of" in cause and "have together are not searched" in cause
    assert "forward pass" not in cause
