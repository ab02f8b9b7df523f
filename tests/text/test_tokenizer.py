"""Tokenizer equals transformers' AutoTokenizer, on folders in the style of real ones."""

import dataclasses
import os

import jinja2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from fastlora.errors import CheckpointError
from fastlora.text import chat_template
from fastlora.text.chat_template import ChatTemplate, render_replies
from fastlora.text.tokenizer import Tokenizer
from oracles.tokenizer_folders import CHATML_MARKED, CORPUS, FOLDERS, MISTRAL, qwen, write_json

# ── templates in the style of the families' own ──

CHATS = [
    [{"role": "user", "content": "What is a rank?"}],
    [
        {"role": "user", "content": "  What is 12 + 34?\n"},
        {"role": "assistant", "content": "46, I'd say.", "tool_calls": None},
        {"role": "user", "content": "Sure? <s> ünïcödé 🙂"},
        {"role": "assistant", "content": "Yes.\n\nQuite."},
    ],
    [
        {"role": "system", "content": "Talk like <|im_end|> a tokenizer."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "<think>hm</think>\n\nHi", "reasoning": "as usual"},
    ],
]

# ── folders ──

TEXTS = [
    "",
    " ",
    "The rank of a matrix.",
    "  two  spaces , and a tab\t! n't 's ",
    "\n\n\nx\r\n y",
    "naïve café, e\u0301 é, 日本語, 🙂, \u200b, \x00",
    "<s>the</s> <|im_start|>matrix<|im_end|> <|eot_id|>x <pad>  y<|extra|>",
    "<image><one> <two><eos> rank rank<think></think> <tool_call>",
    "1234567 + 89 = don't they've WE'LL",
    "▁▁ already ▁",
]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Folder name -> (fastlora's tokenizer, transformers' tokenizer), of the same folder."""
    made = {name: make(tmp_path_factory.mktemp("tokenizer")) for name, make in FOLDERS.items()}
    return {
        n: (Tokenizer.from_folder(f), AutoTokenizer.from_pretrained(f)) for n, f in made.items()
    }


def assert_same_text(ours: Tokenizer, theirs, text: str) -> None:
    for special in (True, False):
        ids = theirs.encode(text, add_special_tokens=special)
        assert ours.encode(text, add_special_tokens=special) == ids
        for skip in (True, False):
            expected = theirs.decode(ids, skip_special_tokens=skip)
            assert ours.decode(ids, skip_special_tokens=skip) == expected


def assert_same_chat(ours: Tokenizer, theirs, chat: list[dict], name: str | None = None) -> None:
    for prompt in (False, True):
        options = {"add_generation_prompt": prompt, "chat_template": name}
        try:
            text = theirs.apply_chat_template(chat, tokenize=False, **options)
        except jinja2.TemplateError:
            with pytest.raises(ValueError, match="does not render these messages"):
                ours.render_chat(chat, **options)
            continue
        assert ours.render_chat(chat, **options) == text
        assert ours.apply_chat_template(chat, tokenize=False, **options) == text
        ids = theirs.apply_chat_template(chat, return_dict=False, **options)
        assert ours.apply_chat_template(chat, **options) == ids


@pytest.mark.parametrize("name", FOLDERS)
def test_ids_and_texts_equal_transformers(pairs, name):
    for text in TEXTS + CORPUS[:3]:
        assert_same_text(*pairs[name], text)


@pytest.mark.parametrize("name", FOLDERS)
def test_tokens_and_sizes_equal_transformers(pairs, name):
    ours, theirs = pairs[name]
    assert (len(ours), ours.vocab_size) == (len(theirs), theirs.vocab_size)
    assert (ours.bos_token, ours.eos_token) == (theirs.bos_token, theirs.eos_token)
    assert ours.bos_token_id == theirs.bos_token_id
    assert dict(ours.special_tokens) == theirs.special_tokens_map
    assert ours.backend.get_vocab() == theirs.get_vocab()
    if theirs.eos_token_id is not None:
        assert ours.eos_token_ids[0] == theirs.eos_token_id
    if theirs.pad_token_id is not None:
        assert ours.pad_token_id == theirs.pad_token_id


pieces = st.one_of(
    st.text(max_size=8),
    st.sampled_from(["<s>", "</s>", "<|im_start|>", "<|eot_id|>", "<pad>", " ", "\n", "the", "'s"]),
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(text=st.lists(pieces, max_size=6).map("".join))
def test_ids_of_any_text_equal_transformers(pairs, text):
    for ours, theirs in pairs.values():
        assert_same_text(ours, theirs, text)


@pytest.mark.parametrize("name", [n for n in FOLDERS if "scattered" not in n])
def test_rendered_chats_equal_transformers(pairs, name):
    for chat in CHATS:
        assert_same_chat(*pairs[name], chat)


def test_a_template_is_chosen_by_name(pairs):
    ours, theirs = pairs["smollm2"]
    for chat in CHATS:
        assert_same_chat(ours, theirs, chat, "marked")
    with pytest.raises(ValueError, match=r"'rag'.*\['default', 'marked'\]"):
        ours.render_chat(CHATS[0], chat_template="rag")


def test_jinja_files_overrule_the_template_in_the_config(tmp_path):
    folder = qwen(tmp_path)
    (folder / "chat_template.jinja").write_bytes(MISTRAL.replace("\n", "\r\n").encode())
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "marked.jinja").write_text(CHATML_MARKED)
    ours, theirs = Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)
    assert set(ours.chat_templates) == {"default", "marked"}
    assert_same_chat(ours, theirs, CHATS[0])
    assert_same_chat(ours, theirs, CHATS[1], "marked")


def test_generation_blocks_give_the_spans_of_the_replies(pairs):
    ours, _ = pairs["smollm2"]
    text, spans = ours.render_replies(CHATS[1], chat_template="marked")
    assert text == ours.render_chat(CHATS[1], chat_template="marked")
    assert [text[a:b] for a, b in spans] == ["46, I'd say.<|im_end|>", "Yes.\n\nQuite.<|im_end|>"]
    assert ours.render_replies(CHATS[1]) is None


BLOCK = "{% generation %}{{ m.content }}{% endgeneration %}"


@pytest.mark.parametrize(
    "around",
    [
        "{% filter upper %}BLOCK{% endfilter %}",
        "{% set s %}BLOCK{% endset %}{{ s | upper }}",
        "{% macro f() %}BLOCK{% endmacro %}{{ f() | upper }}",
        "{% macro f() %}{{ caller() | upper }}{% endmacro %}{% call f() %}BLOCK{% endcall %}",
    ],
)
def test_a_generation_block_that_is_changed_afterwards_is_refused(around):
    loop = "{% for m in messages %}AROUND{% endfor %}".replace("AROUND", around)
    template = ChatTemplate(loop.replace("BLOCK", BLOCK), "a.jinja")
    with pytest.raises(ValueError, match="is changed afterwards"):
        render_replies(template, CHATS[1], {})


def test_a_generation_block_in_a_recursive_loop_that_is_changed_afterwards_is_refused():
    text = "{% for m in messages recursive %}BLOCK{{ loop(m.inner or []) | upper }}{% endfor %}"
    template = ChatTemplate(text.replace("BLOCK", BLOCK), "a.jinja")
    inner = {"role": "assistant", "content": "yes"}
    with pytest.raises(ValueError, match="is changed afterwards"):
        render_replies(template, [{"role": "user", "content": "a", "inner": [inner]}], {})
    assert render_replies(template, [inner], {}) == ("yes", [(0, 3)])


def test_marks_in_a_users_text_do_not_pass_for_a_generation_block():
    template = ChatTemplate("{% for m in messages %}" + BLOCK + "{% endfor %}", "a.jinja")
    content = "".join(chat_template._MARKS)
    with pytest.raises(ValueError, match="is changed afterwards"):
        render_replies(template, [{"role": "user", "content": content}], {})


@pytest.mark.parametrize("name", FOLDERS)
def test_offsets_cover_the_text_without_a_gap(pairs, name):
    ours, _ = pairs[name]
    for text in CORPUS[:3]:
        ids, spans = ours.encode_with_offsets(text)
        assert ids == ours.encode(text, add_special_tokens=False)
        starts, ends = zip(*spans, strict=True)
        assert starts[0] == 0 and ends[-1] == len(text) and list(ends) == sorted(ends)
        assert all(start <= end for start, end in zip(starts[1:], ends, strict=False))


def test_end_of_text_ids_come_from_three_files(pairs):
    ours, _ = pairs["llama3"]
    ends = [ours.backend.token_to_id(token) for token in ("<|eot_id|>", "<|end_of_text|>")]
    assert ours.eos_token_ids == tuple(ends)
    assert ours.pad_token_id == ends[0]
    assert pairs["word level"][0].eos_token_ids == ()
    nothing = dataclasses.replace(ours, special_tokens={}, eos_token_ids=())
    assert (nothing.bos_token_id, nothing.pad_token_id) == (None, 0)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_saved_folder_is_the_same_tokenizer(pairs, name, tmp_path):
    ours, theirs = pairs[name]
    (tmp_path / "additional_chat_templates").mkdir()
    stale = [tmp_path / "chat_template.jinja", tmp_path / "additional_chat_templates" / "a.jinja"]
    for path in stale:
        path.write_text("stale")
    ours.save_pretrained(tmp_path)  # and no config.json beside it, as in an adapter's folder
    again, reloaded = Tokenizer.from_folder(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert reloaded.get_vocab() == theirs.get_vocab()
    for text in TEXTS:
        assert again.encode(text) == reloaded.encode(text) == theirs.encode(text)
        ids = theirs.encode(text)
        assert again.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert reloaded.decode(ids) == theirs.decode(ids)
    for chat in CHATS if ours.chat_templates else []:
        assert_same_chat(again, theirs, chat)
        assert_same_chat(again, reloaded, chat)
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in left if ".tmp" in path.name or path.read_text() == "stale"]


@pytest.mark.parametrize("special", [False, True], ids=["plain", "special"])
@pytest.mark.parametrize("name", FOLDERS)
def test_added_tokens_equal_transformers(pairs, name, special, tmp_path):
    ours, new = pairs[name][0], ["<think>", " matrix", "日本"]
    before = {text: ours.encode(text) for text in TEXTS}
    grown = ours.with_tokens(new, special=special)
    theirs = AutoTokenizer.from_pretrained(FOLDERS[name](tmp_path / "again"))
    theirs.add_tokens(new, special_tokens=special)
    grown.save_pretrained(tmp_path / "saved")
    reloaded = AutoTokenizer.from_pretrained(tmp_path / "saved")
    again = Tokenizer.from_folder(tmp_path / "saved", config_folder=tmp_path / "again")
    for text in [*TEXTS, "a<think>b matrix 日本語<think>"]:
        ids = theirs.encode(text)
        assert grown.encode(text) == again.encode(text) == reloaded.encode(text) == ids
        plain = theirs.decode(ids, skip_special_tokens=True)
        assert grown.decode(ids) == again.decode(ids) == plain
    assert {text: ours.encode(text) for text in TEXTS} == before
    assert len(grown) == len(theirs)


def test_a_failed_write_leaves_the_old_file(pairs, tmp_path, monkeypatch):
    ours, _ = pairs["qwen3"]
    (tmp_path / "tokenizer.json").write_text("old")

    def no_space(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        ours.save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]
    assert (tmp_path / "tokenizer.json").read_text() == "old"


def test_a_folder_without_tokenizer_json_has_no_tokenizer(tmp_path):
    assert Tokenizer.from_folder(tmp_path) is None


def test_an_adapter_folder_takes_its_model_configuration_from_elsewhere(tmp_path):
    base = qwen(tmp_path / "base", model_type="qwen2", tokenizer_class="PreTrainedTokenizerFast")
    write_json(base / "generation_config.json", {"eos_token_id": [7, 8]})
    adapter = qwen(tmp_path / "adapter", tokenizer_class="PreTrainedTokenizerFast")
    (adapter / "config.json").unlink()
    ours, theirs = Tokenizer.from_folder(adapter, config_folder=base), Tokenizer.from_folder(base)
    assert ours.eos_token_ids == theirs.eos_token_ids
    assert ours.eos_token_ids[1:] == (7, 8)
    assert all(ours.encode(text) == theirs.encode(text) for text in TEXTS)


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{% set ns = namespace() %}{% set ns.__init__ = 1 %}",
        "{% set ns = namespace(__class__=1) %}",
        "{{ dict.__base__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ 'x'.format_map({'x': 1}).__class__() }}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
    ],
)
def test_a_template_that_tries_something_unsafe_is_refused(tmp_path, attack):
    ours = Tokenizer.from_folder(qwen(tmp_path, template=attack))
    with pytest.raises(ValueError, match=r"tokenizer_config\.json \(default\)"):
        ours.render_chat(CHATS[0])


def test_rendering_does_not_change_the_messages(pairs):
    chat = [dict(message) for message in CHATS[2]]
    pairs["qwen3, thinking"][0].render_chat(chat)
    assert chat == CHATS[2]


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ([], "at least one message"),
        ("What?", "list of dicts"),
        (["What?"], "list of dicts"),
        ([{"role": "user", "content": object()}], "JSON values only"),
    ],
)
def test_wrong_messages_are_refused(pairs, messages, why):
    check = Tokenizer.render_chat
    check = getattr(check, "__wrapped__", check)  # below the type checker of the test run
    with pytest.raises(ValueError, match=why):
        check(pairs["qwen3"][0], messages)


def test_a_tokenizer_without_a_template_names_the_cure(pairs):
    with pytest.raises(ValueError, match=r"no chat template.*chat_template\.jinja"):
        pairs["scattered"][0].render_chat(CHATS[0])


def test_all_unreadable_files_are_named_at_once(tmp_path):
    folder = qwen(tmp_path)
    (folder / "tokenizer_config.json").write_text('{"eos_token": ')
    (folder / "generation_config.json").write_text("[1]")
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError) as error:
        Tokenizer.from_folder(folder)
    for name in ("tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert f"{name}: " in str(error.value)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize(
    ("file", "content", "why"),
    [
        ("tokenizer.json", {"model": {"type": "BPE"}}, "tokenizers library"),
        ("tokenizer.json", {}, "tokenizers library"),
        ("tokenizer_config.json", {"eos_token": {"text": "x"}}, "eos_token: {'text': 'x'}"),
        ("tokenizer_config.json", {"extra_special_tokens": [3]}, "extra_special_tokens: 3"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"a": {}}}, "whole numbers"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"1": {}}}, "added_tokens_decoder, 1"),
        ("tokenizer_config.json", {"chat_template": [{"name": "a"}]}, "name and template"),
        ("tokenizer_config.json", {"chat_template": 7}, "name and template"),
        ("generation_config.json", {"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path, file, content, why):
    folder = qwen(tmp_path)
    write_json(folder / file, content)
    with pytest.raises(CheckpointError) as error:
        Tokenizer.from_folder(folder)
    assert why in str(error.value) and str(folder) in str(error.value)
