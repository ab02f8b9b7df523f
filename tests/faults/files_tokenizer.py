"""Hostile tokenizer.json files and chat templates: they are refused before any use, or run.

Found with tokenizers 0.22: some end the process by SIGABRT, some raise PanicException, which is a
BaseException, and some grow the text without end.
"""

import json
from collections.abc import Iterator
from typing import Any

import fastlora
from faults.case import Case, Context, right
from faults.folders import write_tokenizer

TEXT = "a b ab aaab x"
_BPE: dict[str, Any] = dict(type="BPE", dropout=None, unk_token=None)
_BPE |= dict(continuing_subword_prefix=None, end_of_word_suffix=None, fuse_unk=False)
_BPE |= dict(byte_fallback=False, vocab={"a": 0, "b": 1, "ab": 2, "<unk>": 3}, merges=["a b"])
_A, _B = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
_X = {"SpecialToken": {"id": "x", "type_id": 0}}


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return dict(type="Replace", pattern=pattern, content=content)


def _split(regex: str) -> dict[str, Any]:
    return dict(type="Split", pattern={"Regex": regex}, behavior="Isolated", invert=False)


def _template(**parts: Any) -> dict[str, Any]:
    whole: dict[str, Any] = dict(type="TemplateProcessing", single=[_A], pair=[_A, _B])
    return {"post_processor": whole | dict(special_tokens={}) | parts}


def _charsmap(text: str) -> dict[str, Any]:
    return {"normalizer": dict(type="Precompiled", precompiled_charsmap=text)}


def _sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"normalizer": dict(type="Sequence", normalizers=list(steps))}


def _model(**changed: Any) -> dict[str, Any]:
    return {"model": _BPE | changed}


_NO_IDS = {"x": dict(id="x", ids=[], tokens=[])}
# Must be refused with CheckpointError by `load`.
BAD: dict[str, dict[str, Any]] = {
    "a merge shorter than the prefix": _model(continuing_subword_prefix="##"),
    "a merge within the prefix": _model(
        continuing_subword_prefix="#" * 10,
        vocab={"a": 0, "b": 1, "ab": 2, f"a{'#' * 10}b": 3},
    ),
    "a charsmap of nothing": _charsmap(""),
    "a charsmap of zeros": _charsmap("AAAA"),
    "a charsmap of ones": _charsmap("/////w=="),
    "a template token without a name": _template(single=[_X, _A]),
    "a template of B alone": _template(single=[_B]),
    "a template token of another name": _template(
        single=[_X, _A], special_tokens={"y": dict(id="x", ids=[1], tokens=["a"])}
    ),
    "chunks of 0": {"pre_tokenizer": dict(type="FixedLength", length=0)},
    "a stride beyond the length": {
        "truncation": dict(direction="Right", max_length=1, strategy="LongestFirst", stride=5)
    },
    "dropout": _model(dropout=0.5),
    "nine replacements of one by ten": _sequence(*[_replace({"String": "a"}, "a" * 10)] * 9),
    "a regex that is none": {"pre_tokenizer": _split("(")},
    "a unigram without tokens": {
        "model": dict(type="Unigram", unk_id=None, vocab=[], byte_fallback=False)
    },
    "a model of no type": {"model": dict(type="no such", vocab={})},
    "an id of 2**32": _model(vocab={"a": 0, "b": 2**32, "ab": 2}),
    "a negative id": _model(vocab={"a": 0, "b": -1, "ab": 2}),
    "a merge of three": _model(merges=["a b c"]),
    "a merge of no tokens": _model(merges=["x y"]),
}
# May be read: they must not end the process, nor hang, nor give other ids the second time.
ANY: dict[str, dict[str, Any]] = {
    "padding to 10**9": {
        "padding": dict(strategy={"Fixed": 10**9}, direction="Right", pad_to_multiple_of=None)
        | dict(pad_id=0, pad_type_id=0, pad_token="a")
    },
    "a template token of no ids": _template(single=[_X, _A], special_tokens=_NO_IDS),
    "a word level without its unknown": {
        "model": dict(type="WordLevel", unk_token="zz", vocab={"a": 0})
    },
    "a regex that backtracks": {"pre_tokenizer": _split(r"(a|a|aa)*(a|a|aa)*$c")},
    "an empty regex": _sequence(*[_replace({"Regex": ""}, "aa")] * 3),
    "an empty pattern": {
        "pre_tokenizer": dict(type="Split", pattern={"String": ""}, behavior="Isolated")
        | dict(invert=False)
    },
    "an id of 2**32 - 1": _model(vocab={"a": 0, "b": 2**32 - 1, "ab": 2}),
    "a decoder that strips 10": {
        "decoder": dict(type="Strip", content=" ", start=10, stop=10),
    },
    "a nested sequence": _sequence(*[_sequence(_replace({"String": "z"}, "y"))["normalizer"]] * 50),
}
_LOOP = "{% for i in range(99999) %}"
_END = "{% endfor %}"
_GROW = "{% set ns = namespace(x='aaaaaaaaaa') %}{% for i in range(60) %}"
TEMPLATES = {
    "nested ranges": _LOOP * 4 + _END * 4,
    "nested ranges that write": _LOOP * 2 + "aaaaaaaaaa" + _END * 2,
    "repeated squaring": "{% set ns = namespace(x=10 ** 15) %}{% for i in range(40) %}"
    "{% set ns.x = ns.x * ns.x %}{% endfor %}{{ ns.x }}",
    "replace that doubles": _GROW + "{% set ns.x = ns.x.replace('a', 'aa') %}{% endfor %}",
    "sums that double": _GROW + "{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
    "joins that double": _GROW + "{% set ns.x = [ns.x, ns.x] | join %}{% endfor %}",
    "lists that double": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}"
    "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "a wide format": "{{ '%1000000000d' % 1 }}",
    "a wide format filter": "{{ '%1000000000d' | format(1) }}",
    "a wide format method": "{{ '{:1000000000}'.format(1) }}",
    "a wide centre": "{{ 'a' | center(1000000000) }}",
    "a wide ljust": "{{ 'a'.ljust(1000000000) }}",
    "a wide zfill": "{{ '1'.zfill(1000000000) }}",
    "a wide indent": "{{ 'a\\nb' | indent(1000000000) }}",
    "lipsum": "{{ lipsum(n=100000) }}",
    "wordwrap(1)": _GROW.replace("60", "16")
    + "{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x | wordwrap(1) }}",
    "a recursive macro": "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "a tree of macros": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}"
    "{% endmacro %}{{ m(100) }}",
    "20,000 filters": "{{ 'a'" + " | upper" * 20_000 + " }}",
    "20,000 ifs": "{% if true %}" * 20_000 + "{% endif %}" * 20_000,
    "batches of a range": "{{ range(99999) | batch(1) | list | string | length }}" * 300,
    "a long slice": "{{ 'a' | list | batch(1000000000, 'b') | list | length }}",
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "no end": "{% for m in messages %}",
}


def _load(change: dict[str, Any]) -> Any:
    def call(context: Context) -> Any:
        folder = context.copy("base")
        path = folder / "tokenizer.json"
        whole = json.loads(path.read_text())
        whole |= dict(added_tokens=[], pre_tokenizer=None, model=_BPE) | change
        path.write_text(json.dumps(whole))
        (folder / "tokenizer_config.json").write_text("{}")
        return fastlora.load(folder, device="cpu", local_files_only=True)

    return call


def _use(change: dict[str, Any]) -> Any:
    def call(context: Context) -> Any:
        _, tokenizer = _load(change)(context)
        ids = [tokenizer.encode(TEXT) for _ in range(8)]
        assert all(other == ids[0] for other in ids), "other ids the second time"
        tokenizer.encode("a" * 2000)
        return tokenizer.decode(ids[0] + [0, 1, 2])

    return call


def _render(template: str) -> Any:
    def call(context: Context) -> Any:
        folder = write_tokenizer(context.copy("base"), template)
        _, tokenizer = fastlora.load(folder, device="cpu", local_files_only=True)
        return tokenizer.apply_chat_template([{"role": "user", "content": "w1"}])

    return call


def cases() -> Iterator[Case]:
    """All of them. A template's budget of time is 5 s here; the suite bounds its memory."""
    name = ("tokenizer.json",)
    for what, change in BAD.items():
        yield Case(f"tokenizer.json, {what}", "C7", _load(change), name, seconds=2.0)
    for what, change in ANY.items():
        yield Case(f"tokenizer.json, {what}", "C7", _use(change), (), right)
    for what, template in TEMPLATES.items():
        call, named = _render(template), ("chat_template.jinja",)
        yield Case(f"chat_template.jinja, {what}", "C9", call, named)
