"""encode_rows(): which tokens of a row are trained."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from fastlora.data.encoding import encode_rows
from fastlora.ops.loss.linear_cross_entropy import IGNORE as IGNORED
from fastlora.text.tokenizer import Tokenizer
from oracles.data_rows import CHAT
from oracles.tokenizer_folders import CHATML, CHATML_MARKED, MISTRAL, THINKING, llama2, llama3, qwen

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
def test_with_a_prompt_in_messages_only_the_completion_is_trained(tokenizers, name):
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


def test_alpaca_rows_use_alpacas_prompt_without_a_chat_template(tokenizers):
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


def test_alpaca_rows_become_chats_with_a_chat_template(tokenizers):
    row = {"instruction": "Add.", "input": "1 + 2", "output": "3"}
    chat = [
        {"role": "user", "content": "Add.\n\n1 + 2"},
        {"role": "assistant", "content": "3"},
    ]
    ours, same = encode_rows([row, {"messages": chat}], tokenizers["llama3"], max_seq_length=512)
    assert ours.input_ids.tolist() == same.input_ids.tolist()
    assert ours.labels.tolist() == same.labels.tolist()


@pytest.mark.parametrize("name", ["byte level", "sentencepiece"])
def test_text_is_trained_in_full_between_bos_and_one_eos(tokenizers, name):
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
    with pytest.raises(ValueError, match="'responses' or 'all'"):
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
