"""Which runs are replayed from a CUDA graph, and that a replayed run has the same bits."""

import dataclasses
from typing import Any

import pytest

import fastlora
from fastlora.models.names import linear_names, projection_shape
from fastlora.training import learner
from fastlora.training.learner import should_use_cuda_graph
from fastlora.training.loop import train
from oracles.pairs import adapted
from oracles.training_runs import QUIET, ROWS, settings, timeless
from oracles.trees import same_bits


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_replayed_run_has_the_same_bits(dropout, folder, tokenizer, captures, monkeypatch):
    """Micro-batches of one shape share one recording; tokens, seeds and counts may differ."""
    base, _ = fastlora.load(folder, max_seq_length=32, device="cpu")
    model = adapted(base, r=2, lora_dropout=dropout)
    given = dict(packing=True, batch_size=1, gradient_accumulation_steps=2, max_steps=5, **QUIET)
    plain = train(model, tokenizer, ROWS, **given)
    assert not captures
    monkeypatch.setattr(learner, "should_use_cuda_graph", lambda *_: True)
    replayed = train(model, tokenizer, ROWS, **given)
    assert len(captures) == 1
    assert same_bits(plain[0].adapter, replayed[0].adapter)
    assert timeless(plain[1]) == timeless(replayed[1])


def test_only_small_micro_batches_of_one_shape_on_cuda_are_recorded(model):
    assert should_use_cuda_graph(model.spec, "cuda", settings())
    assert not should_use_cuda_graph(model.spec, "cpu", settings())
    assert not should_use_cuda_graph(model.spec, "cuda", settings(packing=False))
    assert not should_use_cuda_graph(model.spec, "cuda", settings(batch_size=2**24))


def test_stacks_with_offload_are_not_recorded_but_single_models_are(model):
    offload = dataclasses.replace(model.spec, recompute="offload")
    assert should_use_cuda_graph(offload, "cuda", settings(), model.base)
    assert not should_use_cuda_graph(offload, "cuda", settings())


@pytest.mark.parametrize("precision", [dict(load_in_4bit=True), dict(base_precision="fp8")])
def test_micro_batches_over_a_4_or_8_bit_base_may_be_four_times_as_large(precision, folder):
    """Unpacking its matrices, or rounding for them, takes launches for which the GPU would wait."""
    how: dict[str, Any] = dict(max_seq_length=32, device="cpu")
    dense, packed = (fastlora.load(folder, **how, **given)[0] for given in ({}, precision))
    names = linear_names(dense.spec.config)
    shapes = [projection_shape(dense.spec.config, name) for name in names]
    largest = int(2.5e11) // (32 * sum(rows * columns for rows, columns in shapes))
    for times, models in ((0.9, {dense, packed}), (1.1, {packed}), (3.9, {packed}), (4.1, set())):
        given = settings(batch_size=int(times * largest))
        recorded = {
            m for m in (dense, packed) if should_use_cuda_graph(m.spec, "cuda", given, m.base)
        }
        assert recorded == models


def test_models_that_wait_for_the_gpu_are_not_recorded(base, pair):
    for given in (dict(trainable_token_indices=[5]), dict(qat_scheme="int8")):
        waiting = fastlora.lora(base, r=2, **given)
        assert not should_use_cuda_graph(waiting.spec, "cuda", settings())
    mixture = adapted(pair("qwen3_moe").model, r=2)
    assert not should_use_cuda_graph(mixture.spec, "cuda", settings())
