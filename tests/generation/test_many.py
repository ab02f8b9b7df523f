"""generate_many: every result equals generate's, in any batch; wrong values; freed memory."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map

import fastlora
from fastlora.generation import batch_size, many
from fastlora.generation.engine import Engine
from fastlora.generation.many import generate_many
from fastlora.model import Model
from fastlora.runtime import host_memory
from oracles.pairs import adapted
from oracles.transformers_side import prompt
from oracles.trees import randomised

PROMPTS = [prompt(1, t, seed=t)[0].tolist() for t in (9, 1, 4, 4, 12)]
HOW: dict[str, Any] = dict(max_new_tokens=20, temperature=1.5, top_k=30)


@pytest.fixture
def model(pair) -> Model:
    return adapted(pair("qwen2").model, r=4)


@pytest.fixture
def engines(monkeypatch) -> list[Engine]:
    """The engines that are made; each can be looked at after it is closed."""
    made: list[Engine] = []

    class Kept(Engine):
        def __init__(self, *args: Any, **how: Any) -> None:
            super().__init__(*args, **how)
            made.append(self)

    monkeypatch.setattr(many, "Engine", Kept)
    return made


def closed(engine: Engine) -> bool:
    return not hasattr(engine, "cache")


@pytest.mark.parametrize("max_batch", [1, 2, 5, "auto"])
def test_results_equal_generate_on_each_prompt(max_batch, model):
    seeds, stop = [3, 4, 5, 6, 7], (11, 12, 13, 14, 40, 41, 42)
    results = generate_many(
        model,
        PROMPTS,
        max_batch=max_batch,
        seed=seeds,
        eos_token_id=stop,
        return_logprobs=True,
        **HOW,
    )
    found = {x.index: x for x in results}
    assert sorted(found) == [0, 1, 2, 3, 4]
    reasons = set()
    for i, (ids, seed) in enumerate(zip(PROMPTS, seeds, strict=True)):
        out, logprobs = model.generate(
            torch.tensor([ids]), seed=[seed], eos_token_id=stop, return_logprobs=True, **HOW
        )
        new, result = out[0, len(ids) :].tolist(), found[i]
        assert result.ids == new and result.sample == 0 and result.text is None
        torch.testing.assert_close(torch.tensor(result.logprobs), logprobs[0], rtol=1e-4, atol=1e-4)
        assert result.finish_reason == ("stop" if new[-1] in stop else "length")
        reasons.add(result.finish_reason)
    assert reasons == {"stop", "length"}


def test_samples_do_not_depend_on_the_size_of_the_batch(model):
    how = dict(n=3, seed=7, eos_token_id=(), **HOW)
    runs = [
        {(x.index, x.sample): x.ids for x in generate_many(model, PROMPTS, max_batch=b, **how)}
        for b in (2, 15)
    ]
    assert runs[0] == runs[1] and len(runs[0]) == 15
    assert len({tuple(ids) for ids in runs[0].values()}) == 15
    alone = {x.index: x.ids for x in generate_many(model, PROMPTS[:1], seed=7, **HOW)}
    ids = torch.tensor(PROMPTS[:1])
    assert alone[0] == model.generate(ids, seed=7, **HOW)[0, ids.shape[1] :].tolist()


def test_results_come_in_the_order_in_which_they_end(model, engines):
    """Short rows before long ones, and the batch stays full."""
    free = {
        x.index: x.ids for x in generate_many(model, PROMPTS, eos_token_id=(), max_new_tokens=60)
    }
    stop = free[3][2]
    results = [*generate_many(model, PROMPTS, eos_token_id=stop, max_new_tokens=60, max_batch=5)]
    lengths = [len(x.ids) for x in results]
    assert [-(-n // 16) for n in lengths] == sorted(-(-n // 16) for n in lengths)
    assert len(set(lengths)) > 1 and all(map(closed, engines))


def test_each_prompt_uses_its_own_adapter(model):
    trees = [randomised(model.adapter, seed) for seed in range(2)]
    stack = Model(
        spec=model.spec,
        base=model.base,
        adapter=tree_map(lambda *leaves: torch.stack(leaves), *trees),
    )
    how: dict[str, Any] = dict(max_new_tokens=8, eos_token_id=())
    same = [PROMPTS[0]] * 3
    results = generate_many(stack, same, adapter_ids=[1, 0, 1], max_batch=2, **how)
    found = {x.index: x.ids for x in results}
    for i, number in enumerate([1, 0, 1]):
        alone = model.with_adapter(trees[number]).generate(torch.tensor(same[:1]), **how)
        assert found[i] == alone[0, 9:].tolist()
    assert found[0] != found[1]


def test_texts_and_chats_are_encoded_and_decoded():
    model, tokenizer = fastlora.load("demo", device="cpu", dtype="float32")
    chat = [{"role": "user", "content": "# sort\ndef sort("}]
    how: dict[str, Any] = dict(max_new_tokens=8)
    found = {x.index: x for x in generate_many(model, ["def f(", chat], tokenizer=tokenizer, **how)}
    assert found[0].text == model.generate_text(tokenizer, "def f(", **how)
    assert found[1].text == model.generate_text(tokenizer, chat, **how)


# ── interrupted iterators ─────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("how", ["close", "collected", "an error of the caller's", "exhausted"])
def test_an_interrupted_iterator_frees_its_memory(how, model, engines):
    results = generate_many(model, PROMPTS, max_batch=2, max_new_tokens=4, eos_token_id=())
    assert not engines  # nothing is allocated before the first result is asked for
    next(results)
    (engine,) = engines
    held = weakref.ref(engine.cache.k[0])
    if how == "close":
        results.close()
    elif how == "collected":
        del results
    elif how == "exhausted":
        assert len([*results]) == 4
    else:
        with pytest.raises(KeyError):
            for _ in results:
                raise KeyError
        del results
    gc.collect()
    assert closed(engine) and held() is None


def test_a_prompt_with_nan_logits_is_named_and_the_memory_is_freed(model, engines):
    tree = tree_map(torch.clone, model.adapter)
    tree["layers"][0]["down_proj"].a.view(-1)[0] = torch.nan
    results = generate_many(model.with_adapter(tree), PROMPTS[:2], max_batch=1, max_new_tokens=4)
    with pytest.raises(FloatingPointError, match=r"prompts\[0\].*adapter's tensor .*down_proj"):
        next(results)
    assert closed(engines[0])


# ── wrong values ──────────────────────────────────────────────────────────────────────────

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a text": ({"prompts": "text"}, "prompts='text': expected a list of prompts"),
    "a number": ({"prompts": [[1], 5]}, "prompts"),
    "an empty prompt": ({"prompts": [[1], []]}, r"prompts\[1\]: expected at least one token"),
    "no such id": ({"prompts": [[1, 96]]}, r"prompts\[0\] holds \[96\]; .*\[0, 96\)"),
    "too long": (
        {"max_new_tokens": 120},
        r"prompts\[0\]: 9 .* max_new_tokens=120 .* 129; .* is 128",
    ),
    "no tokenizer": ({"prompts": ["text"]}, "tokenizer=None: the texts and chats in prompts need"),
    "max_batch": ({"max_batch": 0}, 'max_batch=0: expected "auto" or'),
    "n": ({"n": 0}, "n=0: expected"),
    "temperature": ({"temperature": -1.0}, "temperature=-1.0"),
    "min_p": ({"min_p": 1.5}, "min_p=1.5: expected"),
    "seeds": ({"seed": [1, 2]}, r"seed=\[1, 2\]: .* a list of 5"),
    "no stack": ({"adapter_ids": [0] * 5}, "not a stack"),
    "eos_token_id": ({"eos_token_id": 96}, "eos_token_id=96"),
    "several": ({"n": 0, "top_p": 0.0}, r"n=0(.|\n)*top_p=0.0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_value_is_refused_at_the_call(case, model, engines):
    changed, message = WRONG[case]
    # In a run with the import hook, jaxtyping refuses values of a wrong type with its own error.
    with pytest.raises((ValueError, TypeError), match=message):
        generate_many(model, **{"prompts": PROMPTS, "max_new_tokens": 4} | changed)
    assert not engines


@pytest.mark.parametrize(
    ("meminfo", "rows"),
    [
        ("MemFree: 1 kB\nMemAvailable: 100000 kB\n", 16),
        ("MemFree: 900 kB\nMemAvailable: 100 kB\n", 2),
        ("MemAvailable: 0 kB\n", 1),
        ("MemFree: 1 kB\n", 16),
        (None, 16),
    ],
)
def test_automatic_batches_fill_the_memory_that_the_system_can_give(
    meminfo, rows, model, tmp_path, monkeypatch
):
    """A row of 32 tokens takes 32 KiB or so; without the figure, half of all memory counts."""
    path = tmp_path / "meminfo"
    if meminfo is not None:
        path.write_text(meminfo)
    monkeypatch.setattr(host_memory, "_MEMINFO", path)
    assert batch_size.largest_batch(model, 100) == rows


def test_no_prompts_give_no_results(model):
    assert [*generate_many(model, [])] == []
