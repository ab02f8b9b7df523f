"""One BOS at the beginning of a text, and the tokens at which a reply stops."""

import pytest

from fastlora.text.boundaries import (
    encode_with_one_bos,
    reply_stop_ids,
    stop_warning,
    unnamed_end_of_turn,
)
from fastlora.text.tokenizer import Tokenizer
from oracles.tokenizer_folders import CHATML, CHATML_MARKED, FOLDERS, llama2, llama3, qwen

HEADER_ONLY = """{% for m in messages %}{{ '<|im_start|>' + m.role + ' ' + m.content }}{% endfor %}
{%- if add_generation_prompt or messages[-1].role == 'assistant' %}
{{- '<|im_start|>' }}{% endif %}"""


@pytest.mark.parametrize("make", [llama2, llama3])
def test_a_text_that_begins_with_bos_gets_no_second(tmp_path, make):
    tokenizer = Tokenizer.from_folder(make(tmp_path))
    bos = tokenizer.bos_token
    once = tokenizer.encode("The rank")
    assert once[0] == tokenizer.bos_token_id != once[1]
    assert encode_with_one_bos(tokenizer, "The rank") == once
    after = tokenizer.encode(f"{bos}The rank", add_special_tokens=False)
    assert encode_with_one_bos(tokenizer, f"{bos}The rank") == after
    assert after.count(tokenizer.bos_token_id) == 1
    twice = encode_with_one_bos(tokenizer, f"{bos}{bos}The rank")  # the user wrote two
    assert twice.count(tokenizer.bos_token_id) == 2


def test_a_tokenizer_that_adds_no_bos_keeps_all_that_the_text_has(tmp_path):
    tokenizer = Tokenizer.from_folder(qwen(tmp_path))
    text = (tokenizer.bos_token or "<|im_start|>") * 2 + "The rank"
    assert encode_with_one_bos(tokenizer, text) == tokenizer.encode(text)


def without_im_end(folder, template):
    """A base model's folder: a chat template, and <|endoftext|> as the only end of text."""
    return Tokenizer.from_folder(qwen(folder, template, eos_token="<|endoftext|>"))


@pytest.mark.parametrize("template", [CHATML, CHATML_MARKED])
def test_the_templates_end_of_turn_is_a_stop(tmp_path, template):
    tokenizer = without_im_end(tmp_path, template)
    end = tokenizer.backend.token_to_id("<|im_end|>")
    assert end not in tokenizer.eos_token_ids
    assert unnamed_end_of_turn(tokenizer) == end
    assert reply_stop_ids(tokenizer) == (*tokenizer.eos_token_ids, end)
    assert f"'<|im_end|>' (id {end})" in stop_warning(tokenizer)
    assert "generation_config.json" in stop_warning(tokenizer)


def test_the_next_header_is_not_an_end_of_turn(tmp_path):
    tokenizer = without_im_end(tmp_path, HEADER_ONLY)
    assert unnamed_end_of_turn(tokenizer) is None
    assert "writes no end-of-text token after a reply" in stop_warning(tokenizer)


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_that_name_their_end_of_turn_need_no_warning(tmp_path, name):
    tokenizer = Tokenizer.from_folder(FOLDERS[name](tmp_path))
    end = unnamed_end_of_turn(tokenizer)
    assert reply_stop_ids(tokenizer) == tokenizer.eos_token_ids + (() if end is None else (end,))
    if "default" not in tokenizer.chat_templates:
        assert stop_warning(tokenizer) is None
