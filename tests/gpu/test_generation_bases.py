"""Generation on the GPU over quantised bases, with a stack of adapters, and with alternatives."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from fastlora.generation import engine
from fastlora.generation.engine import Engine, RowSettings
from fastlora.generation.sampling import Sampling
from fastlora.model import Model
from oracles.gpu_models import Row, adapted, tokens

pytestmark = [pytest.mark.gpu]
NEW = 40
BASES = {
    "nf4": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "fp4": dict(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "int8": dict(load_in_8bit=True),
}


def greedy(model: Model, ids: torch.Tensor, **more: Any) -> torch.Tensor:
    return model.generate(ids, max_new_tokens=NEW, eos_token_id=(), **more)[:, ids.shape[1] :]


def differing(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a != b).sum())


def over_quantised(folder: Path, kind: str, written: Path) -> Iterator[Row]:
    """Ids in fp32 over a base that transformers quantised and wrote."""
    how: Any = BitsAndBytesConfig(**BASES[kind])
    theirs: Any = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=how, device_map={"": 0}, dtype=torch.float32
    )
    theirs.save_pretrained(written)
    del theirs
    model = adapted(written, "float32")
    for b in (1, 3):
        ids = tokens(model, b, 100)
        found, plain = greedy(model, ids), greedy(model.with_spec(kernels="torch"), ids)
        yield f"{kind}, {b} rows, kernels against plain torch", differing(found, plain), 0
        alone = torch.cat([greedy(model, row[None]) for row in ids])
        yield f"{kind}, {b} rows, batch against single", differing(found, alone), 0


def with_a_stack(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Row]:
    """Each row of a batch with its own adapter of a stack, against the adapter alone."""
    model = adapted(folder, "float32")
    scaled = [tree_map(lambda x, s=s: s * x, model.adapter) for s in (1.0, 0.5, -0.7)]
    stack = dataclasses.replace(model, adapter=tree_map(lambda *x: torch.stack(x), *scaled))
    ids, which = tokens(model, 4, 100), [2, 0, 1, 2]
    together = greedy(stack, ids, adapter_ids=which)
    alone = [
        greedy(model.with_adapter(scaled[n]), row[None]) for n, row in zip(which, ids, strict=True)
    ]
    yield "a stack of adapters against each alone", differing(together, torch.cat(alone)), 0
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_can_record", lambda model: False)
        eager = greedy(stack, ids, adapter_ids=which)
    yield "a stack of adapters, graph against eager", differing(together, eager), 0


def alternatives(folder: Path) -> Iterator[Row]:
    """The likeliest tokens of each step, from replayed graphs, against an uncached pass."""
    model = adapted(folder, "float32")
    prompts, one = tokens(model, 2, 100).tolist(), Engine(model, slots=2, max_length=200)
    settings = RowSettings(max_new_tokens=NEW, sampling=Sampling(), seed=0, stop=(), alternatives=5)
    slots = one.admit([(prompt, settings) for prompt in prompts])
    ids: dict[int, list[int]] = {slot: [] for slot in slots}
    found: dict[int, list[Any]] = {slot: [] for slot in slots}
    while one.running:
        for new in one.advance():
            ids[new.slot] += new.ids
            found[new.slot] += new.alternatives or []
    one.close()
    worst, wrong = 0.0, 0
    for slot, prompt in zip(slots, prompts, strict=True):
        row = torch.tensor([[*prompt, *ids[slot]]], device="cuda")
        logprobs = model(row[:, :-1])[0, len(prompt) - 1 :].double().log_softmax(-1)
        for entries, expected in zip(found[slot], logprobs, strict=True):
            names = [i for i, _ in entries]
            values = torch.tensor([x for _, x in entries], device="cuda", dtype=torch.float64)
            wrong += names != expected.topk(5).indices.tolist()
            scale = max(1.0, float(expected.abs().max()))
            worst = max(worst, float((expected[names] - values).abs().max()) / scale)
    yield "steps whose five likeliest tokens differ from an uncached pass", float(wrong), 0
    yield "their log-probabilities, largest difference over the largest value", worst, 1e-5


@pytest.mark.part("4bit-llama3.2")
@pytest.mark.parametrize("kind", BASES)
def test_quantised_bases_give_the_tokens_of_plain_torch(kind, checkpoint, check, tmp_path):
    folder, _ = checkpoint("llama3.2")
    check(over_quantised(folder, kind, tmp_path / "llama3.2"))


@pytest.mark.part("llama3.2")
def test_rows_of_a_stack_give_the_tokens_of_their_adapters(checkpoint, check, monkeypatch):
    folder, _ = checkpoint("llama3.2")
    check(with_a_stack(folder, monkeypatch))


@pytest.mark.part("llama3.2")
def test_the_likeliest_tokens_are_those_of_an_uncached_pass(checkpoint, check):
    folder, _ = checkpoint("llama3.2")
    check(alternatives(folder))
