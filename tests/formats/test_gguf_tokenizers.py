"""Tokenizers in GGUF files: the same ids, or refused. Oracle: llama.cpp, in xllamacpp."""

import json
import re

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fastlora.errors import CheckpointError
from fastlora.formats.gguf.pre_tokenizers import pre_tokenizer_name
from fastlora.formats.gguf.verify import Engine
from fastlora.formats.gguf.vocabulary import portable
from fastlora.text.tokenizer import Tokenizer
from oracles.gguf_models import QWEN2_WORDS, model_of
from oracles.tokenizer_folders import (
    CHATML_MARKED,
    CORPUS,
    FOLDERS,
    LLAMA3_WORDS,
    byte_level,
    llama2,
    write_folder,
)

TEXTS = [
    *CORPUS[:3],
    "1 12 123 1234 12345 3.14 ½ ٣٤ 1st",
    "It's I'VE don'T 'string' '' \"quoted\" we'll",
    "a  b   c\n\n  d\t\te \r\n f   ",
    "Größe ἄλφα Ünïcode ДОМ дом ǅ 你好，世界 こんにちは กำลัง हिन्दी",
    "🙂👍🏽 … — “x” {[(<=>)]}; // ### !!! ~~~ a/b\\c x_y-z",
    " leading, trailing ",
]

_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CONTRACTIONS, _START = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"[^\r\n\p{L}\p{N}]?"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT4O = (
    rf"{_START}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_START}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}|{_REST}"
)
TEKKEN = rf"{_START}{_UPPER}*{_LOWER}+|{_START}{_UPPER}+{_LOWER}*|\p{{N}}|{_REST}"
QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def of_words(words: str | None, ignore_merges: bool = False, digits: bool = False):
    """Writes a folder whose tokenizer splits by a regular expression; None: by GPT-2's."""

    def write(folder):
        raw = byte_level("<s>", "</s>", plain=("<think>",), words=words)
        raw["model"]["ignore_merges"] = ignore_merges
        if digits:
            step = {"type": "Digits", "individual_digits": True}
            raw["pre_tokenizer"]["pretokenizers"].insert(0, step)
        return write_folder(folder, raw, {"bos_token": "<s>", "eos_token": "</s>"}, None)

    return write


WAYS = {
    "smaug-bpe": of_words(LLAMA3_WORDS),
    "llama-bpe": of_words(LLAMA3_WORDS, ignore_merges=True),
    "qwen2": of_words(QWEN2_WORDS),
    "qwen35": of_words(QWEN35),
    "gpt-4o": of_words(GPT4O),
    "tekken": of_words(TEKKEN, ignore_merges=True),
    "gpt-2": of_words(None),
    "smollm": of_words(None, digits=True),
}


@pytest.fixture
def export(tmp_path):
    """export(write): the tokenizer of a folder, and a tiny model's file with it."""

    def of(write):
        tokenizer = Tokenizer.from_folder(write(tmp_path / "tokenizer"))
        assert tokenizer is not None
        model = model_of("llama2", tmp_path / "base", len(tokenizer) + 3, num_hidden_layers=1)
        return tokenizer, model.save_gguf(tmp_path / "m.gguf", tokenizer, "f32")

    return of


@pytest.mark.parametrize("name", WAYS)
def test_every_way_to_split_a_text_gives_the_same_ids(name, export):
    tokenizer, report = export(WAYS[name])
    assert pre_tokenizer_name(tokenizer) == name
    with Engine(report.path) as engine:
        found = {text: engine.tokenize(text) for text in TEXTS}
    assert found == {text: tokenizer.encode(text) for text in TEXTS}


SAME = [name for name in FOLDERS if "llama3" in name or "qwen" in name]
SAME = [name for name in SAME if "splitting" not in name and "as it is" not in name]
SAME += ["smollm2", "mistral", "llama2, no prefix", "gemma"]


@pytest.mark.parametrize("name", SAME)
def test_added_tokens_and_special_ids_are_the_folders(name, export):
    tokenizer, report = export(FOLDERS[name])
    specials = "".join(t.content for t in tokenizer.backend.get_added_tokens_decoder().values())
    texts = [*TEXTS, f"a{specials}b", f"x {specials}y"]
    with Engine(report.path) as engine:
        found = {text: engine.tokenize(text) for text in texts}
    assert found == {text: tokenizer.encode(text) for text in texts}
    assert not report.notes


@pytest.mark.parametrize("name", ["llama2", "llama2, legacy"])
def test_notes_say_where_llama_cpp_puts_another_space(name, export):
    tokenizer, report = export(FOLDERS[name])
    with Engine(report.path) as engine:
        other = [t for t in (*TEXTS, "a</s>b") if engine.tokenize(t) != tokenizer.encode(t)]
    after_special = ["a</s>b"] if name == "llama2" else []
    assert other == [" leading, trailing ", *after_special]
    assert len(report.notes) == len(other)


REFUSED = {
    "llama3, splitting special tokens": "split_special_tokens",
    "qwen3, as it is": "no name for this pre-tokenizer",
    "word level": "only BPE",
}


@pytest.mark.parametrize("name", REFUSED)
def test_tokenizers_without_a_counterpart_are_refused(name, export):
    with pytest.raises(CheckpointError, match=REFUSED[name]):
        export(FOLDERS[name])


def test_pre_names_a_pre_tokenizer_for_one_that_llama_cpp_lacks(tmp_path):
    tokenizer = Tokenizer.from_folder(
        of_words(r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+")(tmp_path)
    )
    assert tokenizer is not None
    model = model_of("llama2", tmp_path / "base", len(tokenizer))
    report = model.save_gguf(tmp_path / "m.gguf", tokenizer, "f32", pre="gpt-2", verify=True)
    assert 0 < report.verification.equal_texts <= report.verification.texts == 3


def test_pre_is_refused_for_a_tokenizer_that_has_no_pre_tokenizer(tmp_path):
    tokenizer = Tokenizer.from_folder(llama2(tmp_path / "tokenizer"))
    assert tokenizer is not None
    model = model_of("llama2", tmp_path / "base", len(tokenizer))
    with pytest.raises(ValueError, match="pre='gpt-2' means nothing"):
        model.save_gguf(tmp_path / "m.gguf", tokenizer, pre="gpt-2")
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize("listed, message", [(True, "not side by side"), (False, "no merge of")])
def test_merges_that_are_no_order_of_tokens_are_refused(listed, message, tmp_path):
    folder = llama2(tmp_path / "tokenizer", config={"model_type": "mistral"})
    raw = json.loads((folder / "tokenizer.json").read_text())
    model = raw["model"]
    tokens = ("".join(m) for m in model["merges"])
    joined = next(t for t in tokens if len(t) > 2 and t[1:] not in model["vocab"])
    # A second way to make a token: listed far behind the first, or not at all.
    model["vocab"][joined[1:]] = len(model["vocab"])
    if listed:
        model["merges"].append([joined[0], joined[1:]])
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer is not None
    model = model_of("llama2", tmp_path / "base", len(tokenizer))
    with pytest.raises(CheckpointError, match=message):
        model.save_gguf(tmp_path / "m.gguf", tokenizer)


def test_merges_apply_in_the_order_of_their_ranks(export):
    """Texts of three pieces, of which the last two are joined before the first two."""
    tokenizer, report = export(FOLDERS["mistral"])
    merges = [tuple(m) for m in json.loads(tokenizer.backend.to_str())["model"]["merges"]]
    rank = {pair: i for i, pair in enumerate(merges)}
    texts = [
        "".join((x, *later)).replace("▁", " ").strip()
        for x, y in merges
        for later in merges
        if later[0] == y and rank[later] < rank[x, y]
    ]
    with Engine(report.path) as engine:
        found = {text: engine.tokenize(text) for text in texts}
    assert found == {text: tokenizer.encode(text) for text in texts}
    assert len(texts) > 20


@pytest.mark.parametrize(
    "template",
    [
        CHATML_MARKED,
        "a {% generation %} b {% endgeneration %} c",
        "a {%- generation -%} b {%- endgeneration -%} c",
        "a\n  {% generation %}\n b\n{%- endgeneration %}\n c",
    ],
)
def test_templates_without_generation_tags_render_the_same(template):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    tags = portable(template)
    assert "generation" in tags and "{% generation" not in tags
    plain = re.sub(r"{%(-?) generation", r"{%\1 if true", template)
    plain = plain.replace("endgeneration", "endif")
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    expected = environment.from_string(plain).render(messages=chat, add_generation_prompt=True)
    found = environment.from_string(tags).render(messages=chat, add_generation_prompt=True)
    assert found == expected
