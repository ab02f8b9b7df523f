"""tokenizer.json files on which the tokenizers library panics, aborts or never ends are refused."""

import base64
import json
import os
import struct

import pytest

from fastlora.errors import CheckpointError
from fastlora.text.tokenizer import Tokenizer

BPE = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}
A, X = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "x", "type_id": 0}}
B = {"Sequence": {"id": "B", "type_id": 0}}


def charsmap(trie: list[int], replacements: bytes = b"") -> dict:
    data = struct.pack(f"<I{len(trie)}I", 4 * len(trie), *trie) + replacements
    text = base64.b64encode(data).decode()
    return {"normalizer": {"type": "Precompiled", "precompiled_charsmap": text}}


def replace(content: str, pattern: dict) -> dict:
    return {"type": "Replace", "pattern": pattern, "content": content}


def chain(part: str, key: str, *steps: dict) -> dict:
    return {part: {"type": "Sequence", key: list(steps)}}


def template(single: list, pair: list, tokens: dict) -> dict:
    names = {"single": single, "pair": pair, "special_tokens": tokens}
    return {"post_processor": {"type": "TemplateProcessing", **names}}


TEN = replace("a" * 10, {"String": "a"})
BAD = {
    "a merge that lacks the prefix": {"model": {**BPE, "continuing_subword_prefix": "##"}},
    "dropout": {"model": {**BPE, "dropout": 0.1}},
    "a unigram without tokens": {"model": {"type": "Unigram", "unk_id": None, "vocab": []}},
    "an empty charsmap": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}},
    "a charsmap that claims 4 GB": {
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////w=="}
    },
    "a trie that leads out": charsmap([(1000 << 10)] + [0] * 255),
    "a leaf that leads out": charsmap([(1 << 10) | 0x100, 2**31 + 500] + [0] * 254, b"a\0"),
    "an unnamed template token": template([X, A], [A, B], {}),
    "a template of B": template([B], [A, B], {}),
    "a pair without B": template([A], [A], {}),
    "a misnamed template token": template(
        [X, A], [A, B], {"x": {"id": "y", "ids": [1], "tokens": ["b"]}}
    ),
    "chunks of 0": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "a stride beyond the length": {
        "truncation": {
            **{"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 2}
        }
    },
    "replacements that multiply": chain("normalizer", "normalizers", *[TEN] * 3),
    "a decoder that multiplies": chain("decoder", "decoders", *[TEN] * 3),
    "regular expressions that multiply": chain(
        "normalizer", "normalizers", *[replace("aaaaaaaa", {"Regex": "."})] * 2
    ),
    "sequences in sequences that multiply": chain(
        "normalizer", "normalizers", chain("n", "normalizers", TEN, TEN)["n"], TEN
    ),
    "a long regular expression": {
        "pre_tokenizer": {
            **{"type": "Split", "pattern": {"Regex": "a|" * 50_000 + "b"}},
            **{"behavior": "Isolated", "invert": False},
        }
    },
}


def write(folder, change: dict):
    parts = dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor", "decoder"))
    raw = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], **parts}
    (folder / "tokenizer.json").write_text(json.dumps({**raw, "model": BPE, **change}))
    return folder


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_would_end_the_process_is_refused(tmp_path, name):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json would end the process"):
        Tokenizer.from_folder(write(tmp_path, BAD[name]))


def test_sound_parts_of_the_same_kinds_are_read(tmp_path):
    merges = {"vocab": {"a": 0, "##b": 1, "ab": 2}, "merges": ["a ##b"]}
    change = {"model": {**BPE, **merges, "continuing_subword_prefix": "##"}}
    change |= chain("normalizer", "normalizers", replace("b", {"String": "c"}))
    change |= template([X, A], [A, B], {"x": {"id": "x", "ids": [2], "tokens": ["ab"]}})
    assert Tokenizer.from_folder(write(tmp_path, change)).encode("ac") == [2, 2]
    leaf = charsmap([(1 << 10) | 0x100, 2**31] + [0] * 254, b"a\0")
    assert Tokenizer.from_folder(write(tmp_path, leaf)).encode("ab") == [2]


def test_what_only_the_library_sees_is_an_error_of_ours(tmp_path):
    """A panic is not an Exception: `except Exception` would let it pass."""
    tokenizer = Tokenizer.from_folder(write(tmp_path, {}))
    words = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "zz"}
    words = Tokenizer.from_folder(write(tmp_path, {"model": words}))
    assert words.encode("a") == [0]
    with pytest.raises(CheckpointError, match="cannot encode 'b'"):
        words.encode("b")

    class PanicException(BaseException):
        pass

    class Panics:
        def decode(self, *_, **__):
            raise PanicException("index out of bounds")

    object.__setattr__(tokenizer, "backend", Panics())
    with pytest.raises(CheckpointError, match=r"cannot decode.*index out of bounds"):
        tokenizer.decode([0])


@pytest.mark.parametrize(
    "name",
    [
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
        *("config.json", "generation_config.json", "special_tokens_map.json"),
    ],
)
def test_the_size_of_a_file_is_asked_before_it_is_read(tmp_path, name):
    write(tmp_path, {})
    (tmp_path / name).write_text("{}")
    os.truncate(tmp_path / name, 50 * 10**9)  # sparse: it takes no space
    with pytest.raises(CheckpointError, match=rf"{name} has 50,000,000,000 bytes"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="needs Linux")
def test_a_file_that_cannot_be_read_is_named(tmp_path):
    write(tmp_path, {})
    (tmp_path / "tokenizer_config.json").symlink_to("/proc/self/mem")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json cannot be read"):
        Tokenizer.from_folder(tmp_path)
