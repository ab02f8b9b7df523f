"""Generation at its limits: NaN logits, ids outside the vocabulary, tiny settings, stops."""

import dataclasses
import math

import pytest
import torch

from fastlora.generation.generate import stop_ids
from fastlora.generation.sampling import Sampling, choose, variant_of
from fastlora.generation.text import encode_prompt, text_stop_ids
from fastlora.text.tokenizer import Tokenizer
from oracles.pairs import adapted
from oracles.sampling import filter_all, rows_of
from oracles.tokenizer_folders import CHATML, llama2, qwen
from oracles.transformers_side import prompt

SCORES = 3 * torch.randn(5, 96, generator=torch.Generator().manual_seed(0))


def with_value(model, part: str, value: float):
    """The model with one bad element in a matrix of its base or adapter."""
    if part == "adapter":
        tree = torch.utils._pytree.tree_map(torch.clone, model.adapter)
        tree["layers"][0]["down_proj"].a.view(-1)[0] = value
        return model.with_adapter(tree)
    base = {**model.base, "norm": model.base["norm"].clone()}
    base["norm"][0] = value
    return dataclasses.replace(model, base=base)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("part", ["base", "adapter"])
@pytest.mark.parametrize("how", [{}, {"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.9}])
def test_logits_that_are_not_finite_are_an_error_that_names_a_tensor(pair, part, value, how):
    model = with_value(adapted(pair("llama3.2").model), part, value)
    name = r"model\.norm\.weight" if part == "base" else r"\[.layers.\]\[0\]\[.down_proj.\]\.a"
    streamed = []
    with pytest.raises(FloatingPointError, match=rf"row 0 .*{part}'s tensor {name}"):
        model.generate(prompt(2, 5), max_new_tokens=3, stream=streamed.append, seed=0, **how)
    assert not streamed


@pytest.mark.parametrize("temperature", [1e-4, 1e-6, 1e-30, 1e-38, 1e-44, 1e-320])
def test_a_tiny_temperature_takes_the_likeliest_token(temperature):
    settings, index = [Sampling(temperature=temperature)] * 5, torch.zeros(5, dtype=torch.int64)
    for scores in (SCORES, 1e9 * SCORES):
        tokens = choose(scores, None, rows_of(settings, 96), index, variant_of(settings, False, 96))
        assert torch.equal(tokens, scores.argmax(-1))


@pytest.mark.parametrize("top_p", [1e-6, 1e-44, 1e-320])
def test_a_tiny_top_p_keeps_the_likeliest_token(top_p):
    kept = filter_all(SCORES, Sampling(temperature=1.0, top_p=top_p)).isfinite()
    assert torch.equal(kept, torch.nn.functional.one_hot(SCORES.argmax(-1), 96).bool())


@pytest.mark.parametrize("pad", [-1, 10**6, None])
def test_a_stopped_row_is_filled_with_an_id_of_the_vocabulary(pair, pad):
    model = pair("llama3.2").model
    config = dataclasses.replace(model.spec.config, pad_token_id=pad)
    model = dataclasses.replace(model, spec=dataclasses.replace(model.spec, config=config))
    first = model.generate(prompt(8, 4), max_new_tokens=1)[:, -1].tolist()
    assert len(set(first)) > 1  # so that some rows stop before others
    out = model.generate(prompt(8, 4), max_new_tokens=4, eos_token_id=first[0])
    stopped = out[torch.tensor(first) == first[0], 4:]
    assert (stopped == first[0]).all()
    assert stop_ids(first[0], ()) == (first[0],)


def test_a_prompt_that_begins_with_bos_gets_no_second(tmp_path):
    tokenizer = Tokenizer.from_folder(llama2(tmp_path))
    chat = [{"role": "user", "content": "The rank?"}]
    rendered = tokenizer.render_chat(chat, add_generation_prompt=True)
    assert rendered.startswith("<s>")
    assert encode_prompt(tokenizer, rendered) == encode_prompt(tokenizer, chat)
    assert encode_prompt(tokenizer, "The rank?") == tokenizer.encode("The rank?")


def test_generated_text_stops_at_the_end_of_turn_that_no_file_names(tmp_path):
    tokenizer = Tokenizer.from_folder(qwen(tmp_path, CHATML, eos_token="<|endoftext|>"))
    end = tokenizer.backend.token_to_id("<|im_end|>")
    ids = {7, end, *tokenizer.eos_token_ids}
    assert text_stop_ids(tokenizer, (7, 10**6), len(tokenizer)) == sorted(ids)
    assert text_stop_ids(tokenizer, (7,), end) == sorted(ids - {end})
