"""Which runs are replayed from a CUDA graph, and that a replayed run has the same bits."""

import dataclasses

import pytest

import fastlora
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
    assert should_use_cuda_graph(offload, "cuda", settings())
    assert should_use_cuda_graph(model.spec, "cuda", settings(), stacked=True)
    assert not should_use_cuda_graph(offload, "cuda", settings(), stacked=True)


@pytest.mark.parametrize(
    ("size", "rows", "recorded"),
    [("1B", 4, True), ("1B", 8, False), ("8B", 2, True), ("8B", 3, False)],
)
def test_micro_batches_are_recorded_if_the_host_may_be_too_slow(model, size, rows, recorded):
    """Rows of 2,048 tokens. For four rows a layer of 1B takes 5.5 ms and a layer of 8B 15 ms."""
    d, f, head_dim = (2048, 8192, 64) if size == "1B" else (4096, 14336, 128)
    sizes = dict(hidden_size=d, intermediate_size=f, head_dim=head_dim)
    sizes |= dict(num_attention_heads=32, num_key_value_heads=8)
    config = dataclasses.replace(model.spec.config, **sizes)
    spec = dataclasses.replace(model.spec, config=config, max_seq_length=2048)
    assert should_use_cuda_graph(spec, "cuda", settings(batch_size=rows)) == recorded


def test_models_that_wait_for_the_gpu_are_not_recorded(base, pair):
    for given in (dict(trainable_token_indices=[5]), dict(qat_scheme="int8")):
        waiting = fastlora.lora(base, r=2, **given)
        assert not should_use_cuda_graph(waiting.spec, "cuda", settings())
    mixture = adapted(pair("qwen3_moe").model, r=2)
    assert not should_use_cuda_graph(mixture.spec, "cuda", settings())
