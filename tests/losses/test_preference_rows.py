"""Preference rows: how they are read and encoded, and which are refused."""

import dataclasses
import json

import numpy as np
import pytest

from fastlora.data.encoding import encode_rows
from fastlora.losses import encode_labelled, encode_pairs
from oracles.preference_data import LABELLED, PAIRS

USER = {"role": "user", "content": "What is a rank?"}
GOOD = {"role": "assistant", "content": "A number of rows."}
BAD = {"role": "assistant", "content": "No idea."}


def test_each_reply_is_encoded_as_a_supervised_row(tokenizer):
    pairs = encode_pairs(PAIRS, tokenizer, max_seq_length=64)
    for side in ("chosen", "rejected"):
        rows = [{"prompt": row["prompt"], "completion": row[side]} for row in PAIRS]
        for pair, example in zip(
            pairs, encode_rows(rows, tokenizer, max_seq_length=64), strict=True
        ):
            assert np.array_equal(getattr(pair, f"{side}_ids"), example.input_ids)
            assert np.array_equal(getattr(pair, f"{side}_labels"), example.labels)


def test_chats_with_and_without_a_prompt_are_the_same_rows(tokenizer):
    explicit = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
    implicit = {"chosen": [USER, GOOD], "rejected": [USER, BAD]}
    one, two = encode_pairs([explicit, implicit], tokenizer, max_seq_length=64)
    assert np.array_equal(one.input_ids, two.input_ids)
    trained = [int(i) for i in one.chosen_labels if i != -100]
    assert tokenizer.decode(trained) == GOOD["content"]


def test_replies_may_have_the_forms_that_supervised_rows_have(tokenizer):
    """ShareGPT's messages, content in parts, renamed columns, a prompt's text beside two chats."""
    human, gpt = {"from": "human", "value": USER["content"]}, {"from": "gpt", "value": "A number."}
    short = {"role": "assistant", "content": "A number."}
    parts = {"role": "assistant", "content": [{"type": "text", "text": "A number."}]}
    plain = {"prompt": [USER], "chosen": [short], "rejected": [BAD]}
    others = [
        {"chosen": [human, gpt], "rejected": [human, {"from": "gpt", "value": BAD["content"]}]},
        {"prompt": USER["content"], "chosen": [USER, short], "rejected": [USER, BAD]},
        {"prompt": [USER], "chosen": [parts], "rejected": [BAD]},
    ]
    wanted, *found = encode_pairs([plain, *others], tokenizer, max_seq_length=64)
    renamed = {"question": [USER], "good": [short], "rejected": [BAD], "chosen": "unused"}
    columns = {"prompt": "question", "chosen": "good"}
    found += encode_pairs([renamed], tokenizer, max_seq_length=64, columns=columns)
    for pair in found:
        assert pair.chosen_ids.tolist() == wanted.chosen_ids.tolist()
        assert pair.rejected_ids.tolist() == wanted.rejected_ids.tolist()


def test_tools_reach_the_prompt(tokenizer):
    """The demo's template shows no tools; this one does."""
    template = tokenizer.chat_templates["default"]
    text = "{% if tools %}{{ tools | tojson }}{% endif %}" + template.text
    templates = {"default": template._replace(text=text)}
    shows_tools = dataclasses.replace(tokenizer, chat_templates=templates)
    tools = [{"type": "function", "function": {"name": "look"}}]
    pair = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "tools": tools}
    (encoded,) = encode_pairs([pair], shows_tools, max_seq_length=128)
    assert tokenizer.decode([*encoded.chosen_ids.tolist()]).count("look") == 1


def test_rows_of_a_file_are_those_of_a_list(tokenizer, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    for a, b in zip(
        encode_pairs(path, tokenizer, max_seq_length=64),
        encode_pairs(PAIRS, tokenizer, max_seq_length=64),
        strict=True,
    ):
        assert np.array_equal(a.input_ids, b.input_ids)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("text", "a str, not a dict"),
        ({"prompt": "a", "chosen": "b"}, "no rejected"),
        ({"chosen": "b", "rejected": "c"}, "no prompt"),
        ({"chosen": [USER, GOOD], "rejected": [GOOD, USER]}, "different messages"),
        ({"chosen": [USER, GOOD], "rejected": [USER]}, "the beginning of the other"),
        ({"prompt": "a", "chosen": [GOOD], "rejected": [BAD]}, "prompt and chosen is a text"),
        ({"prompt": "a", "chosen": "b", "rejected": [BAD]}, "prompt and rejected is a text"),
        ({"prompt": "Who?", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "the prompts differ"),
        ({"prompt": [USER], "chosen": [USER, GOOD], "rejected": [BAD]}, "chosen repeats"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": None}, "no rejected"),
        ({"prompt": "a", "chosen": 3, "rejected": "c"}, "prompt and chosen is a text"),
        ({"prompt": [USER], "chosen": [{}], "rejected": [BAD]}, "chosen, message 1 has no role"),
        ({"prompt": "a", "chosen": "", "rejected": "c"}, "the chosen replies.*\n.*row 2"),
        ({"prompt": "a", "chosen": "b", "rejected": "c " * 99}, "the rejected replies.*\n.*row 2"),
    ],
)
def test_a_bad_pair_is_refused_with_its_number(tokenizer, row, message):
    with pytest.raises(ValueError, match=message) as refused:
        encode_pairs([PAIRS[0], row], tokenizer, max_seq_length=32)
    assert "row 2" in str(refused.value)


def test_errors_advise_only_what_preference_losses_take(tokenizer):
    row = {"prompt": "a", "chosen": "b " * 99, "rejected": "c"}
    with pytest.raises(ValueError, match=r"^data, the chosen replies: rows ") as refused:
        encode_pairs([row], tokenizer, max_seq_length=32)
    assert "raise max_seq_length" in str(refused.value)
    assert "too_long" not in str(refused.value) and "on_bad_row" not in str(refused.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "completion": "b"}, "no label"),
        ({"prompt": "a", "completion": "b", "label": 2}, "label is 2"),
        ({"prompt": "a", "completion": "b", "label": "yes"}, "label is 'yes'"),
        ({"prompt": "a", "completion": "b", "label": None}, "no label"),
        ({"prompt": "a", "completion": "b", "label": 1.0}, "label is 1.0"),
        ({"prompt": "a", "completion": [GOOD], "label": True}, "prompt and completion is a text"),
    ],
)
def test_a_bad_labelled_row_is_refused_with_its_number(tokenizer, row, message):
    with pytest.raises(ValueError, match=f"row 2: .*{message}"):
        encode_labelled([LABELLED[0], row], tokenizer, max_seq_length=32)


def test_no_rows_are_refused(tokenizer):
    for encode in (encode_pairs, encode_labelled):
        with pytest.raises(ValueError, match="holds no rows"):
            encode([], tokenizer, max_seq_length=32)


def test_bad_rows_are_listed_at_once(tokenizer):
    rows = [{"chosen": "a"}, *PAIRS, {"rejected": "b"}]
    with pytest.raises(ValueError, match=r"row 1: no rejected(.|\n)*row 9: no chosen"):
        encode_pairs(rows, tokenizer, max_seq_length=64)
    long = [{"prompt": "a", "chosen": "b " * 99, "rejected": "c"}]
    long += [{"prompt": "a", "chosen": "b", "rejected": "c " * 99}]
    both = r"the chosen replies(.|\n)*row 1(.|\n)*the rejected replies(.|\n)*row 2"
    with pytest.raises(ValueError, match=both):
        encode_pairs(long, tokenizer, max_seq_length=64)


def test_one_labelled_row_is_refused(tokenizer):
    with pytest.raises(ValueError, match="1 row with a label"):
        encode_labelled(LABELLED[:1], tokenizer, max_seq_length=64)


def test_weights_are_refused(tokenizer, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(PAIRS[0]) + "\n")
    with pytest.raises(ValueError, match="weights"):
        encode_pairs({path: 2.0}, tokenizer, max_seq_length=64)
