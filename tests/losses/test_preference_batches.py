"""Batches of pairs and of labelled replies: their rows, order and padding."""

import torch

from fastlora.data.encoding import encode_rows
from fastlora.losses import encode_labelled, encode_pairs, preference_batches
from oracles.preference_data import LABELLED, PAIRS


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


def test_a_batch_of_one_labelled_row_has_a_reply_to_another_prompt(tokenizer):
    """The next row of the epoch, also across batches and at the end."""
    rows = encode_labelled(LABELLED[:3], tokenizer, max_seq_length=64)
    (whole,) = preference_batches(rows, 3, seed=4)
    alone = [*preference_batches(rows, 1, seed=4)]
    assert alone[1:] and len(alone) == 3
    for i, batch in enumerate(alone):
        length = batch["KL_input_ids"].shape[1]
        assert torch.equal(batch["KL_input_ids"][0], whole["KL_input_ids"][i, :length])
    (last,) = preference_batches(rows, 1, seed=4, start=2)
    assert torch.equal(last["KL_input_ids"], alone[2]["KL_input_ids"])


def test_a_reply_to_another_prompt_is_cut_at_max_seq_length(tokenizer):
    rows = encode_labelled(LABELLED, tokenizer, max_seq_length=64)
    longest = max(len(row.input_ids) for row in rows)
    for batch in preference_batches(rows, 4, seed=None, max_seq_length=longest):
        assert batch["KL_input_ids"].shape[1] <= longest
        assert batch["input_ids"].dtype == batch["label"].dtype == torch.int64
