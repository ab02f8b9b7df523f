"""NEFTune: the noise, its size, and where there is none."""

import dataclasses
from dataclasses import replace

import pytest
import torch
from torch.utils._pytree import tree_map

import fastlora
from fastlora import functional as FL
from fastlora.models import decoder
from fastlora.models.neftune import with_noise
from fastlora.training.loop import train
from oracles.training_runs import QUIET, ROWS, Killed, long_run, stop_at, timeless
from oracles.trees import same_bits, token_ids


def noise(lengths: torch.Tensor, shape=(2, 50, 64), seed: int = 3) -> torch.Tensor:
    return with_noise(torch.zeros(shape), 5.0, torch.tensor(seed), lengths)


def test_the_noise_is_uniform_and_as_large_as_in_the_paper():
    x = noise(torch.tensor([[50], [50]]), (2, 50, 640))
    bound = 5.0 / (50 * 640) ** 0.5
    assert x.abs().max() <= bound and x.abs().max() > 0.999 * bound
    assert x.mean().abs() < 0.01 * bound
    assert x.square().mean().item() == pytest.approx(bound**2 / 3, rel=0.02)  # of uniform(-b, b)
    columns = (x[0].T @ x[0] / 50).fill_diagonal_(0).abs().mean()
    assert columns < bound**2 / 3 * 0.2, "columns are independent"


def test_the_noise_depends_on_seed_and_length():
    long, short = torch.tensor([[50], [50]]), torch.tensor([[50], [2]])
    assert torch.equal(noise(long), noise(long))
    assert not torch.equal(noise(long), noise(long, seed=4))
    torch.testing.assert_close(noise(short)[1], 5 * noise(long)[1])


def test_only_calls_with_a_seed_have_noise(model):
    noisy = dataclasses.replace(model.spec, neftune_alpha=5.0)
    ids = token_ids(2, 9)
    call = lambda spec, seed: FL.forward(model.adapter, model.base, spec, ids, seed=seed)
    plain = call(model.spec, None)
    assert torch.equal(call(model.spec, 1), plain)
    assert torch.equal(call(noisy, None), plain)
    assert not torch.equal(call(noisy, 1), plain)
    assert torch.equal(call(noisy, 1), call(noisy, torch.tensor(1)))


def test_granites_multiplier_scales_the_noise_as_in_transformers(pair):
    """There NEFTune is a hook on embed_tokens, whose result the model multiplies."""
    model, ids = pair("granite").model, token_ids(2, 9, vocab_size=96)
    noisy = dataclasses.replace(model.spec, neftune_alpha=5.0)
    _, found = FL.forward(None, model.base, noisy, ids, seed=1, capture=["embed"])
    key, lengths = torch.tensor(1), torch.full((2, 1), 9)
    rows = torch.nn.functional.embedding(ids, model.base["embed_tokens"])
    expected = 3.3 * with_noise(rows, 5.0, key, lengths)
    torch.testing.assert_close(found["embed"], expected)


def test_padding_and_packing_do_not_change_the_size(model, monkeypatch):
    seen = []
    monkeypatch.setattr(decoder, "with_noise", lambda x, *rest: seen.append(rest[2]) or x)
    noisy = dataclasses.replace(model.spec, neftune_alpha=5.0)
    call = lambda **given: FL.forward(
        model.adapter, model.base, noisy, token_ids(1, 6), seed=1, **given
    )
    call()
    call(attention_mask=torch.tensor([[0, 0, 1, 1, 1, 1]]))
    call(segment_ids=torch.tensor([[1, 1, 2, 2, 2, 2]]))
    shown = [lengths.expand(1, 6).tolist() for lengths in seen]
    assert shown == [[[6] * 6], [[4] * 6], [[2, 2, 4, 4, 4, 4]]]


def test_training_has_noise_and_the_trained_model_none(model, tokenizer):
    run = dict(max_steps=2, batch_size=4, **QUIET)
    plain, history = train(model, tokenizer, ROWS, **run)
    noisy, other = train(model, tokenizer, ROWS, neftune_alpha=5.0, eval_data=ROWS, **run)
    assert not same_bits(plain.adapter, noisy.adapter)
    assert other.losses != history.losses
    assert noisy.spec == model.spec
    _, evaluated = train(model, tokenizer, ROWS, eval_data=ROWS, learning_rate=1e-30, **run)
    _, quiet = train(
        model, tokenizer, ROWS, eval_data=ROWS, learning_rate=1e-30, neftune_alpha=5.0, **run
    )
    assert quiet.eval_losses == pytest.approx(evaluated.eval_losses, rel=1e-6)


def test_noise_that_overflows_is_traced_to_its_sequence(model, tokenizer):
    half = replace(model, base=tree_map(torch.Tensor.half, model.base))
    with pytest.raises(FloatingPointError, match=r"overflows float16 .* micro-batch 1"):
        train(half, tokenizer, ROWS, max_steps=1, batch_size=2, neftune_alpha=1e8, **QUIET)


def test_a_noisy_run_resumes_with_the_same_bits(base, tokenizer, tmp_path):
    model, given = fastlora.lora(base, r=2), dict(neftune_alpha=5.0)
    whole, history = long_run(model, tokenizer, tmp_path / "whole", **given)
    with pytest.raises(Killed):
        long_run(model, tokenizer, tmp_path / "cut", log=stop_at(3), **given)
    resumed, again = long_run(model, tokenizer, tmp_path / "cut", resume=True, **given)
    assert same_bits(resumed.adapter, whole.adapter) and timeless(again) == timeless(history)
    with pytest.raises(ValueError, match=r"neftune_alpha: 5.0 there, None now"):
        long_run(model, tokenizer, tmp_path / "cut", resume=True)
