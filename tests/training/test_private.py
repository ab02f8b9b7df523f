"""DP-SGD: clipping by example, Poisson sampling, noise of a generator of its own, and epsilon."""

import math
import warnings

import pytest
import torch
from torch.utils._pytree import tree_leaves

import fastlora
from fastlora import functional as FL
from fastlora.data.batches import batches
from fastlora.data.encoding import RowLimits
from fastlora.data.reading import read_examples
from fastlora.formats.peft.names import named_leaves
from fastlora.training.learner import make_learner
from fastlora.training.loop import train
from fastlora.training.private_checks import warn_of_noise
from fastlora.training.private_step import drawn_rows, private_gradient
from oracles.training_runs import ROWS, Killed, long_run, settings, stop_at, timeless
from oracles.trees import relative_error, same_bits

SEED = 2**40 + 7  # not the default, which is public
PRIVATE = dict(clip_per_example=0.5, noise_multiplier=1.0, packing=False, seed=SEED)

# Opacus 1.6.0, opacus.accountants.RDPAccountant with history [(noise, rate, steps)] and its default
# orders: (sampling rate, noise multiplier, steps, delta) -> epsilon.
OPACUS = {
    (0.01, 0.8, 500, 1e-5): 2.9790230804413307,
    (0.05, 1.0, 200, 1e-5): 5.367640841571381,
    (128 / 4524, 0.6, 12, 1e-4): 4.380542445602051,
    (0.2, 2.0, 60, 1e-3): 3.0228260141525936,
}


@pytest.fixture(autouse=True)
def expected_warnings():
    """A random tiny model is trained on few rows, so every run warns."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the noise drowns the signal")
        yield


def micro_batches(model, tokenizer, rows, size):
    limits = RowLimits(model.spec.max_seq_length, False, "error", "error")
    examples, _ = read_examples(rows, tokenizer, limits, name="data", train_on="responses")
    return [*batches(examples, size, seed=None, max_seq_length=model.spec.max_seq_length)]


def gradient(model, tokenizer, rows, size=4, step=1, **changed):
    given = settings(**PRIVATE | dict(noise_multiplier=0.0, batch_size=4) | changed)
    given_batches = micro_batches(model, tokenizer, rows, size)
    seeds = [None] * len(given_batches)
    return private_gradient(
        make_learner(model, given), given, len(ROWS), step, given_batches, seeds
    )


# ── the gradient ──────────────────────────────────────────────────────────────────────────


def test_the_clipped_sum_equals_a_loop(exact, tokenizer):
    """Rows' own means, scaled down to the norm C, divided by the expected batch."""
    each = []
    for batch in micro_batches(exact, tokenizer, ROWS[:6], 1):
        loss = lambda a, batch=batch: FL.loss(a, exact.base, exact.spec, batch)
        grads = [*named_leaves(fastlora.value_and_grad(loss)(exact.adapter)[1]).values()]
        each.append((grads, math.sqrt(sum(g.square().sum().item() for g in grads))))
    clip = sorted(norm for _, norm in each)[2]
    scaled = [[g * min(1.0, clip / norm) / 4 for g in grads] for grads, norm in each]
    total = [sum(leaf) for leaf in zip(*scaled, strict=True)]
    clipped = sum(norm > clip * (1 + 1e-9) for _, norm in each)
    for size in (6, 4, 1):  # however the rows lie in micro-batches
        mine = gradient(exact, tokenizer, ROWS[:6], size, clip_per_example=clip * (1 + 1e-12))
        assert relative_error(mine.gradient, total) < 1e-10
        assert float(mine.figures["clipped_share"]) == pytest.approx(clipped / 6)
    whole = FL.loss_sum(
        exact.adapter, exact.base, exact.spec, micro_batches(exact, tokenizer, ROWS[:6], 6)[0]
    )
    assert float(mine.loss) == pytest.approx(float(whole[0] / whole[1]))


@pytest.mark.parametrize("left_out", range(3))
def test_a_row_changes_the_sum_by_the_clipping_norm_at_most(left_out, exact, tokenizer):
    clip, others = 0.3, [row for i, row in enumerate(ROWS[:3]) if i != left_out]
    whole = gradient(exact, tokenizer, ROWS[:3], clip_per_example=clip).gradient
    without = gradient(exact, tokenizer, others, clip_per_example=clip).gradient
    pairs = zip(whole, without, strict=True)
    change = math.sqrt(sum((a - b).square().sum().item() for a, b in pairs)) * 4
    assert change == pytest.approx(clip, rel=1e-9)  # every row is longer than it here


def test_noise_has_the_stated_deviation_and_its_own_generator(exact, tokenizer):
    before = torch.get_rng_state()
    plain = gradient(exact, tokenizer, ROWS[:2]).gradient
    draw = lambda **how: gradient(exact, tokenizer, ROWS[:2], noise_multiplier=3.0, **how).gradient
    noises = [
        torch.cat([(a - b).flatten() for a, b in zip(draw(step=step), plain, strict=True)])
        for step in (1, 2)
    ]
    for noise in noises:  # standard deviation 3 C / B
        assert noise.std().item() == pytest.approx(3.0 * 0.5 / 4, rel=5 / math.sqrt(len(noise)))
        assert noise.mean().abs() < 5 * noise.std() / math.sqrt(len(noise))
    assert torch.corrcoef(torch.stack(noises))[0, 1].abs() < 5 / math.sqrt(len(noises[0]))
    assert same_bits(draw(), draw()) and not same_bits(draw(), draw(seed=SEED + 1))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_step_without_rows_is_noise(exact, tokenizer):
    learner, given = make_learner(exact, settings(**PRIVATE)), settings(**PRIVATE)
    result = private_gradient(learner, given, 10, 1, [], [])
    assert result.loss == 0 and result.figures["drawn_rows"] == 0
    assert all(g.isfinite().all() and g.any() for g in result.gradient)


@pytest.mark.parametrize("special", [dict(use_dora=True), dict(lora_dropout=0.2)], ids=str)
def test_other_adapters_are_trained_too(special, base, tokenizer):
    model = fastlora.lora(base, r=2, target_modules=["q_proj"], **special)
    run = dict(max_steps=2, batch_size=4, warmup_ratio=0.0, progress=False)
    trained, history = train(model, tokenizer, ROWS, **run, **PRIVATE)
    assert not same_bits(trained.adapter, model.adapter) and len(history.losses) == 2


# ── sampling ──────────────────────────────────────────────────────────────────────────────


def test_rows_are_drawn_independently_with_the_same_probability():
    steps, n, rate = 2000, 20, 0.3
    drawn = torch.zeros(steps, n)
    for step in range(steps):
        drawn[step, drawn_rows(SEED, step + 1, n, rate)] = 1
    error = 4.5 * math.sqrt(rate * (1 - rate) / steps)
    assert ((drawn.mean(0) - rate).abs() < error).all()
    together = torch.corrcoef(drawn.t()).fill_diagonal_(0)
    assert together.abs().max() < 4.5 / math.sqrt(steps)
    # Independent draws: the number of rows of a step varies as a binomial one does.
    assert drawn.sum(1).var().item() == pytest.approx(n * rate * (1 - rate), rel=0.15)
    assert drawn_rows(SEED, 5, n, rate) == drawn_rows(SEED, 5, n, rate)


# ── a run ─────────────────────────────────────────────────────────────────────────────────


def test_a_run_resumes_with_the_same_bits(base, tokenizer, tmp_path):
    model, given = fastlora.lora(base, r=2), PRIVATE | dict(max_steps=8, batch_size=1)
    whole, history = long_run(model, tokenizer, tmp_path / "whole", **given)
    with pytest.raises(Killed):
        long_run(model, tokenizer, tmp_path / "cut", log=stop_at(3), **given)
    resumed, again = long_run(model, tokenizer, tmp_path / "cut", resume=True, **given)
    assert same_bits(resumed.adapter, whole.adapter) and timeless(again) == timeless(history)
    assert 0 in history.tokens, "the seed of this test draws a step without rows"
    assert len(history.eval_losses) == 4
    with pytest.raises(ValueError, match=r"noise_multiplier: 1.0 there, 2.0 now"):
        changed = given | dict(noise_multiplier=2.0)
        long_run(model, tokenizer, tmp_path / "cut", resume=True, **changed)
    assert history.sampling_rates == (0.2,) * 8 and history.noise_multipliers == (1.0,) * 8


def history_of(rate, noise, steps):
    record = dict(loss=1.0, learning_rate=1.0, tokens=1, seconds=1.0, grad_norm=1.0)
    private = dict(sampling_rate=rate, noise_multiplier=noise)
    return fastlora.History.of([record | private | {"step": i + 1} for i in range(steps)])


@pytest.mark.parametrize("case", OPACUS, ids=str)
def test_epsilon_is_that_of_opacus(case):
    *run, delta = case
    assert history_of(*run).epsilon(delta) == pytest.approx(OPACUS[case], rel=1e-3)


def test_epsilon_grows_with_steps_and_needs_a_private_run(model, tokenizer):
    few, many = (history_of(0.1, 1.0, steps).epsilon(1e-5) for steps in (5, 50))
    assert 0 < few < many
    assert history_of(0.1, 0.0, 5).epsilon(1e-5) == math.inf
    _, history = train(model, tokenizer, ROWS, max_steps=1, packing=False, progress=False)
    with pytest.raises(ValueError, match="was not private"):
        history.epsilon(1e-5)
    for delta in (0.0, 1.0, 2.0):
        with pytest.raises(ValueError, match="delta"):
            history_of(0.1, 1.0, 2).epsilon(delta)


# ── refusals and warnings ─────────────────────────────────────────────────────────────────


def test_what_breaks_the_guarantee_is_refused_by_name(model, tokenizer):
    run = lambda data=ROWS, **changed: train(model, tokenizer, data, **PRIVATE | changed)
    with pytest.raises(ValueError, match=r"(?s)packing=True.*loss='dft'.*too_long='split'"):
        run(packing=True, loss="dft", too_long="split")
    with pytest.raises(ValueError, match="give both"):
        run(noise_multiplier=None)
    with pytest.raises(ValueError, match="give both"):
        run(clip_per_example=None)
    with pytest.raises(ValueError, match=r"= 16 rows, but the data have 10; .* at most 10"):
        run(batch_size=16)
    half = fastlora.Model(
        spec=model.spec,
        base={**model.base, "norm": model.base["norm"].half()},
        adapter=model.adapter,
    )
    with pytest.raises(ValueError, match="float16"):
        train(half, tokenizer, ROWS, **PRIVATE)


def test_weights_are_refused(model, tokenizer, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(ValueError, match="repeats some rows"):
        train(model, tokenizer, {str(file): 1.0}, **PRIVATE)


def test_noise_above_the_signal_and_a_public_seed_are_warned_of(model):
    numbers = sum(x.numel() for x in tree_leaves(model.adapter))
    with pytest.warns(UserWarning, match=rf"drowns .*sqrt\({numbers:,} trained numbers\) / 8 rows"):
        warn_of_noise(settings(**PRIVATE), model)
    quiet = PRIVATE | dict(noise_multiplier=7 / math.sqrt(numbers))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_noise(settings(**quiet), model)
    with pytest.warns(UserWarning, match="anybody can compute the noise"):
        warn_of_noise(settings(**quiet | dict(seed=3407)), model)
