"""generate: transformers' ids, rows that do not see each other, and what stops a row."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from conftest import Pair, adapted, token_ids
from models import FAMILIES
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    LogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fastlora.generation.generate import TextStream
from fastlora.generation.sampling import Sampling, filtered, penalised
from fastlora.model import Model

NEW = 24  # with a prompt of 9, past windows (5) and dynamic RoPE's context (16)


def prompt(b: int, t: int, seed: int = 0) -> Tensor:
    return 3 + token_ids(b, t, seed=seed, vocab_size=93)  # no special ids


def left_padding(*real: int) -> Tensor:
    """[b, longest] mask of rows with that many real tokens."""
    return (torch.arange(max(real)) >= max(real) - torch.tensor(real)[:, None]).long()


def theirs(one: Pair, ids: Tensor, mask: Tensor | None = None, **how: Any) -> Tensor:
    """transformers' generate, greedy unless told otherwise."""
    mask = torch.ones_like(ids) if mask is None else mask
    how = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **how}
    # Dynamic RoPE's trained 16 is not the limit here: see conftest.read_pair.
    return one.fresh_oracle().generate(ids, attention_mask=mask, **how)


def alone(model: Model, ids: Tensor, mask: Tensor, **how: Any) -> list[Tensor]:
    """Each row's new tokens when it is the whole batch."""
    rows = [row[m.bool()] for row, m in zip(ids, mask, strict=True)]
    return [model.generate(row[None], **how)[0, len(row) :] for row in rows]


# ── greedy ────────────────────────────────────────────────────────────────────────────────


def greedy_difference(one: Pair) -> float:
    """Share of greedy ids that differ from transformers', over single prompts and a padded batch.

    With dynamic RoPE transformers' rows depend on the batch's longest, so there rows run alone.
    """
    how: dict[str, Any] = dict(max_new_tokens=NEW, eos_token_id=())
    batches = [(prompt(1, t), None) for t in (1, 9)]
    if one.model.spec.config.rope_parameters.rope_type != "dynamic":
        batches.append((prompt(3, 12), left_padding(12, 7, 3)))
    same = [
        one.model.generate(ids, attention_mask=mask, **how)
        == theirs(one, ids, mask, eos_token_id=[])
        for ids, mask in batches
    ]
    return 1 - torch.cat([x[:, -NEW:].flatten() for x in same]).double().mean().item()


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


@pytest.mark.parametrize("family", ["llama3.2", "qwen2_window", "smollm3"])
def test_the_cache_gives_what_a_whole_forward_gives(family, pair):
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


def test_the_checkpoints_own_stop_ids_are_the_default(pair):
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


# ── sampling ──────────────────────────────────────────────────────────────────────────────

SCORES = 3 * torch.randn(5, 96, generator=torch.Generator().manual_seed(0))
WARPERS: dict[str, tuple[dict[str, Any], list[LogitsProcessor]]] = {
    "temperature": ({"temperature": 0.7}, [TemperatureLogitsWarper(0.7)]),
    "top_k": ({"top_k": 7}, [TopKLogitsWarper(7)]),
    "top_k 1": ({"top_k": 1}, [TopKLogitsWarper(1)]),
    "top_k above v": ({"top_k": 1000}, [TopKLogitsWarper(1000)]),
    "top_p": ({"top_p": 0.8}, [TopPLogitsWarper(0.8)]),
    "top_p tiny": ({"top_p": 1e-6}, [TopPLogitsWarper(1e-6)]),
    "top_p 1": ({"top_p": 1.0}, []),
    "all": (
        {"temperature": 1.7, "top_k": 20, "top_p": 0.6},
        [TemperatureLogitsWarper(1.7), TopKLogitsWarper(20), TopPLogitsWarper(0.6)],
    ),
}


@pytest.mark.parametrize("name", WARPERS)
def test_filtered_scores_equal_transformers_warpers(name):
    settings, warpers = WARPERS[name]
    expected = SCORES
    for warper in warpers:
        expected = warper(torch.zeros(5, 1, dtype=torch.int64), expected)
    ours = filtered(SCORES, Sampling(**{"temperature": 1.0, **settings}))
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)


def test_equal_scores_at_the_edge_of_top_k_all_stay():
    scores = torch.tensor([[3.0, 2.0, 2.0, 1.0]])
    kept = filtered(scores, Sampling(temperature=1.0, top_k=2)).isfinite()
    assert kept.tolist() == [[True, True, True, False]]


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3])
def test_the_repetition_penalty_equals_transformers(penalty):
    ids = token_ids(5, 8, vocab_size=96)
    seen = torch.zeros(5, 96, dtype=torch.bool).scatter(1, ids, True)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, SCORES.clone())
    assert torch.equal(penalised(SCORES, seen, penalty), expected)


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


def test_a_seed_reproduces_and_another_differs(pair):
    model, ids = pair("llama2").model, prompt(2, 4)
    how: dict[str, Any] = dict(max_new_tokens=16, temperature=1.0, eos_token_id=())
    draw = lambda seed: model.generate(ids, seed=seed, **how)
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert not torch.equal(draw(None), draw(None))


def test_samples_follow_the_filtered_distribution(pair):
    """512 rows of one prompt: chi-square of the first token; 99.99 % of right samplers pass."""
    model, ids = pair("llama2").model, prompt(1, 4)
    settings = dict(temperature=3.0, top_k=12)
    p = filtered(model(ids)[0, -1:], Sampling(**settings)).softmax(-1)[0]
    rows = ids.expand(512, 4).contiguous()
    tokens = model.generate(rows, max_new_tokens=1, seed=0, eos_token_id=(), **settings)[:, -1]
    counts = torch.bincount(tokens, minlength=96)
    assert not counts[p == 0].any()
    expected = 512 * p[p > 0]
    statistic = ((counts[p > 0] - expected) ** 2 / expected).sum().item()
    assert statistic < 11 + 4 * math.sqrt(2 * 11)


def test_a_low_temperature_is_greedy(pair):
    model, ids = pair("llama2").model, prompt(2, 4)
    greedy, cold = (
        model.generate(ids, max_new_tokens=8, eos_token_id=(), **how)
        for how in ({}, {"temperature": 1e-4, "seed": 0})
    )
    assert torch.equal(greedy, cold)


# ── streaming ─────────────────────────────────────────────────────────────────────────────


def test_streamed_tokens_are_the_result(pair):
    model, ids, tokens = pair("qwen2").model, prompt(3, 6), []
    free = model.generate(ids, max_new_tokens=NEW, eos_token_id=())[:, 6:]
    out = model.generate(
        ids, max_new_tokens=NEW, eos_token_id=free[0, 3].item(), stream=lambda t: tokens.append(t)
    )
    assert torch.equal(torch.stack(tokens, dim=1), out[:, 6:])


class Bytes:
    """A byte-level vocabulary: one id per byte, so that é is two tokens and 🦙 four."""

    def __init__(self) -> None:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        raw = RawTokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        raw.decoder = decoders.ByteLevel()
        self.encode = lambda text: raw.encode(text).ids
        self.decode = raw.decode


@pytest.mark.parametrize(
    "text", ["plain", "é", "naïve café", "🦙 and 日本語", "ends in half a \N{LLAMA}"]
)
def test_streamed_pieces_join_to_the_text(text):
    tokenizer, pieces = Bytes(), []
    ids = tokenizer.encode(text)
    if text.startswith("ends"):
        ids = ids[:-2]  # cut inside the last character
    stream = TextStream(tokenizer.decode, pieces.append)
    for i in ids:
        stream(torch.tensor([i]))
    stream.finish()
    assert "".join(pieces) == tokenizer.decode(ids)
    whole = pieces[:-1] if text.startswith("ends") else pieces
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in whole)
    assert all(pieces)


def test_invalid_bytes_in_the_middle_are_streamed_too():
    tokenizer, pieces = Bytes(), []
    ids = tokenizer.encode("é")[:1] + tokenizer.encode("abc")
    stream = TextStream(tokenizer.decode, pieces.append)
    for i in ids:
        stream(torch.tensor([i]))
    stream.finish()
    assert "".join(pieces) == tokenizer.decode(ids) == "\N{REPLACEMENT CHARACTER}abc"


# ── what is refused ───────────────────────────────────────────────────────────────────────

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
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


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_before_any_work(case, pair):
    arguments, message = REFUSED[case]
    called: Counter = Counter()
    with pytest.raises(ValueError, match=message):
        pair("llama2").model.generate(
            prompt(2, 9), stream=lambda t: called.update(t=1), **{"max_new_tokens": 4} | arguments
        )
    assert not called


def test_all_that_is_wrong_is_said_at_once(pair):
    with pytest.raises(ValueError, match=r"temperature(.|\n)*top_p(.|\n)*max_new_tokens"):
        pair("llama2").model.generate(prompt(1, 3), temperature=-1.0, top_p=0.0, max_new_tokens=0)


def test_exactly_max_seq_length_fits(pair):
    assert pair("llama2").model.generate(prompt(1, 100), max_new_tokens=28).shape[1] <= 128
