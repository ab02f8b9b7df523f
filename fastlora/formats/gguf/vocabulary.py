"""vocabulary_metadata(): a tokenizer's entries in a GGUF file."""

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from fastlora.errors import CheckpointError, raise_problems
from fastlora.formats.gguf.metadata import Metadata
from fastlora.formats.gguf.pre_tokenizers import pre_tokenizer_name
from fastlora.formats.gguf.sentencepiece import (
    GGML_MODEL,
    adds_prefix_space,
    is_sentencepiece,
    merge_scores,
)
from fastlora.models.config import LlamaConfig
from fastlora.text.boundaries import reply_stop_ids
from fastlora.text.tokenizer import Tokenizer

# llama.cpp's llama_token_type.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)

_BYTE_TOKENS = {f"<0x{i:02X}>" for i in range(256)}


class Vocabulary(NamedTuple):
    """A tokenizer as a GGUF file describes it."""

    metadata: Metadata
    notes: list[str]  # ways in which llama.cpp will tokenise otherwise, in sentences


def vocabulary_metadata(
    tokenizer: Tokenizer, config: LlamaConfig, pre: str | None = None
) -> Vocabulary:
    """The entries of a tokenizer.

    Args:
        tokenizer: the model's.
        config: the model's; its vocabulary may be larger than the tokenizer's.
        pre: llama.cpp's name of a pre-tokenizer; None finds it.

    Raises:
        ValueError: `pre` is given for a tokenizer in SentencePiece's style.
        CheckpointError: llama.cpp cannot tokenise as this tokenizer does; says why.
    """
    raw = json.loads(tokenizer.backend.to_str())
    _check(tokenizer, raw, config)
    tokens, types = _tokens(tokenizer, raw, config.vocab_size)
    notes = _flag_notes(tokenizer)
    if is_sentencepiece(raw):
        if pre is not None:
            raise ValueError(
                f"pre={pre!r} means nothing for this tokenizer: it is in SentencePiece's style,"
                " which has no pre-tokenizer; leave pre out."
            )
        prefix, more = adds_prefix_space(raw)
        notes += more
        kind: Metadata = {
            "tokenizer.ggml.model": GGML_MODEL,
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.scores": merge_scores(raw, tokens),
            "tokenizer.ggml.add_space_prefix": prefix,
        }
    else:
        merges = [m if isinstance(m, str) else " ".join(m) for m in raw["model"]["merges"]]
        kind = {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre or pre_tokenizer_name(tokenizer),
            "tokenizer.ggml.merges": merges,
        }
    common: Metadata = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    special, more = _special_ids(tokenizer, config)
    return Vocabulary(kind | common | special | _template(tokenizer), notes + more)


def _check(tokenizer: Tokenizer, raw: Mapping[str, Any], config: LlamaConfig) -> None:
    model, normalizer = raw["model"], raw.get("normalizer")
    problems = []
    if model.get("type") != "BPE":
        problems.append(f"the model is {model.get('type')}: only BPE is supported")
    elif not is_sentencepiece(raw) and (normalizer or {"type": "NFC"})["type"] != "NFC":
        problems.append(f"the normaliser is {normalizer!r:.200}: llama.cpp has none for BPE")
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(name):
            problems.append(f"the model has {name} {model[name]!r:.100}")
    if (largest := max(tokenizer.backend.get_vocab().values(), default=0)) >= config.vocab_size:
        problems.append(
            f"it has id {largest}, and the model's vocabulary is {config.vocab_size}: add_tokens"
            " makes room for it"
        )
    if tokenizer.backend.encode_special_tokens:
        problems.append("split_special_tokens: llama.cpp reads special tokens in a text as such")
    raise_problems(CheckpointError, "This tokenizer cannot be written to GGUF:", problems)


def _tokens(tokenizer: Tokenizer, raw: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """The text and the type of every id; ids without a token are unused."""
    names = {i: t for t, i in tokenizer.backend.get_vocab(with_added_tokens=True).items()}
    added = tokenizer.backend.get_added_tokens_decoder()
    pieces, unknown = is_sentencepiece(raw), raw["model"].get("unk_token")
    tokens, types = [], []
    for i in range(size):
        token = names.get(i, f"[PAD{i}]")
        if i not in names:
            kind = _UNUSED
        elif pieces and token == unknown:
            kind = _UNKNOWN
        elif i in added:
            kind = _CONTROL if added[i].special else _USER_DEFINED
        else:
            kind = _BYTE if pieces and token in _BYTE_TOKENS else _NORMAL
        tokens.append(token)
        types.append(kind)
    return tokens, types


def _special_ids(tokenizer: Tokenizer, config: LlamaConfig) -> tuple[Metadata, list[str]]:
    """The ids of special tokens, and whether they are put around a text."""
    stop = stop_ids(tokenizer, config)
    bos = tokenizer.bos_token_id
    # llama.cpp stops at the end of text, of a turn and of a message, and at tokens that it knows by
    # their text.
    named: dict[str, int] = dict(zip(("eos", "eot", "eom"), stop, strict=False))
    named |= {} if bos is None else {"bos": bos}
    for name, token in (("unknown", "unk_token"), ("padding", "pad_token")):
        text = tokenizer.special_tokens.get(token)
        if text is not None and (i := tokenizer.backend.token_to_id(text)) is not None:
            named[name] = i
    front, back = _around(tokenizer)
    metadata: Metadata = {f"tokenizer.ggml.{n}_token_id": i for n, i in named.items()}
    metadata["tokenizer.ggml.add_bos_token"] = front
    metadata["tokenizer.ggml.add_eos_token"] = back
    more = [tokenizer.decode([i], skip_special_tokens=False) for i in stop[3:]]
    notes = [f"llama.cpp reads three stop ids; give it these as stop texts: {more}"] if more else []
    if not stop:
        notes.append("The model has no stop id; llama.cpp takes 11 (in SentencePiece's style 2).")
    return metadata, notes


def stop_ids(tokenizer: Tokenizer, config: LlamaConfig) -> list[int]:
    """The ids at which `generate_text` stops, the tokenizer's end of text first."""
    ids = dict.fromkeys((*reply_stop_ids(tokenizer), *config.eos_token_id))
    return [i for i in ids if 0 <= i < config.vocab_size]


def _around(tokenizer: Tokenizer) -> tuple[bool, bool]:
    """Whether the tokenizer puts BOS before a text and EOS behind it.

    Raises:
        CheckpointError: it puts other tokens there.
    """
    inner = tokenizer.encode("a", add_special_tokens=False)
    ids = tokenizer.encode("a")
    bos = [tokenizer.bos_token_id]
    ends = [[], *([i] for i in tokenizer.eos_token_ids[:1])]
    for front in ([], bos):
        for back in ends:
            if ids == [*front, *inner, *back]:
                return bool(front), bool(back)
    raise CheckpointError(
        f"This tokenizer puts other tokens around a text than BOS and EOS: {ids!r:.200} for 'a'."
        " llama.cpp cannot do so."
    )


def _template(tokenizer: Tokenizer) -> Metadata:
    """Chat templates: the default one, and others by name."""
    templates = {name: portable(t.text) for name, t in tokenizer.chat_templates.items()}
    metadata: Metadata = {}
    if "default" in templates:
        metadata["tokenizer.chat_template"] = templates.pop("default")
    if templates:
        metadata["tokenizer.chat_templates"] = list(templates)
        metadata |= {f"tokenizer.chat_template.{name}": text for name, text in templates.items()}
    return metadata


def portable(template: str) -> str:
    """A chat template without transformers' `generation` tags, which other engines do not know.

    Comments take their place, which remove the same white space.
    """
    return re.sub(r"{%([-+]?)\s*((?:end)?generation)\s*([-+]?)%}", r"{#\1 \2 \3#}", template)


def _flag_notes(tokenizer: Tokenizer) -> list[str]:
    """A sentence if added tokens also take the spaces beside them, which llama.cpp does not do."""
    added = tokenizer.backend.get_added_tokens_decoder().values()
    taking = [t.content for t in added if t.lstrip or t.rstrip or t.single_word]
    if not taking:
        return []
    return [f"llama.cpp ignores lstrip, rstrip and single_word of added tokens: {taking!r:.300}"]
