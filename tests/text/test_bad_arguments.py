"""Arguments of Tokenizer's methods that are wrong are refused by name."""

from typing import Any

import pytest
import torch

import fastlora
from fastlora.text.tokenizer import Tokenizer


class Stranger:
    """An object of a class that nothing expects."""


STRANGER = Stranger()
NOT_A_FLAG = (None, 1, 0, "yes", (), 2.5, STRANGER)
NOT_A_PATH = (None, "", 5, (), 1.5, "a\0b", b"a", {}, STRANGER)
NOT_A_TEXT = (None, 5, (), 1.5, b"text", {}, STRANGER)
NOT_IDS = ("text", 5, None, [1.5], ["1"], [[1]], [None], [True], {}, [-1], [2**40], [10**400])
NOT_MESSAGES = ("text", 5, None, [], [5], ["user"], {}, [{"content": "no role"}], STRANGER)

NOT_TOOLS = ("text", 5, [5], ["f"], {}, {"a": 1}, [{"a": {1, 2}}], [{"a": STRANGER}], STRANGER)

NOT_TEMPLATE_KWARGS = (
    "text",
    5,
    None,
    [],
    {"messages": 1},
    {"a b": 1},
    {5: 1},
    {"no_such": 1},
    STRANGER,
)

MESSAGES = [{"role": "user", "content": "a"}]
CHAT: dict[str, Any] = dict(messages=NOT_MESSAGES, chat_template=(5, (), "no such", b"", {}))

# Method -> (good arguments, wrong values by argument).
CALLS: dict[str, tuple[dict[str, Any], dict[str, tuple[Any, ...]]]] = {
    "from_folder": ({}, dict(folder=NOT_A_PATH, config_folder=NOT_A_PATH[1:])),
    "encode": (
        dict(text="a"),
        dict(text=(*NOT_A_TEXT, "\ud800"), add_special_tokens=NOT_A_FLAG),
    ),
    "encode_with_offsets": ({}, dict(text=(*NOT_A_TEXT, "\ud800"))),
    "decode": (
        dict(ids=[1]),
        dict(
            ids=(*NOT_IDS, torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2)),
            skip_special_tokens=NOT_A_FLAG,
        ),
    ),
    "apply_chat_template": (
        dict(messages=MESSAGES),
        CHAT | dict(add_generation_prompt=NOT_A_FLAG, tokenize=NOT_A_FLAG, tools=NOT_TOOLS),
    ),
    "render_chat": (
        dict(messages=MESSAGES),
        CHAT | dict(add_generation_prompt=NOT_A_FLAG, tools=NOT_TOOLS),
    ),
    "render_replies": (dict(messages=MESSAGES), CHAT | dict(tools=NOT_TOOLS)),
    "with_tokens": (
        dict(tokens=["a"]),
        dict(tokens=(None, 5, "new", [5], [None], ["\ud800"], {"a": 1}), special=NOT_A_FLAG),
    ),
    "with_template_kwargs": ({}, dict(template_kwargs=NOT_TEMPLATE_KWARGS)),
    "save_pretrained": ({}, dict(folder=NOT_A_PATH)),
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    tokenizer = fastlora.load("demo", device="cpu")[1]
    assert tokenizer is not None
    return tokenizer


@pytest.mark.parametrize("method", CALLS)
def test_every_wrong_argument_is_named(method, tokenizer, tmp_path):
    good, wrong = CALLS[method]
    if method == "from_folder":
        good = dict(folder=tmp_path)
    for name, values in wrong.items():
        for value in values:
            with pytest.raises((ValueError, TypeError)) as refused:
                getattr(tokenizer, method)(**good | {name: value})
            assert name in str(refused.value), (name, value)
            assert not isinstance(refused.value, UnicodeError), (name, value)


def test_the_table_holds_every_public_method():
    methods = {
        name
        for name in vars(Tokenizer)
        if callable(getattr(Tokenizer, name)) and not name.startswith("_")
    }
    assert methods == set(CALLS)


@pytest.mark.parametrize(
    "row", [[5, 6], (5, 6), iter([5, 6]), torch.tensor([5, 6]), torch.tensor([5, 6]).numpy()]
)
def test_any_row_of_whole_numbers_decodes(row, tokenizer):
    decode = getattr(Tokenizer.decode, "__wrapped__", Tokenizer.decode)  # below the type checker
    assert decode(tokenizer, row) == tokenizer.decode([5, 6])
