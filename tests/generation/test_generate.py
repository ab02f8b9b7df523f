"""generate: ids equal transformers'; rows do not affect each other; stop ids end and fill rows."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from fastlora.model import Model
from oracles.checkpoints import FAMILIES
from oracles.pairs import adapted
from oracles.transformers_side import NEW, greedy_difference, left_padding, prompt, theirs


def alone(model: Model, ids: Tensor, mask: Tensor, **how: Any) -> list[Tensor]:
    """Each row's new tokens when it is the whole batch."""
    rows = [row[m.bool()] for row, m in zip(ids, mask, strict=True)]
    return [model.generate(row[None], **how)[0, len(row) :] for row in rows]


# ── greedy ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_ids_equal_transformers(family, pair):
    assert greedy_difference(pair(family)) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_generates_what_its_rows_generate_alone(family, pair):
    model, ids, mask = pair(family).model, prompt(3, 12), left_padding(12, 7, 3)
    how: dict[str, Any] = dict(max_new_tokens=NEW, eos_token_id=())
    together = model.generate(ids, attention_mask=mask, **how)[:, 12:]
    for row, expected in zip(together, alone(model, ids, mask, **how), strict=True):
        assert torch.equal(row, expected)


@pytest.mark.parametrize("family", ["llama3.2", "qwen2_window", "smollm3", "gemma3"])
def test_cached_decoding_equals_a_forward_pass_over_every_prefix(family, pair):
    """An adapter on, no cache: the argmax after every prefix."""
    model = adapted(pair(family).model, r=4)
    ids = model.generate(prompt(2, 4), max_new_tokens=NEW, eos_token_id=())
    assert torch.equal(model(ids[:, :-1])[:, 3:].argmax(-1), ids[:, 4:])


def test_bfloat16_with_a_float32_adapter_generates(pair):
    model = adapted(pair("llama2", torch.bfloat16).model, r=4)
    ids = model.generate(prompt(2, 4), max_new_tokens=4, eos_token_id=())
    assert torch.equal(model(ids[:, :4])[:, -1].argmax(-1), ids[:, 4])


def test_the_prompt_is_kept_padding_included(pair):
    model, ids, mask = pair("llama2").model, prompt(2, 5), left_padding(5, 2)
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=2)[:, :5], ids)


# ── stopping ──────────────────────────────────────────────────────────────────────────────


def test_stop_ids_end_and_fill_rows_as_in_transformers(pair):
    """Several stop ids, chosen so that the rows stop at different steps, and one never."""
    one, ids = pair("qwen2"), prompt(3, 6)  # its pad_token_id is 0
    free = one.model.generate(ids, max_new_tokens=NEW, eos_token_id=())[:, 6:]
    stops = [free[0, 3].item(), free[1, 8].item()]
    ours = one.model.generate(ids, max_new_tokens=NEW, eos_token_id=stops)
    assert torch.equal(ours, theirs(one, ids, eos_token_id=stops))
    for row, whole in zip(ours[:, 6:].tolist(), free.tolist(), strict=True):
        end = next((i for i, x in enumerate(whole) if x in stops), len(whole))
        assert row[: end + 1] == whole[: len(row)][: end + 1]  # the stop id itself is kept
        assert set(row[end + 1 :]) <= {0}


def test_generation_ends_when_the_last_row_stops(pair):
    model, ids = pair("llama2").model, prompt(1, 6)
    free = model.generate(ids, max_new_tokens=NEW, eos_token_id=())[0, 6:].tolist()
    stop = free[5]
    ours = model.generate(ids, max_new_tokens=NEW, eos_token_id=stop)[0, 6:].tolist()
    assert ours == free[: free.index(stop) + 1]


def test_the_checkpoints_stop_ids_are_the_default(pair):
    model, ids = pair("llama2").model, prompt(4, 6)
    assert model.spec.config.eos_token_id == (2,)
    default, given = (
        model.generate(ids, max_new_tokens=60, **how) for how in ({}, {"eos_token_id": 2})
    )
    assert torch.equal(default, given)


def test_without_a_pad_id_rows_are_filled_with_the_first_stop_id(pair):
    model, ids = pair("llama2").model, prompt(2, 6)  # no pad_token_id
    free = model.generate(ids, max_new_tokens=8, eos_token_id=())[:, 6:]
    stop = free[0, 2].item()
    row = model.generate(ids, max_new_tokens=8, eos_token_id=(stop, 95))[0, 6:].tolist()
    first = row.index(stop)
    assert set(row[first:]) == {stop}


# ── repetition penalty ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", ["llama2", "qwen3"])
def test_greedy_with_a_repetition_penalty_equals_transformers(family, pair):
    one, ids = pair(family), prompt(2, 9)
    expected = theirs(one, ids, eos_token_id=[], repetition_penalty=1.4)
    how: dict[str, Any] = dict(max_new_tokens=NEW, eos_token_id=(), repetition_penalty=1.4)
    assert torch.equal(one.model.generate(ids, **how), expected)
    assert not torch.equal(one.model.generate(ids, **how | {"repetition_penalty": 1.0}), expected)


def test_padding_is_not_penalised(pair):
    model, ids, mask = pair("llama2").model, prompt(3, 12), left_padding(12, 7, 3)
    ids = torch.where(mask.bool(), ids, 17)
    how: dict[str, Any] = dict(max_new_tokens=NEW, eos_token_id=(), repetition_penalty=1.4)
    together = model.generate(ids, attention_mask=mask, **how)[:, 12:]
    for row, expected in zip(together, alone(model, ids, mask, **how), strict=True):
        assert torch.equal(row, expected)


# ── streaming ─────────────────────────────────────────────────────────────────────────────


def test_streamed_tokens_are_the_result(pair):
    model, ids, tokens = pair("qwen2").model, prompt(3, 6), []
    free = model.generate(ids, max_new_tokens=NEW, eos_token_id=())[:, 6:]
    out = model.generate(
        ids, max_new_tokens=NEW, eos_token_id=free[0, 3].item(), stream=lambda t: tokens.append(t)
    )
    assert torch.equal(torch.stack(tokens, dim=1), out[:, 6:])


# ── bad arguments ─────────────────────────────────────────────────────────────────────────


BAD_SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "too long": ({"max_new_tokens": 120}, r"9 prompt tokens.*120.*129.*128"),
    "no tokens": ({"max_new_tokens": 0}, "max_new_tokens"),
    "cold": ({"temperature": -1.0}, "temperature"),
    "nan": ({"temperature": math.nan}, "temperature"),
    "no k": ({"top_k": 0}, "top_k"),
    "p 0": ({"top_p": 0.0}, "top_p"),
    "p 2": ({"top_p": 2.0}, "top_p"),
    "penalty 0": ({"repetition_penalty": 0.0}, "repetition_penalty"),
    "right padding": ({"attention_mask": left_padding(9, 4).flip(-1)}, "left"),
    "an empty row": ({"attention_mask": left_padding(9, 0)}, "padding|mask"),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_a_bad_setting_is_refused_before_the_first_token(case, pair):
    arguments, message = BAD_SETTINGS[case]
    called: Counter = Counter()
    with pytest.raises(ValueError, match=message):
        pair("llama2").model.generate(
            prompt(2, 9), stream=lambda t: called.update(t=1), **{"max_new_tokens": 4} | arguments
        )
    assert not called


def test_all_problems_are_reported_together(pair):
    with pytest.raises(ValueError, match=r"temperature(.|\n)*top_p(.|\n)*max_new_tokens"):
        pair("llama2").model.generate(prompt(1, 3), temperature=-1.0, top_p=0.0, max_new_tokens=0)


def test_exactly_max_seq_length_fits(pair):
    assert pair("llama2").model.generate(prompt(1, 100), max_new_tokens=28).shape[1] <= 128
