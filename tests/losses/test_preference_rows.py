"""Preference rows: how they are read, encoded and batched, and which are refused."""

import json

import numpy as np
import pytest
import torch

from fastlora.data.encoding import encode_rows
from fastlora.losses import encode_labelled, encode_pairs, preference_batches
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


def test_rows_of_a_file_are_those_of_a_list(tokenizer, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    for a, b in zip(
        encode_pairs(path, tokenizer, max_seq_length=64),
        encode_pairs(PAIRS, tokenizer, max_seq_length=64),
        strict=True,
    ):
        assert np.array_equal(a.input_ids, b.input_ids)


def test_a_batch_of_pairs_has_chosen_replies_first(tokenizer):
    pairs = encode_pairs(PAIRS, tokenizer, max_seq_length=64)
    first, *_, last = preference_batches(pairs, 3, seed=None)
    assert len(first["input_ids"]) == 6 and len(last["input_ids"]) == 2
    for i, pair in enumerate(pairs[:3]):
        for row, ids in ((i, pair.chosen_ids), (i + 3, pair.rejected_ids)):
            real = first["attention_mask"][row].bool()
            assert first["input_ids"][row][real].tolist() == ids.tolist()
            assert (first["labels"][row][~real] == -100).all()


def test_the_order_depends_on_seed_and_epoch_and_start_leaves_batches_out(tokenizer):
    pairs = encode_pairs(PAIRS, tokenizer, max_seq_length=64)
    order = lambda **s: [b["input_ids"].tolist() for b in preference_batches(pairs, 2, **s)]
    assert order(seed=1, epoch=2) == order(seed=1, epoch=2)
    assert order(seed=1, epoch=2) != order(seed=1, epoch=3)
    assert order(seed=1, start=2) == order(seed=1)[2:]


def test_a_batch_of_labelled_rows_has_replies_to_other_prompts(tokenizer):
    rows = encode_labelled(LABELLED[:3], tokenizer, max_seq_length=64)
    (batch,) = preference_batches(rows, 8, seed=None)
    assert batch["label"].tolist() == [int(row["label"]) for row in LABELLED[:3]]
    for i in range(3):
        mixed = {"prompt": LABELLED[i]["prompt"], "completion": LABELLED[(i + 1) % 3]["completion"]}
        (example,) = encode_rows([mixed], tokenizer, max_seq_length=64)
        real = batch["KL_attention_mask"][i].bool()
        assert batch["KL_input_ids"][i][real].tolist() == example.input_ids.tolist()
        assert batch["KL_labels"][i][real].tolist() == example.labels.tolist()


def test_a_reply_to_another_prompt_is_cut_at_max_seq_length(tokenizer):
    rows = encode_labelled(LABELLED, tokenizer, max_seq_length=64)
    longest = max(len(row.input_ids) for row in rows)
    for batch in preference_batches(rows, 4, seed=None, max_seq_length=longest):
        assert batch["KL_input_ids"].shape[1] <= longest
        assert batch["input_ids"].dtype == batch["label"].dtype == torch.int64


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("text", "a str, not a dict"),
        ({"prompt": "a", "chosen": "b"}, "no rejected"),
        ({"chosen": "b", "rejected": "c"}, "no prompt"),
        ({"chosen": [USER, GOOD], "rejected": [GOOD, USER]}, "different messages"),
        ({"chosen": [USER, GOOD], "rejected": [USER]}, "the beginning of the other"),
        ({"prompt": "a", "chosen": [GOOD], "rejected": [BAD]}, "a text"),
        ({"prompt": [USER], "chosen": [{}], "rejected": [BAD]}, "chosen, message 1 has no role"),
        ({"prompt": "a", "chosen": "", "rejected": "c"}, "the chosen replies.*\n.*row 2"),
        ({"prompt": "a", "chosen": "b", "rejected": "c " * 99}, "the rejected replies.*\n.*row 2"),
    ],
)
def test_a_bad_pair_is_refused_with_its_number(tokenizer, row, message):
    with pytest.raises(ValueError, match=message) as refused:
        encode_pairs([PAIRS[0], row], tokenizer, max_seq_length=32)
    assert "row 2" in str(refused.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "completion": "b"}, "no label"),
        ({"prompt": "a", "completion": "b", "label": 2}, "label is 2"),
        ({"prompt": "a", "completion": "b", "label": "yes"}, "label is 'yes'"),
        ({"prompt": "a", "completion": [GOOD], "label": True}, "a text"),
    ],
)
def test_a_bad_labelled_row_is_refused_with_its_number(tokenizer, row, message):
    with pytest.raises(ValueError, match=f"row 2: .*{message}"):
        encode_labelled([LABELLED[0], row], tokenizer, max_seq_length=32)


def test_no_rows_are_refused(tokenizer):
    for encode in (encode_pairs, encode_labelled):
        with pytest.raises(ValueError, match="holds no rows"):
            encode([], tokenizer, max_seq_length=32)
