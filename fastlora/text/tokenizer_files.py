"""The files of a Hugging Face folder that describe its tokenizer, read and checked."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from fastlora.errors import CheckpointError, raise_problems
from fastlora.text.chat_template import ChatTemplate
from fastlora.text.special_tokens import add_special_tokens, find_eos_token_ids, read_special_tokens

# Tokenizer classes that transformers 5 does not read from tokenizer.json as it stands: it takes the
# vocabulary, merges, post-processor and added tokens, and sets up the rest itself. Name -> the
# special tokens of a folder that names none.
_REBUILT = {
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "GPT2Tokenizer": {
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
        "pad_token": None,
    },
    "Qwen2Tokenizer": dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
}


# Qwen2's split of text into words (Qwen/Qwen2-0.5B, tokenizer.json): as GPT-4's, one digit a time.
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class TokenizerParts(NamedTuple):
    """The fields of `Tokenizer`, which explains them."""

    backend: Backend
    special_tokens: Mapping[str, str]
    eos_token_ids: tuple[int, ...]
    chat_templates: Mapping[str, ChatTemplate]
    clean_up_spaces: bool
    files: Mapping[str, bytes]


def read_tokenizer_files(folder: Path, config_folder: Path) -> TokenizerParts:
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in tokenizer_files(folder)}
    configs = {
        name: (config_folder / name).read_bytes()
        for name in ("config.json", "generation_config.json")
        if (config_folder / name).is_file()
    }
    parsed = _parse(folder, {**files, **configs})
    settings = parsed.get("tokenizer_config.json", {})
    wrong = [
        f"{name}: tokenizer_class is {given!r:.200}, expected a name"
        for name in ("tokenizer_config.json", "config.json")
        if not isinstance(given := parsed.get(name, {}).get("tokenizer_class"), str | None)
    ]
    raise_problems(CheckpointError, f"{folder} names no tokenizer:", wrong)
    byte_level = b'"ByteLevel"' in files["tokenizer.json"]
    class_name = _tokenizer_class(settings, parsed.get("config.json", {}), byte_level)
    try:
        backend = _backend(class_name, files["tokenizer.json"], parsed["tokenizer.json"], settings)
    except Exception as error:  # tokenizers raises bare Exception for all that is wrong in the file
        raise CheckpointError(
            f"{folder / 'tokenizer.json'} is not a tokenizer that the tokenizers library reads: "
            f"{error}. Download it again, or upgrade tokenizers."
        ) from error
    padding = parsed["tokenizer.json"].get("padding") or {}
    defaults = {"pad_token": padding.get("pad_token"), **_REBUILT.get(class_name, {})}
    special = read_special_tokens(folder, parsed, defaults)
    add_special_tokens(backend, special, all_special=class_name == "Qwen2Tokenizer")
    backend.encode_special_tokens = bool(settings.get("split_special_tokens"))

    if class_name != _tokenizer_class(settings, {}, byte_level):
        told = {**settings, "tokenizer_class": class_name}
        files["tokenizer_config.json"] = json.dumps(told, indent=2, ensure_ascii=False).encode()
    named = {name: str(token) for name, token in special.named.items()}
    return TokenizerParts(
        backend=backend,
        special_tokens=named,
        eos_token_ids=find_eos_token_ids(folder, parsed, backend, named.get("eos_token")),
        chat_templates=_chat_templates(folder, files, settings),
        clean_up_spaces=_cleans_up(backend, settings),
        files=files,
    )


def tokenizer_files(folder: Path) -> list[Path]:
    """Every file of `folder` that has a say in its tokenizer, in a fixed order."""
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    names += ("added_tokens.json", "chat_template.jinja")
    more = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    return [path for name in names if (path := folder / name).is_file()] + more


_MOST_BYTES = 128 * 2**20  # of one file; Gemma 3's tokenizer.json has 33 MB


def _parse(folder: Path, files: Mapping[str, bytes]) -> dict[str, Any]:
    """JSON files -> dicts, after every file has shown that it can be read."""
    parsed, problems = {}, []
    for name, data in files.items():
        if len(data) > _MOST_BYTES:
            problems.append(f"{name}: {len(data):,} bytes; expected at most {_MOST_BYTES:,}")
            continue
        try:
            parsed[name] = json.loads(data) if name.endswith(".json") else data.decode()
            if b"\\u" in data:  # half a surrogate pair is JSON and no text
                json.dumps(parsed[name], ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:  # JSON's and UTF-8's errors are ValueErrors
            problems.append(f"{name}: {error!s:.200}")
            continue
        if name.endswith(".json") and not isinstance(parsed[name], dict):
            problems.append(f"{name}: holds a {type(parsed[name]).__name__}, expected an object")
    raise_problems(
        CheckpointError,
        f"{folder} has files that cannot be read:",
        problems,
        "They are cut off or damaged: download them again.",
    )
    return parsed


def _tokenizer_class(
    settings: Mapping[str, Any], config: Mapping[str, Any], byte_level: bool
) -> str:
    """The class AutoTokenizer would choose; all but those in _REBUILT read tokenizer.json as it is.

    "LlamaTokenizer" beside a byte-level tokenizer.json is a wrong name of many Llama-3 folders. For
    "qwen2" transformers trusts no declared class; Mistral's folders it always reads as they are.
    """
    declared = settings.get("tokenizer_class") or config.get("tokenizer_class") or ""
    declared = declared.removesuffix("Fast")
    model_type = config.get("model_type")
    if model_type == "qwen2":
        return "Qwen2Tokenizer"
    if not declared and model_type in ("qwen3", "qwen2_moe", "qwen3_moe"):
        return "Qwen2Tokenizer"
    as_it_is = model_type in ("mistral", "mixtral") or (declared == "LlamaTokenizer" and byte_level)
    return declared if declared in _REBUILT and not as_it_is else "PreTrainedTokenizerFast"


def _backend(
    class_name: str, text: bytes, raw: dict[str, Any], settings: Mapping[str, Any]
) -> Backend:
    """tokenizer.json as it stands, or what a class of _REBUILT makes of it; no tokens added yet."""
    model = raw["model"]
    if class_name not in _REBUILT or model.get("type", "BPE") != "BPE":
        backend = Backend.from_str(text.decode())
    else:
        merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
        build = {"LlamaTokenizer": _llama, "GPT2Tokenizer": _gpt2, "Qwen2Tokenizer": _qwen2}
        backend = build[class_name](model["vocab"], merges, settings)
        # A file without vocabulary parses in no time, and its post-processor is the one wanted.
        bare = {**raw, "model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": []}
        if (post_processor := Backend.from_str(json.dumps(bare)).post_processor) is not None:
            backend.post_processor = post_processor
    backend.no_truncation()  # whatever the file says: nothing is cut off in silence,
    backend.no_padding()  # and padding is the batch's business
    return backend


def _llama(vocab: dict[str, int], merges: list, settings: Mapping[str, Any]) -> Backend:
    """SentencePiece's way: "▁" for spaces, one in front, bytes for what the vocabulary lacks."""
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


def _chat_templates(
    folder: Path, files: Mapping[str, bytes], settings: Mapping[str, Any]
) -> dict[str, ChatTemplate]:
    """Templates by name: those in .jinja files, or else those in tokenizer_config.json."""
    templates = {}
    for name, data in files.items():
        if name.endswith(".jinja"):
            key = "default" if name == "chat_template.jinja" else Path(name).stem
            # Universal newlines, as when a file is opened as text.
            text = data.decode().replace("\r\n", "\n").replace("\r", "\n")
            templates[key] = ChatTemplate(text, str(folder / name))
    if templates:
        return templates
    given = settings.get("chat_template")
    if isinstance(given, list) and all(isinstance(t, dict) for t in given):
        given = {t.get("name"): t.get("template") for t in given}
    named = given if isinstance(given, dict) else {} if given is None else {"default": given}
    source = folder / "tokenizer_config.json"
    if not all(isinstance(part, str) for item in named.items() for part in item):
        raise CheckpointError(
            f"{source}: chat_template must be a string, or a list of objects with strings under "
            f"name and template; got {given!r:.200}"
        )
    return {name: ChatTemplate(str(text), f"{source} ({name})") for name, text in named.items()}


def _cleans_up(backend: Backend, settings: Mapping[str, Any]) -> bool:
    """Whether to clean up decoded text. Meant for word-level vocabularies; BPE text it damages."""
    forced = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    wanted = settings.get("clean_up_tokenization_spaces")
    is_bpe = isinstance(backend.model, models.BPE)
    return bool(wanted and (not is_bpe or settings.get(forced)))
