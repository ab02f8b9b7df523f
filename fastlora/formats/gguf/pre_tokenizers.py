"""pre_tokenizer_name(): llama.cpp's name for the way in which a tokenizer splits a text.

llama.cpp implements each way in C++ under a name, `tokenizer.ggml.pre`. Its converter finds the
name by a hash of the ids of one text, which fits only the tokenizers in its list. Here the steps of
tokenizer.json are compared, so that a tokenizer with another vocabulary is found too.

Source: src/llama-vocab.cpp of ggml-org/llama.cpp, which lists the regular expression of each
name, often beside that of tokenizer.json.
"""

import json
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple

from fastlora.arguments import Rule
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

# The names that llama.cpp accepts for byte-level BPE: xllamacpp 2026.10.11549 loads a file with any
# of them, and refuses a file with another name.
_ACCEPTED = frozenset(
    """
    a.x-4.0 afmoe bailingmoe bailingmoe2 bloom chameleon chatglm-bpe codeshell cohere2moe
    command-r dbrx deepseek-coder deepseek-llm deepseek-r1-qwen deepseek-v3 default exaone
    exaone-moe exaone4 f2llmv2 falcon falcon-h1 falcon3 gemma4 gigachat glm4 glm5 gpt-2 gpt-4o
    gpt3-finnish granite-docling granite-embed-multi-311m granite-embed-multi-97m grok-2 hunyuan
    hunyuan-dense hy_v4 jais jais-2 jina-de jina-es jina-v1-en jina-v2-code jina-v2-de
    jina-v2-es jina-v5-nano joyai-llm kanana2 kimi-k2 kormo laguna lfm2 llada-moe llama-bpe
    llama-v3 llama3 llama4 megrez mellum mellum2 midm-2.0 minerva-7b minicpm5 minimax-m2 mmbert
    modern-bert mpt olmo phi-2 pixtral poro-chat qwen2 qwen35 refact roberta-bpe sarvam-moe
    seed-coder smaug-bpe smollm solar-open spark2_5 stablelm2 starcoder superbpe talkie tekken
    tiny_aya trillion ufakzeka viking whitespace youtu
    """.split()
)


def pre_rule(value: Any) -> Rule:
    """Rule: None or a name that llama.cpp accepts. The message has the names close to `value`."""
    close = get_close_matches(value, sorted(_ACCEPTED)) if isinstance(value, str) else []
    return Rule(
        lambda x: x is None or (type(x) is str and x in _ACCEPTED),
        f"None or llama.cpp's name of a pre-tokenizer, such as {', '.join(close or NAMES)}",
    )


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
