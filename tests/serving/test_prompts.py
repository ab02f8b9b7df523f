"""Chats with tools and calls, as the template sees them; equal to transformers' rendering."""

import shutil
from pathlib import Path

import pytest
from serving.errors import ApiError
from serving.prompts import chat_prompt
from serving.schemas import ChatRequest
from transformers import AutoTokenizer

from fastlora.checkpoints.hub import DEMO
from fastlora.text.tokenizer import Tokenizer

TOOL = {
    "type": "function",
    "function": {"name": "walk", "parameters": {"type": "object", "properties": {"path": {}}}},
}
CALL = {"id": "c1", "type": "function"}
CALL["function"] = {"name": "walk", "arguments": '{"path": "/tmp"}'}
MESSAGES = [
    {"role": "user", "content": "List /tmp"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "a.txt", "tool_call_id": "c1"},
]


@pytest.fixture
def folder(tmp_path, tools_template) -> Path:
    """The demo's tokenizer with a template that reads tools."""
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(DEMO / name, tmp_path)
    (tmp_path / "chat_template.jinja").write_text(tools_template)
    return tmp_path


@pytest.fixture
def tokenizer(folder) -> Tokenizer:
    found = Tokenizer.from_folder(folder)
    assert found is not None
    return found


def request(**fields) -> ChatRequest:
    return ChatRequest.model_validate({"model": "demo", "messages": MESSAGES} | fields)


def test_tools_and_calls_reach_the_template(tokenizer):
    text = tokenizer.decode(
        chat_prompt(tokenizer, request(tools=[TOOL])), skip_special_tokens=False
    )
    assert '"name": "walk"' in text and "<|tools|>" in text
    assert "/tmp<|end|>" in text  # the call's arguments, read from JSON
    assert text.endswith("<|assistant|>")
    without = tokenizer.decode(chat_prompt(tokenizer, request(tools=[TOOL], tool_choice="none")))
    assert "walk" not in without


def test_a_chat_with_tools_renders_as_in_transformers(tokenizer, folder):
    theirs = AutoTokenizer.from_pretrained(folder)
    settings = {"tools": [TOOL], "add_generation_prompt": True, "tokenize": False}
    messages = MESSAGES[:1]
    expected = theirs.apply_chat_template(messages, **settings)
    assert tokenizer.apply_chat_template(messages, **settings) == expected
    assert expected != tokenizer.render_chat(messages, add_generation_prompt=True)


def test_arguments_of_a_call_that_are_not_json_are_named(tokenizer):
    call = CALL | {"function": {"name": "walk", "arguments": "{"}}
    messages = [{"role": "assistant", "tool_calls": [call]}]
    with pytest.raises(ApiError) as caught:
        chat_prompt(tokenizer, request(messages=messages))
    assert caught.value.param == "messages[0].tool_calls[0].function.arguments"


def test_a_template_that_refuses_the_chat_is_a_400(folder):
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    tokenizer = Tokenizer.from_folder(folder)
    with pytest.raises(ApiError) as caught:
        chat_prompt(tokenizer, request())
    assert (caught.value.status, caught.value.param) == (400, "messages")
