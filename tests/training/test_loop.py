"""Epochs, evaluation, the history, and all that a run leaves unchanged."""

import copy
import dataclasses
import itertools
import json
import os

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves

import fastlora
from fastlora.data.encoding import encode_rows
from fastlora.functional import token_logprobs
from fastlora.training import learner, step
from fastlora.training.history import History
from fastlora.training.loop import train
from fastlora.training.step import dropout_seed
from oracles.training_runs import QUIET, ROWS, timeless
from oracles.trees import same_bits

# ── data, epochs, dropout ──


def test_each_epoch_sees_every_row_once_in_another_order(model, tokenizer):
    _, history = train(model, tokenizer, ROWS, num_epochs=2, batch_size=1, packing=False, **QUIET)
    first, second = history.tokens[:10], history.tokens[10:]
    assert sorted(first) == sorted(second)
    assert first != second


def test_max_steps_overrides_num_epochs_which_may_be_a_fraction(model, tokenizer):
    count = lambda **given: len(
        train(model, tokenizer, ROWS, batch_size=4, packing=False, **given, **QUIET)[1].steps
    )
    assert count(num_epochs=1) == 3
    assert count(num_epochs=1.5) == 5
    assert count(num_epochs=9, max_steps=2) == 2


def test_rows_come_from_files_and_iterables_alike(model, tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    run = dict(max_steps=2, batch_size=2, **QUIET)
    results = [train(model, tokenizer, data, **run) for data in (path, str(path), iter(ROWS))]
    assert same_bits(results[0][0].adapter, results[1][0].adapter)
    assert same_bits(results[0][0].adapter, results[2][0].adapter)


def test_train_on_all_trains_prompts_too(model, tokenizer):
    tokens = [
        train(model, tokenizer, ROWS, max_steps=1, batch_size=99, train_on=on, **QUIET)[1].tokens[0]
        for on in ("responses", "all")
    ]
    assert 0 < tokens[0] < tokens[1]


def test_every_micro_batch_of_every_step_has_another_dropout_seed(base, tokenizer, monkeypatch):
    seeds, real = [], learner.loss_sum
    number = lambda seed: None if seed is None else int(seed)
    record = lambda *args, **kw: seeds.append(number(kw.get("seed"))) or real(*args, **kw)
    for module in (learner, step):  # training and evaluation
        monkeypatch.setattr(module, "loss_sum", record)
    run = dict(max_steps=3, batch_size=2, gradient_accumulation_steps=2, packing=False, **QUIET)
    dropping = fastlora.lora(base, r=2, lora_dropout=0.5, target_modules=["q_proj"])
    train(dropping, tokenizer, ROWS, eval_data=ROWS[:1], seed=5, **run)
    trained, evaluated = seeds[:-1], seeds[-1]
    assert evaluated is None
    # Rows 9 and 10 are the epoch's last step: one micro-batch.
    assert trained == [dropout_seed(5, s, i) for s, i in [(1, 0), (1, 1), (2, 0), (2, 1), (3, 0)]]
    assert len(set(trained)) == 5
    seeds.clear()
    train(fastlora.lora(base, r=2, target_modules=["q_proj"]), tokenizer, ROWS, **run)
    assert set(seeds) == {None}


def test_dropout_seeds_differ_in_each_of_their_three_numbers():
    grid = itertools.product((0, 1, 3407, 2**40), range(1, 8), range(4))
    seeds = [dropout_seed(*numbers) for numbers in grid]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


# ── evaluation, history, log, bar ──


def test_evaluation_is_the_mean_over_all_held_out_tokens(model, tokenizer):
    held_out = ROWS[:5]
    trained, history = train(
        model, tokenizer, ROWS[5:], eval_data=held_out, eval_every=2, max_steps=5, batch_size=2,
        packing=False, **QUIET,
    )  # fmt: skip
    assert history.eval_steps == (2, 4, 5)
    logp, tokens = 0.0, 0
    for example in encode_rows(held_out, tokenizer, max_seq_length=64):
        ids, labels = (torch.tensor(x).long()[None] for x in (example.input_ids, example.labels))
        logp += (
            token_logprobs(trained.adapter, trained.base, trained.spec, ids, labels).sum().item()
        )
        tokens += int((labels != -100).sum())
    assert history.eval_losses[-1] == pytest.approx(-logp / tokens, rel=1e-6)
    _, last_only = train(model, tokenizer, ROWS, eval_data=ROWS, max_steps=3, **QUIET)
    assert last_only.eval_steps == (3,)
    assert train(model, tokenizer, ROWS, max_steps=1, **QUIET)[1].eval_steps == ()


def test_evaluating_does_not_change_the_run(model, tokenizer):
    run = dict(max_steps=3, batch_size=2, **QUIET)
    plain, watched = (
        train(model, tokenizer, ROWS, **run, **more)
        for more in ({}, dict(eval_data=ROWS, eval_every=1))
    )
    assert same_bits(plain[0].adapter, watched[0].adapter)


def test_log_is_called_with_every_step_of_the_history(model, tokenizer):
    records: list[dict] = []
    _, history = train(
        model, tokenizer, ROWS, eval_data=ROWS, eval_every=2, max_steps=3, batch_size=2,
        log=records.append, **QUIET,
    )  # fmt: skip
    always = {"step", "loss", "learning_rate", "tokens", "seconds", "grad_norm"}
    always |= {
        "read_tokens",
        *(f"{kind}_norm/{group}" for kind in ("grad", "update") for group in "AB"),
    }
    assert [set(r) - {"eval_loss"} for r in records] == [always] * 3
    assert ["eval_loss" in r for r in records] == [False, True, True]
    assert History.of(records) == history
    assert history.steps == (1, 2, 3)
    assert all(s > 0 for s in history.seconds)
    with pytest.raises(dataclasses.FrozenInstanceError):
        history.steps = ()  # type: ignore[misc]


def test_log_cannot_change_the_history(model, tokenizer):
    _, history = train(model, tokenizer, ROWS, max_steps=2, log=dict.clear, **QUIET)
    assert len(history.losses) == 2


def test_without_progress_nothing_is_printed(model, tokenizer, capfd, tmp_path):
    run = dict(max_steps=2, eval_data=ROWS, save_every=1)
    train(model, tokenizer, ROWS, progress=False, output_dir=tmp_path / "quiet", **run)
    assert capfd.readouterr() == ("", "")
    train(model, tokenizer, ROWS, output_dir=tmp_path / "loud", **run)
    out, err = capfd.readouterr()
    assert out == ""
    assert all(word in err for word in ("2/2", "loss=", "tokens/s=", "eval="))


# ── nothing else changes ──


def test_the_same_arguments_give_the_same_bits(base, tokenizer):
    model = fastlora.lora(base, r=2, lora_dropout=0.3)
    run = dict(max_steps=4, batch_size=2, learning_rate=1e-2, progress=False)
    one, two, other = (train(model, tokenizer, ROWS, seed=s, **run) for s in (1, 1, 2))
    assert same_bits(one[0].adapter, two[0].adapter)
    assert timeless(one[1]) == timeless(two[1])
    assert not same_bits(one[0].adapter, other[0].adapter)


def test_model_data_and_global_state_are_unchanged(model, tokenizer):
    model = model.for_training()
    leaves = tree_leaves((model.adapter, model.base))
    before = [(x, x.clone(), x.requires_grad, x._version) for x in leaves]
    rows, state = copy.deepcopy(ROWS), global_state()
    trained, _ = train(model, tokenizer, rows, eval_data=rows, max_steps=2, **QUIET)
    assert global_state() == state
    assert rows == ROWS
    for now, (x, value, requires_grad, version) in zip(leaves, before, strict=True):
        assert now is x and torch.equal(x, value) and x.grad is None
        assert (x.requires_grad, x._version) == (requires_grad, version)
    new = tree_leaves(trained.adapter)
    assert not any(x.requires_grad or x.grad is not None for x in new)
    assert not {x.data_ptr() for x in new} & {x.data_ptr() for x in leaves}
    assert trained.base is model.base and trained.spec == model.spec


def global_state() -> tuple:
    """Without Python's own random: beartype draws from it wherever these tests check a type."""
    return (
        torch.get_default_dtype(),
        torch.get_rng_state().tolist(),
        torch.is_grad_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_num_threads(),
        str(np.random.get_state()),
        dict(os.environ),
    )


@pytest.mark.parametrize("adapter_dtype", ["float32", "bfloat16"])
def test_a_bfloat16_base_trains_with_either_adapter(folder, tokenizer, adapter_dtype):
    base, _ = fastlora.load(folder, dtype="bfloat16", max_seq_length=64, device="cpu")
    model = fastlora.lora(base, r=4, adapter_dtype=adapter_dtype)
    trained, history = train(
        model, tokenizer, ROWS[:2], max_steps=15, learning_rate=2e-2,
        gradient_accumulation_steps=2, batch_size=1, packing=False, **QUIET,
    )  # fmt: skip
    assert history.losses[-1] < history.losses[0] - 2
    assert {str(x.dtype) for x in tree_leaves(trained.adapter)} == {f"torch.{adapter_dtype}"}
