"""A run over the demo on the GPU, with dropout."""

import math
import tempfile
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

import fastlora
from fastlora.checkpoints.hub import DEMO
from fastlora.data.rows import read_rows
from fastlora.runtime.cuda_graph import CUDAGraphed
from fastlora.training.many import stack as stacks
from oracles.checkpoints import make_checkpoint
from oracles.gpu_models import SIZES, Row, relative

pytestmark = [pytest.mark.gpu, pytest.mark.part("training")]


def training() -> Iterator[Row]:
    """The demo, trained on the GPU with dropout, whole and resumed in the middle."""
    model, tokenizer = fastlora.load("demo", max_seq_length=256, device="cuda")
    model = fastlora.lora(model, r=8, lora_dropout=0.1)
    rows = read_rows(DEMO / "train.jsonl")[:400]
    with tempfile.TemporaryDirectory() as name:
        train = partial(
            fastlora.train, model, tokenizer, rows, max_steps=12, batch_size=4, progress=False
        )
        whole, history = train(output_dir=name, save_every=6, learning_rate=2e-3)
        resumed, _ = train(resume=f"{name}/checkpoint-6", learning_rate=2e-3)
    yield "training: last loss over the first", history.losses[-1] / history.losses[0], 0.95
    # Fused attention may add in another order every run; the update is some 2 % of the adapter.
    yield "training: resumed against whole", relative(resumed.adapter, whole.adapter), 1e-2


def several_runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Row]:
    """Three runs in one pass: gradient and update replayed from CUDA graphs, and without graphs."""
    model, tokenizer = fastlora.load("demo", max_seq_length=128, device="cuda")
    runs = [fastlora.lora(model, r=4 * i, random_state=i) for i in (1, 2, 3)]
    rows, rates = read_rows(DEMO / "train.jsonl")[:200], [2e-3, 1e-3, 5e-4]
    given: dict[str, Any] = dict(max_steps=8, batch_size=1, packing=True, progress=False)
    given["learning_rate"] = rates
    recordings, real = [], CUDAGraphed._record
    note = lambda *args: recordings.append(1) or real(*args)
    monkeypatch.setattr(CUDAGraphed, "_record", note)
    recorded, histories = fastlora.train(runs, tokenizer, rows, **given)
    yield "several runs: recordings of gradient and update", abs(len(recordings) - 2), 0
    monkeypatch.setattr(stacks, "should_use_cuda_graph", lambda *given, **how: False)
    queued, others = fastlora.train(runs, tokenizer, rows, **given)
    for i, (ours, theirs) in enumerate(zip(recorded, queued, strict=True)):
        # A rate is a float32 tensor in a graph and a Python number otherwise.
        yield f"run {i}, graphs against none: adapter", relative(ours.adapter, theirs.adapter), 1e-2
        first, second = torch.tensor([histories[i].losses, others[i].losses])
        yield f"run {i}, graphs against none: losses", float((first / second - 1).abs().max()), 1e-2
        yield f"run {i}: last loss over the first", float(first[-1] / first[0]), 0.99


def test_several_runs_are_the_same_from_graphs(check, monkeypatch):
    check(several_runs(monkeypatch))


def test_training_lowers_the_loss_and_resumes(check):
    check(training())


def test_packing_to_131072_tokens_needs_no_mask(tmp_path):
    """A mask would take 16 GiB. The kernels of attention read spans in its place."""
    _, tokenizer = fastlora.load("demo")
    config = SIZES | {"vocab_size": 4096, "max_position_embeddings": 131_072}
    make_checkpoint("llama3.2", tmp_path, torch.bfloat16, config=config)  # heads of 64
    model, _ = fastlora.load(tmp_path, device="cuda")
    rows = read_rows(DEMO / "train.jsonl")[:40]
    train = partial(fastlora.train, max_steps=2, batch_size=1, packing=True, progress=False)
    trained, history = train(fastlora.lora(model, r=2), tokenizer, rows)
    assert trained.spec.max_seq_length == 131_072
    assert len(history.losses) == 2 and all(map(math.isfinite, history.losses))
