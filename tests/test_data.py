"""fastlora.data: what is trained, what is packed with what, and in which order."""

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizer import CHATML, CHATML_MARKED, MISTRAL, THINKING, llama2, llama3, qwen
from transformers import AutoTokenizer

from fastlora.data.batches import batches, count_batches, count_trained_tokens
from fastlora.data.encoding import encode_rows
from fastlora.data.examples import Example, Packed
from fastlora.data.packing import pack
from fastlora.data.rows import read_rows
from fastlora.errors import CheckpointError
from fastlora.ops.loss.linear_cross_entropy import IGNORE as IGNORED
from fastlora.text.tokenizer import Tokenizer

CHAT = [
    {"role": "user", "content": "What is 12 + 34?"},
    {"role": "assistant", "content": "46, I'd say."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes.\n\nQuite."},
]
MOVING = """{% for m in messages %}{% if loop.last %}{{ 'SYSTEM ' }}{% endif %}
{{- '[' + m.role + '] ' + m.content + eos_token }}{% endfor %}"""
SHOUTING = """{% for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' }}
{{- m.content | upper if m.role == 'assistant' and not loop.last else m.content }}
{{- '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    make = lambda write: Tokenizer.from_folder(write(tmp_path_factory.mktemp("data")))
    return {
        "llama3": make(llama3),
        "chatml": make(lambda f: qwen(f, CHATML)),
        "marked": make(lambda f: qwen(f, CHATML_MARKED)),
        "thinking": make(lambda f: qwen(f, THINKING)),
        "mistral": make(lambda f: llama2(f, chat_template=MISTRAL)),
        "moving": make(lambda f: qwen(f, MOVING)),
        "shouting": make(lambda f: qwen(f, SHOUTING)),
        "byte level": make(lambda f: llama3(f, template=None)),
        "sentencepiece": make(lambda f: llama2(f, chat_template=None)),
    }


def trained(tokenizer: Tokenizer, row: dict, **options) -> list[str]:
    """The stretches of text that a row trains, each as one string."""
    (example,) = encode_rows([row], tokenizer, max_seq_length=4096, **options)
    kept = example.labels != IGNORED
    assert (example.labels[kept] == example.input_ids[kept]).all()
    edges = np.flatnonzero(np.diff(kept.astype(int))) + 1
    stretches = np.split(np.arange(len(kept)), edges)
    texts = [example.input_ids[s].tolist() for s in stretches if kept[s[0]]]
    return [tokenizer.decode(ids, skip_special_tokens=False) for ids in texts]


# ── read_rows ──


def test_rows_come_from_jsonl_json_and_iterables_alike(tmp_path):
    rows = [
        {"messages": CHAT},
        {"prompt": "a", "completion": "b\u2028c", "id": 3},
        {"prompt": CHAT[:1], "completion": CHAT[1:2]},
        {"instruction": "a", "input": None, "output": "b", "text": "whole"},
        {"text": "straße"},
    ]
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "rows.jsonl").write_text("\ufeff" + lines + "\r\n", encoding="utf-8")
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    assert read_rows(tmp_path / "rows.jsonl") == rows
    assert read_rows(str(tmp_path / "rows.json")) == rows
    assert read_rows(iter(rows)) == rows


def test_every_bad_row_is_named_with_its_keys():
    bad = [
        {"conversations": [], "id": 1},
        "text",
        {"messages": []},
        {"messages": [{"content": "x"}]},
        {"prompt": "x", "completion": 3},
        {"prompt": CHAT, "completion": "x"},
        {"instruction": "x", "output": None},
        {"text": 7},
        {"messages": CHAT, "tools": [{}]},
    ]
    with pytest.raises(ValueError) as error:
        read_rows(iter([{"text": "fine"}, *bad]))  # of a list the tests' type hook tries one item
    for number, why in enumerate(
        [
            "keys ['conversations', 'id']",
            "a str, not a dict",
            "at least one message",
            "message 1 has no role",
            "completion is a int",
            "completion must be a list",
            "output is a NoneType",
            "text is a int",
            "tools",
        ],
        start=2,
    ):
        assert f"row {number}: " in str(error.value) and why in str(error.value)
    assert "row 1:" not in str(error.value)


def test_a_file_that_is_not_there_or_not_json_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no\.jsonl"):
        read_rows(tmp_path / "no.jsonl")
    with pytest.raises(ValueError, match=r"\.jsonl or \.json"):
        read_rows(tmp_path / "rows.csv")
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": \n{"text": "b"}\nnonsense\n')
    with pytest.raises(CheckpointError, match=r"(?s)rows\.jsonl.*line 3: .*line 5: "):
        read_rows(path)
    path.write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(CheckpointError, match="UTF-8"):
        read_rows(path)
    (tmp_path / "rows.json").write_text('{"text": "a"}')
    with pytest.raises(CheckpointError, match="a list of objects"):
        read_rows(tmp_path / "rows.json")
    with pytest.raises(ValueError, match="no rows"):
        read_rows([])


# ── encode_rows ──


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("llama3", "<|eot_id|>"),
        ("chatml", "<|im_end|>"),
        ("marked", "<|im_end|>"),
        ("mistral", "</s>"),
    ],
)
def test_replies_and_their_ends_are_trained_and_nothing_else(tokenizers, name, end):
    expected = ["46, I'd say." + end, "Yes.\n\nQuite." + end]
    assert trained(tokenizers[name], {"messages": CHAT}) == expected


def test_an_earlier_reply_that_the_template_shortens_is_still_found(tokenizers):
    chat = [*CHAT[:1], {"role": "assistant", "content": "<think>hm</think>\n\n46"}, *CHAT[2:]]
    texts = trained(tokenizers["thinking"], {"messages": chat})
    assert texts == ["46<|im_end|>", "<think>\n\n</think>\n\nYes.\n\nQuite.<|im_end|>"]


@pytest.mark.parametrize(("name", "why"), [("moving", "differently"), ("shouting", "changes")])
def test_a_template_that_hides_the_replies_is_refused(tokenizers, name, why):
    rows = [{"text": "a"}, {"messages": CHAT}]
    with pytest.raises(ValueError, match=rf"(?s)row 2: .*{why}.*train_on=\"all\".*generation"):
        encode_rows(rows, tokenizers[name], max_seq_length=512)
    text = tokenizers[name].render_chat(CHAT)
    (whole,) = trained(tokenizers[name], {"messages": CHAT}, train_on="all")
    assert text.endswith(whole)


words = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=12)
printable = words.map(str.strip).filter(bool)


@settings(max_examples=40, deadline=None)
@given(texts=st.lists(printable, min_size=2, max_size=6))
def test_response_masks_equal_transformers(tokenizers_pair, texts):
    ours, theirs = tokenizers_pair
    roles = ["user", "assistant"] * 3
    chat = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    out = theirs.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    (example,) = encode_rows([{"messages": chat}], ours, max_seq_length=4096)
    assert example.input_ids.tolist() == out["input_ids"]
    assert (example.labels != IGNORED).astype(int).tolist() == out["assistant_masks"]


@pytest.fixture(scope="module", params=["byte level", "sentencepiece"])
def tokenizers_pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    if request.param == "byte level":
        qwen(folder, CHATML_MARKED)
    else:
        llama2(folder, chat_template=CHATML_MARKED.replace("<|im_end|>", "</s>"))
    return Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)


@settings(max_examples=40, deadline=None)
@given(texts=st.lists(printable, min_size=2, max_size=6))
def test_masks_found_by_prefixes_equal_masks_found_by_blocks(tokenizers, texts):
    roles = ["user", "assistant"] * 3
    chat = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    plain = [{"role": "system", "content": "Be brief."}, *chat]  # CHATML would put it there itself
    row = [{"messages": plain}]
    (blocks,) = encode_rows(row, tokenizers["marked"], max_seq_length=4096)
    (prefixes,) = encode_rows(row, tokenizers["chatml"], max_seq_length=4096)
    assert blocks.input_ids.tolist() == prefixes.input_ids.tolist()
    assert blocks.labels.tolist() == prefixes.labels.tolist()


@pytest.mark.parametrize("name", ["chatml", "marked", "mistral"])
def test_of_a_prompt_in_messages_only_the_completion_is_trained(tokenizers, name):
    row = {"prompt": CHAT[:3], "completion": CHAT[3:]}
    (text,) = trained(tokenizers[name], row)
    assert text.startswith("Yes.\n\nQuite.") and "46" not in text


@pytest.mark.parametrize("name", ["byte level", "sentencepiece", "chatml"])
@pytest.mark.parametrize("prompt", ["What is a rank?", "Rank: ", "a\n", "", "The ra"])
@pytest.mark.parametrize("completion", ["nk of it", " A number.", "\n\nA", "日本語 🙂"])
def test_a_completion_follows_the_prompt_that_generation_sees(tokenizers, name, prompt, completion):
    tokenizer = tokenizers[name]
    row = {"prompt": prompt, "completion": completion}
    (example,) = encode_rows([row], tokenizer, max_seq_length=512)
    ids, seen = example.input_ids.tolist(), tokenizer.encode(prompt)
    assert ids[: len(seen)] == seen
    assert ids[-1] == tokenizer.eos_token_ids[0]
    assert ids.count(tokenizer.bos_token_id) == (tokenizer.bos_token_id is not None)
    start = max(len(seen), 1)  # without a prompt and a BOS, nothing predicts the first token
    assert (example.labels[:start] == IGNORED).all()
    assert example.labels[start:].tolist() == ids[start:]
    assert tokenizer.decode(ids) == tokenizer.decode(tokenizer.encode(prompt + completion))
    (example,) = encode_rows([row], tokenizer, max_seq_length=512, train_on="all")
    assert example.labels.tolist() == [IGNORED, *ids[1:]]


def test_alpaca_rows_use_alpacas_prompt_where_there_is_no_template(tokenizers):
    row = {"instruction": "Add.", "input": "1 + 2", "output": "3"}
    tokenizer = tokenizers["byte level"]
    (example,) = encode_rows([row], tokenizer, max_seq_length=512)
    text = tokenizer.decode(example.input_ids.tolist())
    assert text.startswith("Below is an instruction that describes a task, paired with an input")
    assert text.endswith("### Instruction:\nAdd.\n\n### Input:\n1 + 2\n\n### Response:3")
    (example,) = encode_rows([{**row, "input": ""}], tokenizer, max_seq_length=512)
    text = tokenizer.decode(example.input_ids.tolist())
    assert text.endswith("request.\n\n### Instruction:\nAdd.\n\n### Response:3")
    assert trained(tokenizer, row) == ["3<|eot_id|>"]


def test_alpaca_rows_are_chats_where_there_is_a_template(tokenizers):
    row = {"instruction": "Add.", "input": "1 + 2", "output": "3"}
    chat = [
        {"role": "user", "content": "Add.\n\n1 + 2"},
        {"role": "assistant", "content": "3"},
    ]
    ours, same = encode_rows([row, {"messages": chat}], tokenizers["llama3"], max_seq_length=512)
    assert ours.input_ids.tolist() == same.input_ids.tolist()
    assert ours.labels.tolist() == same.labels.tolist()


@pytest.mark.parametrize("name", ["byte level", "sentencepiece"])
def test_text_is_trained_whole_between_bos_and_one_eos(tokenizers, name):
    tokenizer = tokenizers[name]
    rows = [{"text": "The rank."}, {"text": "The rank." + tokenizer.eos_token}]
    for example in encode_rows(rows, tokenizer, max_seq_length=64):
        ids = example.input_ids.tolist()
        assert ids == [*tokenizer.encode("The rank."), tokenizer.eos_token_ids[0]]
        assert example.labels.tolist() == [IGNORED, *ids[1:]]


def test_rows_that_are_too_long_or_train_nothing_are_all_named(tokenizers):
    rows = [
        {"text": "short"},
        {"text": "The rank of a matrix " * 20},
        {"text": ""},
        {"messages": CHAT[:1]},
        {"prompt": "x", "completion": ""},
        {"messages": [{"role": "user", "content": "x"}, {"role": "clown", "content": "y"}]},
    ]
    with pytest.raises(ValueError) as error:
        encode_rows(rows, tokenizers["llama3"], max_seq_length=16, split_text=False)
    length = len(tokenizers["llama3"].encode(rows[1]["text"])) + 1
    assert f"row 2: {length} tokens, {length - 16} more than max_seq_length" in str(error.value)
    for number in (3, 5, 6):
        assert f"row {number}: " in str(error.value)
    assert "row 1:" not in str(error.value) and "max_seq_length=16" in str(error.value)
    with pytest.raises(ValueError, match='"responses" or "all"'):
        wrong = getattr(encode_rows, "__wrapped__", encode_rows)
        wrong(rows, tokenizers["llama3"], train_on="prompts", max_seq_length=16)


@pytest.mark.parametrize("length", [2, 3, 7, 64])
def test_split_text_trains_every_token_but_the_first_once(tokenizers, length):
    tokenizer = tokenizers["llama3"]
    text = "The rank of a matrix is the number of independent rows."
    (whole,) = encode_rows([{"text": text}], tokenizer, max_seq_length=512)
    parts = encode_rows([{"text": text}], tokenizer, max_seq_length=length, split_text=True)
    targets = [part.labels[1:] for part in parts]
    assert np.concatenate(targets).tolist() == whole.input_ids[1:].tolist()
    assert all(part.labels[0] == IGNORED for part in parts)
    assert all(len(part.input_ids) == length for part in parts[:-1])
    assert all(a.input_ids[-1] == b.input_ids[0] for a, b in itertools.pairwise(parts))


# ── pack and batches ──


def documents(lengths: list[int]) -> list[Example]:
    """Examples whose tokens are all different, and trained but for the first."""
    ends = np.cumsum([0, *lengths])
    ids = [np.arange(a, b) + 1000 for a, b in itertools.pairwise(ends)]
    return [Example(i, np.where(np.arange(len(i)) > 0, i, IGNORED)) for i in ids]


lengths = st.lists(st.integers(1, 16), min_size=1, max_size=40)


@given(lengths)
def test_packing_keeps_every_document_whole_and_apart(lengths):
    examples = documents(lengths)
    packed = pack(examples, 16, pad_token_id=7)
    found = []
    for sequence in packed:
        assert len(sequence.input_ids) == len(sequence.labels) == len(sequence.segment_ids) == 16
        last = sequence.segment_ids.max()
        real = sequence.segment_ids > 0
        assert sequence.segment_ids[real].tolist() == sorted(sequence.segment_ids[real].tolist())
        assert not real.any() or np.flatnonzero(real)[-1] == real.sum() - 1  # padding is last
        assert (sequence.labels[~real] == IGNORED).all() and (sequence.input_ids[~real] == 7).all()
        for segment in range(1, last + 1):
            at = sequence.segment_ids == segment
            assert sequence.labels[at][0] == IGNORED
            found.append((sequence.input_ids[at].tolist(), sequence.labels[at].tolist()))
    expected = [(e.input_ids.tolist(), e.labels.tolist()) for e in examples]
    assert sorted(found) == sorted(expected)
    least = -(-sum(lengths) // 16)
    assert len(packed) <= 11 / 9 * least * 1.5 + 1


@given(lengths)
def test_packing_is_a_function_of_its_input(lengths):
    as_lists = lambda packed: [p.input_ids.tolist() for p in packed]
    assert as_lists(pack(documents(lengths), 16)) == as_lists(pack(documents(lengths), 16))


def test_packing_fills_what_fits_exactly():
    packed = pack(documents([5, 11, 9, 7, 16, 8, 4, 4]), 16)
    assert len(packed) == 4 and all((p.segment_ids > 0).all() for p in packed)


def test_the_first_token_of_a_packed_document_is_never_a_target():
    example = Example(np.arange(4), np.arange(4))
    (packed,) = pack([example, example], 8)
    assert packed.labels.tolist() == [IGNORED, 1, 2, 3, IGNORED, 1, 2, 3]
    assert example.labels.tolist() == [0, 1, 2, 3]


def test_documents_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="example 2: 17 tokens"):
        pack(documents([3, 17]), 16)


def as_lists(stream) -> list[dict]:
    return [{name: tensor.tolist() for name, tensor in batch.items()} for batch in stream]


@given(lengths, st.integers(1, 5), st.integers(0, 3), st.integers(0, 2))
def test_batches_hold_every_example_once_in_an_order_of_seed_and_epoch(lengths, size, seed, epoch):
    examples = documents(lengths)
    whole = list(batches(examples, size, seed=seed, epoch=epoch, pad_token_id=3))
    assert len(whole) == count_batches(examples, size) == -(-len(examples) // size)
    rows = []
    for batch in whole:
        assert set(batch) == {"input_ids", "labels", "attention_mask"}
        assert all(tensor.dtype == torch.int64 for tensor in batch.values())
        assert batch["input_ids"].shape[1] % 8 == 0
        assert (batch["input_ids"][batch["attention_mask"] == 0] == 3).all()
        assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            assert mask.tolist() == sorted(mask.tolist(), reverse=True)  # padding on the right
            rows.append(ids[mask == 1].tolist())
    assert sorted(rows) == sorted(e.input_ids.tolist() for e in examples)
    assert as_lists(batches(examples, size, seed=seed, epoch=epoch, pad_token_id=3)) == as_lists(
        whole
    )
    trained = sum(len(e.input_ids) - 1 for e in examples)
    assert sum(map(count_trained_tokens, whole)) == trained


@given(lengths, st.integers(1, 5), st.integers(0, 9))
def test_an_epoch_restarts_at_any_batch(lengths, size, start):
    examples = documents(lengths)
    whole = as_lists(batches(examples, size, seed=1, epoch=2))
    assert as_lists(batches(examples, size, seed=1, epoch=2, start=start)) == whole[start:]


def test_epochs_and_seeds_differ_and_no_seed_keeps_the_order():
    examples = documents([1] * 50)
    order = lambda **how: next(batches(examples, 50, **how))["input_ids"][:, 0].tolist()
    orders = [order(seed=s, epoch=e) for s in (0, 1) for e in (0, 1)]
    assert len({tuple(o) for o in orders}) == 4
    assert order(seed=None, epoch=3) == [e.input_ids[0] for e in examples]


def test_batches_leave_every_global_generator_alone():
    before = (torch.get_rng_state(), np.random.get_state()[1])
    list(batches(documents([3] * 9), 2, seed=5))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()


def test_packed_batches_have_one_shape():
    packed = pack(documents([3, 9, 16, 2, 2, 11]), 16)
    assert all(isinstance(sequence, Packed) for sequence in packed)
    for batch in batches(packed, 1, seed=0):
        assert {name: tensor.shape for name, tensor in batch.items()} == dict.fromkeys(
            ("input_ids", "labels", "segment_ids"), (1, 16)
        )


def test_padding_stays_within_the_longest_allowed_sequence():
    (batch,) = batches(documents([9, 10]), 2, seed=None, max_seq_length=11)
    assert batch["input_ids"].shape == (2, 11)
    (batch,) = batches(documents([9, 10]), 2, seed=None, max_seq_length=64)
    assert batch["input_ids"].shape == (2, 16)
    with pytest.raises(ValueError, match="batch_size=0"):
        next(batches(documents([1]), 0, seed=None))
