"""Tokenizers in SentencePiece's style: their merges as scores, and their prefix space.

llama.cpp joins the neighbours whose joined token has the highest score; tokenizer.json lists merges
by rank. Both give the same tokens if the joined tokens have one order that all merges follow, and
no merge is missing.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from fastlora.errors import CheckpointError

SPACE = "▁"

GGML_MODEL = "llama"  # GGUF's name for SentencePiece's BPE


def is_sentencepiece(raw: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json is a BPE over characters with a byte for unknown ones."""
    model = raw["model"]
    return model.get("type") == "BPE" and bool(model.get("byte_fallback"))


def merge_scores(raw: Mapping[str, Any], tokens: Sequence[str]) -> list[float]:
    """A score for each token: minus its place in the order of merges.

    Args:
        raw: tokenizer.json.
        tokens: of ids 0, 1, ...

    Raises:
        CheckpointError: no order of tokens gives the ids that the merges give.
    """
    model = raw["model"]
    pairs = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    order: dict[str, int] = {}
    for left, right in pairs:
        if (joined := left + right) not in order:
            order[joined] = len(order)
        elif order[joined] != len(order) - 1:
            raise CheckpointError(_refusal(f"the merges into {joined!r} are not side by side"))
    known, vocab = set(pairs), model["vocab"]
    missing = [
        (token[:k], token[k:])
        for token in order
        for k in range(1, len(token))
        if token[:k] in vocab and token[k:] in vocab and (token[:k], token[k:]) not in known
    ]
    if missing:
        raise CheckpointError(_refusal(f"there is no merge of {missing[0]}"))
    last = float(len(order))
    return [-float(order[t]) if t in order else -last for t in tokens]


def _refusal(reason: str) -> str:
    return (
        f"llama.cpp cannot tokenise as this tokenizer.json does: {reason}. SentencePiece's own"
        " files have all merges of a token, one after the other."
    )


def adds_prefix_space(raw: Mapping[str, Any]) -> tuple[bool, list[str]]:
    """Whether a space is put before a text, and sentences on texts with other ids in llama.cpp.

    Raises:
        CheckpointError: normaliser or pre-tokenizer are others than those of SentencePiece's style.
    """
    normalizer, pre = raw.get("normalizer"), raw.get("pre_tokenizer")
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    prepend = {"type": "Prepend", "prepend": SPACE}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    # Gemma's splits at spaces, of which its normaliser leaves none.
    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"}
    pre = None if pre is not None and split.items() <= pre.items() and steps == [replace] else pre
    if pre is None and steps in ([replace], [prepend, replace]):
        return steps[0] == prepend, []
    metaspace = {"type": "Metaspace", "replacement": SPACE, "split": False}
    if not steps and pre is not None and metaspace.items() <= pre.items():
        scheme = pre["prepend_scheme"]
        notes = {"never": [], "always": [_LEADING], "first": [_LEADING, _BEHIND_SPECIAL]}
        return scheme != "never", notes[scheme]
    raise CheckpointError(
        "llama.cpp cannot tokenise as this tokenizer.json does: its normaliser and pre-tokenizer"
        f" are {normalizer!r:.300} and {pre!r:.300}, expected those of SentencePiece's style."
    )


_LEADING = (
    "llama.cpp puts a space before a text that begins with one, too; this tokenizer does not."
)
_BEHIND_SPECIAL = (
    "llama.cpp puts a space before the text behind a special token, too; this tokenizer puts one"
    " only before the first word."
)
