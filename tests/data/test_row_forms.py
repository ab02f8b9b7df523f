"""standard_row() and checked_row(): the forms of rows that data sets use."""

import json
import re

import pytest

from fastlora.data.row_forms import standard_row, without_nulls
from fastlora.data.rows import checked_row, row_kind
from oracles.data_rows import CHAT

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def as_text(call: dict) -> dict:
    function = call["function"]
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"])}}


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        ),
        (
            {"system": "s", "conversations": [{"from": "user", "value": "a", "weight": 0}]},
            [{"role": "system", "content": "s"}, {"role": "user", "content": "a", "weight": 0}],
        ),
        ({"conversations": CHAT}, CHAT),
        ({"messages": [{"from": "observation", "value": "3"}]}, [{"role": "tool", "content": "3"}]),
        (
            {"conversations": [{"from": "function_call", "value": json.dumps(CALL["function"])}]},
            [{"role": "assistant", "content": "", "tool_calls": [CALL]}],
        ),
        ({"messages": json.dumps(CHAT)}, CHAT),
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [as_text(CALL)]}]},
            [{"role": "assistant", "content": None, "tool_calls": [CALL]}],
        ),
    ],
)
def test_chats_of_other_forms_become_messages(row, messages):
    new = checked_row(row)
    assert new["messages"] == messages
    assert checked_row(new) == new
    assert "conversations" not in new


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), [json.dumps(TOOL)], (TOOL,)])
def test_tools_are_a_list_of_dicts_or_json(tools):
    assert checked_row({"messages": CHAT, "tools": tools})["tools"] == [TOOL]


@pytest.mark.parametrize("tools", [None, "", [], "[]"])
def test_empty_tools_are_no_tools(tools):
    assert checked_row({"messages": CHAT, "tools": tools}) == {"messages": CHAT}


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"conversations": []}, "at least one message"),
        ({"conversations": [{"from": "clown", "value": "a"}]}, "message 1 is from 'clown'"),
        ({"conversations": [{"from": "gpt", "value": 3}]}, '"value" is a int'),
        ({"conversations": [{"from": "function_call", "value": "add(1)"}]}, "is not JSON"),
        ({"messages": "{"}, "messages is not JSON"),
        ({"messages": CHAT, "tools": 5}, "tools must be a list of dicts"),
        ({"messages": CHAT, "tools": "[1]"}, "tools must be a list of dicts"),
        ({"messages": CHAT, "tools": "[" * 100_000}, "tools is n"),
        ({"prompt": "a", "completion": "b", "tools": [TOOL]}, "only rows with messages"),
        ({"text": "a", "tools": [TOOL]}, "only rows with messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
            "part of content of type 'image'",
        ),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "part of content of type 'str'"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": 1}]}]}, "has no name"),
        (
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[1]"}]}
                ]
            },
            "must be a JSON object",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}]},
            "arguments of f is not JSON",
        ),
    ],
)
def test_rows_that_cannot_be_converted_say_why(row, why):
    with pytest.raises(ValueError, match=re.escape(why)):
        checked_row(row)


def test_columns_rename():
    columns = {"prompt": "question", "completion": "answer"}
    row = {"question": "a", "answer": "b", "text": "whole", "prompt": "another", "id": 3}
    new = checked_row(row, columns)
    assert new == {"prompt": "a", "completion": "b", "id": 3}
    assert row_kind(new) == "prompt"
    assert checked_row({"body": "a"}, {"text": "body"}) == {"text": "a"}


def test_columns_choose_the_kind_of_a_row():
    row = {"messages": CHAT, "body": "a"}
    assert checked_row(row, {"text": "body"}) == {"text": "a"}
    assert checked_row(row)["messages"] == CHAT


def test_columns_rename_keys_of_messages():
    row = {"turns": [{"speaker": "user", "says": "a"}, {"speaker": "assistant", "says": "b"}]}
    columns = {"messages": "turns", "role": "speaker", "content": "says"}
    assert checked_row(row, columns)["messages"] == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]


def test_the_given_row_is_not_changed():
    row = {"conversations": [{"from": "human", "value": "a"}], "tools": json.dumps([TOOL])}
    before = json.dumps(row)
    standard_row(row)
    assert json.dumps(row) == before


def test_nulls_are_left_out_at_every_depth():
    row = {"a": None, "b": [{"c": None, "d": 1}, None], "e": {"f": {"g": None}}}
    assert without_nulls(row) == {"b": [{"d": 1}, None], "e": {"f": {}}}
