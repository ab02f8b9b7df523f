"""Checks of a parsed tokenizer.json for contents on which the tokenizers library ends the process.

The library (0.23) trusts the file: some values make it panic or abort when a text is encoded, some
let a text grow a billionfold, and BPE dropout gives other ids on every call. What these checks do
not see, the library raises as PanicException, which is not an Exception; `backend.backend_errors`
turns it into a CheckpointError.
"""

import base64
import binascii
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

_MAX_GROWTH = 64  # the most characters that a chain of Replace steps may make of one
_MAX_INSERTED_CHARS = 10_000
_MAX_REGEX_CHARS = 20_000  # GPT-4o's has 500


def tokenizer_json_problems(raw: Mapping[str, Any], *, model_is_rebuilt: bool) -> list[str]:
    """One line for each value that the tokenizers library must not be given.

    Args:
        raw: the parsed file. Parts of an unexpected type are left to the library, which refuses
            them by name.
        model_is_rebuilt: only vocabulary and merges of the model are used.
    """
    problems = [] if model_is_rebuilt else _model_problems(raw.get("model"))
    truncation = raw.get("truncation")
    if isinstance(truncation, dict):
        length, stride = truncation.get("max_length"), truncation.get("stride")
        if type(length) is int and type(stride) is int and stride >= max(length, 1):
            problems.append(f"truncation: stride {stride} is not below max_length {length}")
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        steps = list(_steps(raw.get(part)))
        for step in steps:
            problems += [f"{part}, {step.get('type')}: {p}" for p in _step_problems(step)]
        growth = math.prod(map(_growth, steps))
        if growth > _MAX_GROWTH:
            problems.append(
                f"{part}: its Replace steps make up to {min(growth, 1e300):.3g} characters of one; "
                f"expected at most {_MAX_GROWTH}"
            )
    return problems


def _model_problems(model: Any) -> list[str]:
    if not isinstance(model, dict):
        return []
    kind, vocab = model.get("type"), model.get("vocab")
    if kind == "Unigram":
        if not isinstance(vocab, list) or not vocab:
            return ["model: a Unigram model needs at least one token in vocab"]
        empty = any(isinstance(v, list) and v and v[0] == "" for v in vocab)
        return ["model: vocab holds an empty token"] if empty else []
    return _bpe_problems(model)


def _bpe_problems(model: dict[str, Any]) -> list[str]:
    problems = []
    if dropout := model.get("dropout"):
        problems.append(
            f"model: dropout is {dropout!r:.80}, with which every call gives other ids. Set it to "
            "null"
        )
    prefix, merges = model.get("continuing_subword_prefix"), model.get("merges")
    if not isinstance(prefix, str) or not prefix or not isinstance(merges, list):
        return problems
    # The library cuts so many bytes off the right part of a merge, whether it begins so or not.
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[1], str)):
            continue
        if not pair[1].startswith(prefix):
            problems.append(
                f"model: the merge {pair!r:.80} continues a word, but its second part does not "
                f"begin with continuing_subword_prefix {prefix!r:.80}"
            )
            # One is enough: the others are of the same kind, and files have 100,000 merges and
            # more.
            break
    return problems


def _steps(value: Any) -> Iterator[dict[str, Any]]:
    """All steps of a part, those inside Sequences too."""
    if not isinstance(value, dict):
        return
    if value.get("type") != "Sequence":
        yield value
    for key in ("normalizers", "pretokenizers", "processors", "decoders"):
        inner = value.get(key)
        for step in inner if isinstance(inner, list) else ():
            yield from _steps(step)


def _step_problems(step: dict[str, Any]) -> list[str]:
    pattern = step.get("pattern")
    regex = pattern.get("Regex") if isinstance(pattern, dict) else None
    if isinstance(regex, str) and len(regex) > _MAX_REGEX_CHARS:
        return [f"a regular expression of {len(regex):,} characters"]
    for key in ("content", "prepend", "prefix", "suffix"):
        if isinstance(text := step.get(key), str) and len(text) > _MAX_INSERTED_CHARS:
            return [f"{key} has {len(text):,} characters; expected at most {_MAX_INSERTED_CHARS:,}"]
    match step.get("type"):
        case "Precompiled":
            problem = _charsmap_problem(step.get("precompiled_charsmap"))
            return [f"precompiled_charsmap {problem}"] if problem else []
        case "FixedLength" if type(step.get("length")) is int and step["length"] < 1:
            return [f"length is {step['length']}; expected at least 1"]
        case "TemplateProcessing":
            return _template_problems(step)
    return []


def _template_problems(step: dict[str, Any]) -> list[str]:
    tokens = step.get("special_tokens")
    tokens = tokens if isinstance(tokens, dict) else {}
    problems = []
    for name, sequences in (("single", {"A"}), ("pair", {"A", "B"})):
        pieces = step.get(name)
        if not isinstance(pieces, list) or not all(isinstance(p, dict) for p in pieces):
            continue  # older files have a text, which the library parses
        of = lambda kind, pieces=pieces: [
            p[kind].get("id") for p in pieces if isinstance(p.get(kind), dict)
        ]
        if set(of("Sequence")) != sequences:
            problems.append(
                f"{name} holds the texts {of('Sequence')}; expected {sorted(sequences)}"
            )
        problems += [
            f"{name} writes {token!r:.80}, which special_tokens does not hold"
            for token in of("SpecialToken")
            if token not in tokens
        ]
    for name, token in tokens.items():
        if isinstance(token, dict) and token.get("id") != name:
            problems.append(f"special_tokens, {name!r:.80} has the id {token.get('id')!r:.80}")
    return problems


def _growth(step: dict[str, Any]) -> float:
    """The most characters that a Replace step makes of one."""
    content, pattern = step.get("content"), step.get("pattern")
    if step.get("type") != "Replace" or not isinstance(content, str):
        return 1.0
    text = pattern.get("String") if isinstance(pattern, dict) else pattern
    if isinstance(text, str) and text:
        return max(1.0, len(content) / len(text))
    return len(content) + 1.0  # a regular expression may match between characters


def _charsmap_problem(text: Any) -> str | None:
    """Why a SentencePiece character map would end the process; None for a good one.

    Layout (google/sentencepiece, src/normalizer.cc): the size of a double-array trie in bytes
    (uint32), the trie, and the replacements, each ended by NUL. The library follows the trie's
    offsets without looking whether they are inside it.
    """
    if not isinstance(text, str):
        return None
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        return f"is not base64: {error}"
    size = int.from_bytes(data[:4], "little")
    if len(data) < 8 or size % 4 or not 4 <= size <= len(data) - 4:
        return f"of {len(data)} bytes claims a trie of {size} bytes"
    trie, replacements = np.frombuffer(data, "<u4", size // 4, 4), data[4 + size :]
    try:
        replacements.decode()
    except UnicodeDecodeError:
        return "holds replacements that are not UTF-8"
    # As in darts-clone, include/darts.h, DoubleArrayUnit.
    offset = (trie >> 10) << ((trie & 0x200) >> 6)
    is_node = trie >> 31 == 0
    base = np.arange(len(trie), dtype=np.int64) ^ offset
    last_child = base | 0xFF
    nodes = is_node & (trie != 0)
    nodes[0] = True
    if (last_child[nodes] >= len(trie)).any():
        return "holds a trie that leads out of itself"
    values = trie[base[nodes & ((trie & 0x100) != 0)]] & 0x7FFFFFFF
    starts = np.frombuffer(replacements, np.uint8)
    if (values >= len(starts)).any() or ((starts[values] & 0xC0) == 0x80).any():
        return "holds a trie that leads out of its replacements"
    return None
