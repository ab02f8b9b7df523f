"""pre_tokenizer_name(): llama.cpp's name for the way in which a tokenizer splits a text.

llama.cpp implements each way in C++ under a name, `tokenizer.ggml.pre`. Its converter finds the
name by a hash of the ids of one text, which fits only the tokenizers in its list. Here the steps of
tokenizer.json are compared, so that a tokenizer with another vocabulary is found too.

Source: src/llama-vocab.cpp of ggml-org/llama.cpp, which lists the regular expression of each
name, often beside that of tokenizer.json.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from fastlora.errors import CheckpointError
from fastlora.text.tokenizer import Tokenizer

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_START = r"[^\r\n\p{L}\p{N}]?"
_REST_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"

_LLAMA3 = rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}|{_REST}"
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT4O = (
    rf"{_START}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_START}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}|{_REST_SLASH}"
)
_TEKKEN = rf"{_START}{_UPPER}*{_LOWER}+|{_START}{_UPPER}+{_LOWER}*|\p{{N}}|{_REST_SLASH}"


class _Way(NamedTuple):
    """A way to split a text, in the order in which tokenizer.json lists the steps."""

    steps: tuple[str, ...]
    ignores_merges: bool  # a word that is in the vocabulary is one token; merges are not asked


# "split:REGEX", "digits" (each digit apart) and "bytes" (GPT-2's regular expression, then bytes) or
# "bytes only".
_NAMES = {
    _Way((f"split:{_LLAMA3}", "bytes only"), True): "llama-bpe",
    _Way((f"split:{_LLAMA3}", "bytes only"), False): "smaug-bpe",
    _Way((f"split:{_QWEN2}", "bytes only"), False): "qwen2",
    _Way((f"split:{_QWEN35}", "bytes only"), False): "qwen35",
    _Way((f"split:{_GPT4O}", "bytes only"), False): "gpt-4o",
    _Way((f"split:{_TEKKEN}", "bytes only"), True): "tekken",
    _Way(("digits", "bytes"), False): "smollm",
    _Way(("bytes",), False): "gpt-2",
}

NAMES = tuple(dict.fromkeys(_NAMES.values()))


def pre_tokenizer_name(tokenizer: Tokenizer) -> str:
    """llama.cpp's name for the pre-tokenizer of a byte-level BPE.

    Raises:
        CheckpointError: llama.cpp has no name for it; shows its steps.
    """
    raw = json.loads(tokenizer.backend.to_str())
    steps = tuple(step for part in _parts(raw["pre_tokenizer"]) for step in _steps(part))
    way = _Way(steps, bool(raw["model"].get("ignore_merges")))
    if way not in _NAMES:
        raise CheckpointError(
            f"llama.cpp has no name for this pre-tokenizer: {' -> '.join(steps)!r:.600},"
            f" ignore_merges {str(way.ignores_merges).lower()}. It would split texts in other"
            f" ways. To write the file nevertheless, choose the nearest one yourself: pre="
            f"{' or '.join(map(repr, NAMES))}; verify=True counts texts that both tokenise alike."
        )
    return _NAMES[way]


def _parts(pre_tokenizer: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if pre_tokenizer is None:
        return []
    if pre_tokenizer["type"] == "Sequence":
        return [x for part in pre_tokenizer["pretokenizers"] for x in _parts(part)]
    return [pre_tokenizer]


def _steps(part: Mapping[str, Any]) -> tuple[str, ...]:
    """The short name of a part of tokenizer.json; its JSON if it has none."""
    match part:
        case {"type": "Split", "pattern": {"Regex": regex}, "behavior": how, "invert": invert} if (
            how == "Isolated" and not invert
        ) or (how == "Removed" and invert):
            return (f"split:{regex}",)
        case {"type": "Digits", "individual_digits": True}:
            return ("digits",)
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return ("bytes",)
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}:
            return ("bytes only",)
    return (json.dumps(part, ensure_ascii=False),)
