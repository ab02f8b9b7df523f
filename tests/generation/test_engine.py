"""Engine: rows join and leave at any time and get what they get alone; slots come back."""

import gc
import math
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map

from fastlora.generation import cache, engine, kernel_layer, prefixes
from fastlora.generation.engine import Engine, NewTokens, NonFiniteLogits, RowSettings
from fastlora.generation.kernel_layer import StepKernels, step_kernels
from fastlora.generation.sampling import Sampling
from fastlora.model import Model
from oracles.pairs import adapted
from oracles.transformers_side import prompt

DRAWS = Sampling(temperature=1.5, top_k=20, top_p=0.9)
PENALTY = Sampling(repetition_penalty=1.4)


def settings(n: int, sampling: Sampling = DRAWS, seed: int = 0, **more: Any) -> RowSettings:
    return RowSettings(max_new_tokens=n, sampling=sampling, seed=seed, stop=(), **more)


def to_end(one: Engine, tokens: dict[int, list[int]] | None = None, steps: int = 16) -> dict:
    """Slot -> the ids of its row, after all rows have ended."""
    tokens = {} if tokens is None else tokens
    while one.running:
        for new in one.advance(steps):
            tokens.setdefault(new.slot, []).extend(new.ids)
    return tokens


def alone(model: Model, ids: list[int], how: RowSettings) -> list[int]:
    one = Engine(model, slots=1, max_length=len(ids) + how.max_new_tokens)
    one.admit([(ids, how)])
    return to_end(one)[0]


@pytest.fixture
def model(pair) -> Model:
    return adapted(pair("qwen2_window").model, r=4)


@pytest.mark.parametrize("steps", [1, 3, 16])
def test_rows_that_join_later_get_what_they_get_alone(model, steps, monkeypatch):
    """Slots are used again, and the cache grows from 4 tokens while rows run."""
    monkeypatch.setattr(cache, "_FIRST_LENGTH", 4)
    prompts = [prompt(1, t, seed=t)[0].tolist() for t in (1, 3, 9, 2, 30)]
    hows = [
        settings(20),
        settings(5, PENALTY),
        settings(11, Sampling()),
        settings(8, Sampling(temperature=1.0, min_p=0.1), 4),
        settings(12, PENALTY),
    ]
    one, got = Engine(model, slots=2, max_length=60), {}
    waiting, open_rows = [*range(5)], {}
    while waiting or one.running:
        new = [waiting.pop(0) for _ in range(min(one.free_slots, len(waiting)))]
        if new:
            slots = one.admit([(prompts[i], hows[i]) for i in new])
            open_rows |= dict(zip(slots, new, strict=True))
        for x in one.advance(steps):
            got.setdefault(open_rows[x.slot], []).extend(x.ids)
            assert (x.finish_reason is None) == (x.slot in one.running)
    assert one.free_slots == 2
    assert got == {i: alone(model, prompts[i], hows[i]) for i in range(5)}


def test_rows_with_one_prompt_read_it_once(model, monkeypatch):
    """At once, later while its slot runs, and later in the slot itself."""
    ids, rows = prompt(1, 9)[0].tolist(), []
    real = prefixes.prefill
    monkeypatch.setattr(
        prefixes, "prefill", lambda *args: (rows.append(args[3].tolist()), real(*args))[1]
    )
    one = Engine(model, slots=3, max_length=40)
    hows = [settings(6, seed=i) for i in range(6)]
    slots = one.admit([(ids, hows[0]), (ids, hows[1])])
    first = dict(zip(slots, hows[:2], strict=True))
    got = {slot: [] for slot in slots}
    for new in one.advance(2):
        got[new.slot] += new.ids
    (third,) = one.admit([(ids, hows[2])])
    to_end(one, got)
    expected = {slot: alone(model, ids, how) for slot, how in (first | {third: hows[2]}).items()}
    assert got == expected
    count = len(rows)
    again = one.admit([(ids, how) for how in hows[3:]])
    assert len(rows) == count
    assert to_end(one) == {s: alone(model, ids, h) for s, h in zip(again, hows[3:], strict=True)}
    assert rows[0] == [ids[:-1]]


def test_a_released_slot_is_free_and_the_others_go_on(model):
    one, ids = Engine(model, slots=2, max_length=40), prompt(2, 5).tolist()
    a, b = one.admit([(ids[0], settings(12)), (ids[1], settings(12))])
    got = {new.slot: new.ids for new in one.advance(3)}
    one.release(a)
    assert one.free_slots == 1
    with pytest.raises(ValueError, match="slot=0: no row is running"):
        one.release(a)
    rest = to_end(one, {b: got[b]})
    assert rest == {b: alone(model, ids[1], settings(12))}


def test_stop_ids_end_a_row_and_more_of_them_are_given_room(model):
    ids = prompt(1, 5)[0].tolist()
    free = alone(model, ids, settings(12))
    stop = free[6]
    end = free.index(stop) + 1
    many = tuple(i for i in range(96) if i not in free[:end])[:40]
    one = Engine(model, slots=1, max_length=40)
    how = RowSettings(max_new_tokens=12, sampling=DRAWS, seed=0, stop=(*many, stop))
    one.admit([(ids, how)])
    (new,) = one.advance(16)
    assert new == NewTokens(slot=0, ids=free[:end], logprobs=None, finish_reason="stop")


REFUSED: dict[str, tuple[list, str]] = {
    "no rows": ([], "prompts is empty"),
    "too many": ([([1], settings(1))] * 3, "3 prompts, but only 2"),
    "too long": ([([1] * 9, settings(2))], "9 prompt tokens and 2 new ones make 11.* is 10"),
    "empty": ([([], settings(2))], "row 0: expected a prompt token"),
    "no such adapter": ([([1], settings(2, adapter_id=1))], r"adapter_id=1.*\[0, 1\)"),
    "alternatives": ([([1], settings(2, alternatives=21))], r"alternatives=21.*\[0, 20\]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_rows_are_refused_before_any_slot_is_taken(case, model):
    rows, message = REFUSED[case]
    one = Engine(model, slots=2, max_length=10)
    with pytest.raises(ValueError, match=message):
        one.admit(rows)
    assert one.free_slots == 2


@pytest.mark.parametrize("ends", ["ended", "released"])
def test_a_row_that_left_at_the_caches_end_does_not_disturb_the_others(ends, model, monkeypatch):
    """Its slot goes through the model in each later step, and writes behind its 8 tokens."""
    monkeypatch.setattr(cache, "_FIRST_LENGTH", 8)
    ids, how = prompt(2, 3).tolist(), settings(20)
    one = Engine(model, slots=2, max_length=40)
    one.admit([(ids[0], settings(6) if ends == "ended" else how), (ids[1][:2], how)])
    got = {new.slot: new.ids for new in one.advance(6)}
    if ends == "released":
        one.release(0)
    assert to_end(one, {1: got[1]}, steps=1) == {1: alone(model, ids[1][:2], how)}


@pytest.mark.parametrize("other", [0.0, 1.5])
def test_a_larger_top_k_of_a_greedy_or_ended_row_does_not_disturb_the_others(other, model):
    ids = prompt(2, 4).tolist()
    hows = [
        settings(3 if other else 12, Sampling(temperature=other, top_k=60)),
        settings(12, Sampling(temperature=1.5, top_k=3)),
    ]
    one = Engine(model, slots=2, max_length=20)
    one.admit([*zip(ids, hows, strict=True)])
    assert to_end(one, steps=3) == {i: alone(model, ids[i], hows[i]) for i in range(2)}


@pytest.fixture
def broken(pair) -> tuple[Model, Model]:
    """(a model, a stack of its adapter and one that gives NaN)."""
    tree = adapted(pair("llama2").model, r=2)
    stack = tree_map(lambda x: torch.stack([x, x]), tree.adapter)
    stack["layers"][0]["v_proj"].a[1] = math.nan
    return tree, Model(spec=tree.spec, base=tree.base, adapter=stack)


def test_each_row_with_nan_is_an_error_and_its_neighbours_go_on(broken):
    """Then the slots whose rows had NaN are used again, by rows that are shorter than a third."""
    tree, stack = broken
    one = Engine(stack, slots=3, max_length=60)
    ids, bad = prompt(1, 6)[0].tolist(), settings(9, adapter_id=1)
    one.admit([(ids, bad), (ids, settings(50)), (ids[:4], bad)])
    for slot in (0, 2):
        with pytest.raises(NonFiniteLogits, match=f"row {slot} is nan") as raised:
            one.advance()
        assert raised.value.slot == slot and slot not in one.running
    expected = alone(tree, ids, settings(50))
    got = {new.slot: new.ids for new in one.advance()}
    assert got == {1: expected[:16]}
    for new in one.advance():
        got[new.slot] += new.ids
    shorter = [ids[1:3], ids[:1]]
    slots = one.admit([(short, settings(5)) for short in shorter])
    assert sorted(slots) == [0, 2]
    alone_ids = [alone(tree, short, settings(5)) for short in shorter]
    assert to_end(one, got) == {1: expected, **dict(zip(slots, alone_ids, strict=True))}


def test_a_row_with_nan_that_is_released_raises_no_error(broken):
    tree, stack = broken
    one, ids = Engine(stack, slots=3, max_length=20), prompt(1, 6)[0].tolist()
    bad = settings(6, adapter_id=1)
    one.admit([(ids, bad), (ids, bad), (ids, settings(6))])
    with pytest.raises(NonFiniteLogits):
        one.advance()
    one.release(1)
    assert [new.ids for new in one.advance()] == [alone(tree, ids, settings(6))]
    assert one.free_slots == 3


def test_alternatives_are_the_likeliest_tokens_of_an_uncached_pass(model):
    """Beside a row that asks for none."""
    ids = prompt(2, 5).tolist()
    one = Engine(model, slots=2, max_length=40)
    one.admit([(ids[0], settings(20)), (ids[1], settings(20, alternatives=3))])
    tokens, found = [], []
    while one.running:
        for new in one.advance():
            if new.slot == 0:
                assert new.alternatives is None
            else:
                tokens, found = tokens + new.ids, found + (new.alternatives or [])
    logits = model(torch.tensor([ids[1] + tokens[:-1]]))[0, 4:]
    values, likeliest = logits.log_softmax(-1).topk(3)
    assert [[i for i, _ in step] for step in found] == likeliest.tolist()
    logprobs = torch.tensor([[x for _, x in step] for step in found])
    torch.testing.assert_close(logprobs, values, rtol=1e-5, atol=1e-5)


def test_many_rows_get_what_they_get_alone_and_adapters_are_copied_twice_at_most(
    model, monkeypatch
):
    """With 1, 2, ... 5 rows, where kernels serve 2."""
    monkeypatch.setattr(engine, "MAX_BATCH", 2)
    prepared = []
    monkeypatch.setattr(
        engine, "step_kernels", lambda model, b: prepared.append(b) or step_kernels(model, b)
    )
    prompts = [prompt(1, t, seed=t)[0].tolist() for t in (1, 3, 9, 2, 6)]
    one, tokens = Engine(model, slots=5, max_length=30), {}
    for ids in prompts:
        one.admit([(ids, settings(10))])
        for new in one.advance(1):
            tokens.setdefault(new.slot, []).extend(new.ids)
    to_end(one, tokens)
    assert prepared == [2, 5]
    monkeypatch.undo()
    for slot, ids in enumerate(prompts):
        assert tokens[slot] == alone(model, ids, settings(10))


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs the kernels in Triton's interpreter")
def test_a_cache_begins_long_only_if_steps_read_the_tokens_of_their_rows(model, monkeypatch):
    monkeypatch.setattr(engine, "MAX_BATCH", 2)
    length = lambda model, slots: Engine(model, slots=slots, max_length=1000).cache.length
    kernels = model.with_spec(kernels="triton")
    assert length(kernels, 1) == 256  # heads of 8 are not attention's kernel's
    monkeypatch.setattr(kernel_layer, "decode_kernel_serves", lambda dtype, head_dim: True)
    assert length(model, 1) == 256
    assert [length(kernels, slots) for slots in (1, 2, 3)] == [1000, 1000, 256]


def test_settings_and_results_are_float32_under_another_default_dtype(model):
    ids, how = prompt(1, 6), settings(3, Sampling(temperature=0.7, top_p=0.9), logprobs=True)
    torch.set_default_dtype(torch.bfloat16)
    try:
        one = Engine(model, slots=1, max_length=9)
        one.admit([(ids[0].tolist(), how)])
        sampling = one.rows.sampling
        _, logprobs = model.generate(ids, max_new_tokens=2, eos_token_id=[], return_logprobs=True)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {x.dtype for x in sampling} == {torch.float32, torch.int64}
    assert sampling.temperature.tolist() == torch.tensor([0.7]).tolist()
    assert logprobs.dtype == torch.float32


def test_closing_frees_the_cache(model):
    one = Engine(model, slots=2, max_length=30)
    one.admit([(prompt(1, 6)[0].tolist(), settings(6))])
    one.advance(2)
    held = [weakref.ref(one.cache), weakref.ref(one.cache.k[0]), weakref.ref(one.rows.token)]
    for _ in range(2):  # the second call does nothing
        one.close()
    gc.collect()
    assert not any(ref() is not None for ref in held)


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs the kernels in Triton's interpreter")
def test_a_step_through_kernels_gives_the_tokens_of_plain_torch(model):
    ids = prompt(1, 6)[0].tolist()
    expected = alone(model, ids, settings(2, Sampling()))
    assert alone(model.with_spec(kernels="triton"), ids, settings(2, Sampling())) == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs the kernels in Triton's interpreter")
@pytest.mark.parametrize("rows", [[0], [0, 1, 2]])
def test_the_ends_of_a_step_through_kernels_give_what_plain_torch_gives(rows, model, monkeypatch):
    """For rows of every kind, of which one ends by a stop id and the others by their limits."""
    ids = prompt(3, 6).tolist()
    hows = [settings(4, Sampling(), logprobs=True), settings(3, PENALTY, alternatives=2)]
    second = alone(model, ids[2], settings(5))[1]
    hows.append(RowSettings(max_new_tokens=5, sampling=DRAWS, seed=0, stop=(second,)))
    found = []
    for ends in (False, True):
        only = lambda model, b, ends=ends: StepKernels((None,) * len(model.layers), None, ends)
        monkeypatch.setattr(engine, "step_kernels", only)
        one = Engine(model, slots=3, max_length=20)
        one.admit([(ids[i], hows[i]) for i in rows])
        found.append(one.advance(3) + one.advance(3))
    for plain, kernel in zip(*found, strict=True):
        logprobs = [torch.tensor(x.logprobs or []) for x in (kernel, plain)]
        torch.testing.assert_close(*logprobs, rtol=1e-6, atol=1e-6)
        assert replace(kernel, logprobs=None) == replace(plain, logprobs=None)
