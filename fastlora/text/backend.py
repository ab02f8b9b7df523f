"""The tokenizers library's Tokenizer ("backend") for a folder, set up as transformers 5 does it.

transformers reads most folders' tokenizer.json unchanged. For the classes of `REBUILT_CLASSES` it
takes only vocabulary, merges, post-processor and added tokens from the file, and chooses
normaliser, pre-tokenizer and decoder by the class.
"""

import json
from collections.abc import Mapping
from contextlib import contextmanager
from typing import Any

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from fastlora.errors import CheckpointError
from fastlora.models.families.registry import tokenizer_class_of

# Class name -> special tokens of a folder whose files name none.
REBUILT_CLASSES: dict[str, dict[str, str | None]] = {
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "GPT2Tokenizer": {
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
        "pad_token": None,
    },
    "GemmaTokenizer": {
        f"{name}_token": f"<{name}>" for name in ("unk", "bos", "eos", "pad", "mask")
    },
    "Qwen2Tokenizer": dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
}

# Qwen2's regular expression for words (Qwen/Qwen2-0.5B, tokenizer.json): GPT-4's, but numbers are
# split into single digits.
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@contextmanager
def backend_errors(what: str):
    """Turn everything that the tokenizers library raises into a CheckpointError that says `what`.

    For example `what` is "tokenizer.json is not a tokenizer".
    """
    try:
        yield
    except BaseException as error:
        # pyo3's PanicException derives from BaseException and cannot be imported.
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise CheckpointError(f"{what}: {error!s:.500}") from error
        raise


def tokenizer_class(
    settings: Mapping[str, Any], config: Mapping[str, Any], byte_level: bool
) -> str:
    """The class that AutoTokenizer chooses: one of REBUILT_CLASSES or "PreTrainedTokenizerFast".

    Args:
        settings: tokenizer_config.json.
        config: config.json; {} if the folder has none.
        byte_level: whether tokenizer.json is byte-level. Many Llama-3 folders declare
            "LlamaTokenizer", the class of SentencePiece models, next to a byte-level file.
    """
    declared = settings.get("tokenizer_class") or config.get("tokenizer_class") or ""
    declared = declared.removesuffix("Fast")
    family = tokenizer_class_of(config.get("model_type"))
    if family.name is not None and (family.ignores_declared or not declared):
        return family.name
    misnamed = declared == "LlamaTokenizer" and byte_level
    return declared if declared in REBUILT_CLASSES and not misnamed else "PreTrainedTokenizerFast"


def is_rebuilt(class_name: str, raw: Mapping[str, Any]) -> bool:
    """Whether only vocabulary and merges of tokenizer.json's model are used."""
    model = raw.get("model")
    kind = model.get("type", "BPE") if isinstance(model, dict) else None
    return class_name in REBUILT_CLASSES and kind == "BPE"


def make_backend(
    class_name: str, text: bytes, raw: Mapping[str, Any], settings: Mapping[str, Any]
) -> Backend:
    """The backend of a tokenizer class, without the tokens that the other files add.

    Args:
        class_name: of `tokenizer_class`.
        text: tokenizer.json.
        raw: the same, parsed.
        settings: tokenizer_config.json.

    Raises:
        Exception: the file is not a tokenizer. The tokenizers library raises only this class.
    """
    model = raw["model"]
    if not is_rebuilt(class_name, raw):
        backend = Backend.from_str(text.decode())
    else:
        merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
        build = {"LlamaTokenizer": _llama, "GPT2Tokenizer": _gpt2}
        build |= {"GemmaTokenizer": _gemma, "Qwen2Tokenizer": _qwen2}
        backend = build[class_name](model["vocab"], merges, settings)
        # The library gives a post-processor only as part of a tokenizer. Without the vocabulary,
        # which takes most of the time, parsing the file once more is fast.
        bare = {**raw, "model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": []}
        if (post_processor := Backend.from_str(json.dumps(bare)).post_processor) is not None:
            backend.post_processor = post_processor
    # The file may ask for both. We never truncate silently, and batches do their own padding.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _llama(vocab: dict[str, int], merges: list, settings: Mapping[str, Any]) -> Backend:
    """SentencePiece's scheme: "▁" for spaces, one put in front, bytes for unknown characters."""
    prefix = settings.get("add_prefix_space")
    scheme = "always" if settings.get("legacy", False) else "first"
    backend = Backend(models.BPE(vocab=vocab, merges=merges, fuse_unk=True, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement="▁", prepend_scheme="never" if prefix is False else scheme, split=False
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    strip = [] if prefix is False else [decoders.Strip(content=" ", left=1)]
    backend.decoder = decoders.Sequence(steps + strip)
    return backend


def _gemma(vocab: dict[str, int], merges: list, settings: Mapping[str, Any]) -> Backend:
    """SentencePiece's scheme without a prefix; a space belongs to the word before it."""
    unknown = settings.get("unk_token") or "<unk>"
    unknown = unknown["content"] if isinstance(unknown, dict) else unknown
    backend = Backend(
        models.BPE(vocab=vocab, merges=merges, fuse_unk=True, unk_token=unknown, byte_fallback=True)
    )
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps)
    return backend


def _gpt2(vocab: dict[str, int], merges: list, settings: Mapping[str, Any]) -> Backend:
    backend = Backend(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=bool(settings.get("add_prefix_space"))
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _qwen2(vocab: dict[str, int], merges: list, settings: Mapping[str, Any]) -> Backend:
    words = pre_tokenizers.Split(Regex(_QWEN2_WORDS), behavior="isolated", invert=False)
    prefix = bool(settings.get("add_prefix_space"))
    level = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)
    backend = Backend(models.BPE(vocab=vocab, merges=merges))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, level])
    backend.decoder = decoders.ByteLevel()
    return backend


def clean_up_spaces(text: str) -> str:
    """Remove the spaces that word-level vocabularies leave before punctuation and contractions."""
    # The replacements of transformers' clean_up_tokenization, in its order.
    for mark in (".", "?", "!", ","):
        text = text.replace(f" {mark}", mark)
    text = text.replace(" ' ", "'")
    for ending in ("n't", "'m", "'s", "'ve", "'re"):
        text = text.replace(f" {ending}", ending)
    return text
