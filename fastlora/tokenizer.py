"""Text to token ids and back, and chats to text, as a Hugging Face folder says it.

The oracle is transformers 5.23: for the same folder, `Tokenizer.from_folder` gives the ids, the
decoded texts and the rendered chats of `AutoTokenizer.from_pretrained`. Read downward: what callers
use, and how the files of a folder become one tokenizer.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from fastlora.atomic import atomic_write
from fastlora.checks import CheckpointError, raise_problems

Messages = Sequence[Mapping[str, Any]]
Span = tuple[int, int]  # characters [start, end)

# Written around {% generation %} blocks to find them again; private-use characters, which no
# vocabulary gives a meaning to, around a word, so that a user's text does not hold them by chance.
_MARKS = ("\ue0f0generation\ue0f1", "\ue0f1generation\ue0f0")

# ── 1. what callers use ───────────────────────────────────────────────────────────────────


class ChatTemplate(NamedTuple):
    """A Jinja template, and the file it came from, for error messages."""

    text: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tokenizer:
    """A tokenizer as its folder describes it. Built by `from_folder`; holds no open file."""

    backend: Backend = field(repr=False)
    special_tokens: Mapping[str, str]  # "bos_token" -> "<s>", …: the variables of a chat template
    eos_token_ids: tuple[int, ...]  # the tokenizer's, generation_config.json's and config.json's
    chat_templates: Mapping[str, ChatTemplate] = field(repr=False)
    clean_up_spaces: bool
    files: Mapping[str, bytes] = field(repr=False)  # as they were read, for `save_pretrained`

    @classmethod
    def from_folder(cls, folder: Path, *, config_folder: Path | None = None) -> "Tokenizer | None":
        """The tokenizer of a folder in Hugging Face layout; None if it has no tokenizer.json.

        config.json and generation_config.json are read from `config_folder` where it is given: an
        adapter's folder has a tokenizer and no model configuration.

        Raises:
            CheckpointError: a file that is there and wrong, all of them at once.
        """
        if not (folder / "tokenizer.json").is_file():
            return None
        return _load(folder, folder if config_folder is None else config_folder)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids. Special tokens written out in `text` become their ids, as in transformers."""
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[Span]]:
        """Ids without added special tokens, and the characters of `text` each of them stands for.

        The spans leave no gap: bytes of one character share its span, and the leading spaces that
        ByteLevel's `trim_offsets` cuts off a token's span are given back to it.
        """
        encoding = self.backend.encode(text, add_special_tokens=False)
        spans, reached = [], 0
        for start, end in encoding.offsets:
            spans.append((min(start, reached), end))
            reached = end
        return encoding.ids, spans

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`. Ids beyond the vocabulary (rows that pad an embedding) are left out."""
        text = self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return _clean_up(text) if self.clean_up_spaces else text

    @overload
    def apply_chat_template(
        self,
        messages: Messages,
        *,
        add_generation_prompt: bool = False,
        tokenize: Literal[True] = True,
        chat_template: str | None = None,
    ) -> list[int]: ...

    @overload
    def apply_chat_template(
        self,
        messages: Messages,
        *,
        add_generation_prompt: bool = False,
        tokenize: Literal[False],
        chat_template: str | None = None,
    ) -> str: ...

    def apply_chat_template(
        self,
        messages: Messages,
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        chat_template: str | None = None,
    ) -> list[int] | str:
        """A chat's token ids, or its text with `tokenize=False`.

        The text is encoded without added special tokens: templates write BOS themselves.
        `chat_template` names one of `chat_templates`. Raises as `render_chat` does.
        """
        text = self.render_chat(
            messages, add_generation_prompt=add_generation_prompt, chat_template=chat_template
        )
        return self.encode(text, add_special_tokens=False) if tokenize else text

    def render_chat(
        self,
        messages: Messages,
        *,
        add_generation_prompt: bool = False,
        chat_template: str | None = None,
    ) -> str:
        """A chat's text, rendered in jinja2's sandbox.

        Raises:
            ValueError: no (such) template, no messages, messages that are not JSON values, or a
                template that refuses them or tries something unsafe.
        """
        return self._render(self._template(chat_template), messages, add_generation_prompt)

    def render_replies(
        self, messages: Messages, *, chat_template: str | None = None
    ) -> tuple[str, list[Span]] | None:
        """A chat's text and the spans its template wrote inside `{% generation %}` blocks.

        None if the template has no such block. Raises as `render_chat` does.
        """
        template = self._template(chat_template)
        if not re.search(r"{%[-+]?\s*generation\s*[-+]?%}", template.text):
            return None
        marked = self._render(template, messages, False, marks=_MARKS)
        text, spans, start = "", [], 0
        for piece in re.split(f"({'|'.join(_MARKS)})", marked):
            if piece == _MARKS[0]:
                start = len(text)
            elif piece == _MARKS[1]:
                spans.append((start, len(text)))
            else:
                text += piece
        if text != self.render_chat(messages, chat_template=chat_template):
            raise ValueError(
                f"{template.source}: what a {{% generation %}} block writes is changed afterwards "
                "(a filter around it?), so the replies cannot be found. Move the block outwards."
            )
        return text, spans

    def with_tokens(self, tokens: Sequence[str], *, special: bool = False) -> "Tokenizer":
        """A tokenizer that knows these texts as well, at the next free ids, in this order.

        Found before any other token, as transformers' `add_tokens` has them. Texts that are tokens
        already keep their ids. The given tokenizer is unchanged.
        """
        backend = Backend.from_str(self.backend.to_str())
        backend.encode_special_tokens = self.backend.encode_special_tokens  # which it does not keep
        new = [AddedToken(t, normalized=not special, special=special) for t in tokens]
        (backend.add_special_tokens if special else backend.add_tokens)(new)
        return replace(self, backend=backend, files=_with_added_tokens(self.files, backend))

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the files this tokenizer was read from, one by one under a temporary name.

        A tokenizer class that only config.json told is written into tokenizer_config.json, so that
        transformers chooses the same beside no config.json. Files of another tokenizer in `folder`
        that would overrule these are removed.
        """
        folder = Path(folder)
        for name, data in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            atomic_write(folder / name, lambda file, data=data: file.write(data))
        for path in _tokenizer_files(folder):
            if path.relative_to(folder).as_posix() not in self.files:
                path.unlink()

    def __len__(self) -> int:
        """Size of the whole vocabulary, added tokens included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary without added tokens, as in transformers."""
        return self.backend.get_vocab_size(with_added_tokens=False)

    @property
    def bos_token(self) -> str | None:
        return self.special_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        return self.special_tokens.get("eos_token")

    @property
    def bos_token_id(self) -> int | None:
        return self._id("bos_token")

    @property
    def pad_token_id(self) -> int:
        """The tokenizer's own padding id, else its first end-of-text id, else 0.

        Any id will do: padding is told by the attention mask and the labels, never by its id.
        """
        own = self._id("pad_token")
        return own if own is not None else next(iter(self.eos_token_ids), 0)

    def _id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.backend.token_to_id(token)

    def _render(
        self,
        template: ChatTemplate,
        messages: Sequence[Any],
        add_generation_prompt: bool,
        marks: tuple[str, str] = ("", ""),
    ) -> str:
        from fastlora.chat_template import render  # noqa: PLC0415  jinja2 takes 50 ms to import

        return render(
            template.text,
            messages,
            self.special_tokens,
            source=template.source,
            add_generation_prompt=add_generation_prompt,
            marks=marks,
        )

    def _template(self, name: str | None) -> ChatTemplate:
        if not self.chat_templates:
            raise ValueError(
                "this tokenizer has no chat template: its folder has neither chat_template.jinja "
                "nor a chat_template in tokenizer_config.json. Put a chat_template.jinja there (an "
                "instruct model of the same family has one), or give plain text, not messages."
            )
        chosen = "default" if name is None else name
        if chosen not in self.chat_templates:
            raise ValueError(
                f"no chat template is named {chosen!r}; this tokenizer has "
                f"{sorted(self.chat_templates)}. Name one of them with chat_template=…"
            )
        return self.chat_templates[chosen]


def _with_added_tokens(files: Mapping[str, bytes], backend: Backend) -> dict[str, bytes]:
    """The files with the backend's added tokens, wherever a reader looks for them.

    All of them: some may have come from other files, which are read after tokenizer.json and would
    then find their ids taken.
    """
    flags = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    entries = {
        i: {name: getattr(token, name) for name in flags}
        for i, token in sorted(backend.get_added_tokens_decoder().items())
    }
    whole = json.loads(files["tokenizer.json"])
    whole["added_tokens"] = [{"id": i, **entry} for i, entry in entries.items()]
    changed = {"tokenizer.json": whole}
    settings = json.loads(files.get("tokenizer_config.json", b"{}"))
    if settings.get("added_tokens_decoder"):
        settings["added_tokens_decoder"] = {str(i): entry for i, entry in entries.items()}
        changed["tokenizer_config.json"] = settings
    as_bytes = lambda value: json.dumps(value, ensure_ascii=False, indent=2).encode()
    return {**files, **{name: as_bytes(value) for name, value in changed.items()}}


def _clean_up(text: str) -> str:
    """Remove the spaces that word-level vocabularies leave before punctuation and contractions."""
    for mark in (".", "?", "!", ","):
        text = text.replace(f" {mark}", mark)
    text = text.replace(" ' ", "'")
    for ending in ("n't", "'m", "'s", "'ve", "'re"):
        text = text.replace(f" {ending}", ending)
    return text


# ── 2. from the files of a folder ─────────────────────────────────────────────────────────

_SPECIAL = "bos_token eos_token unk_token sep_token pad_token cls_token mask_token".split()

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


def _load(folder: Path, config_folder: Path) -> Tokenizer:
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in _tokenizer_files(folder)}
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
    special = _special_tokens(folder, parsed, defaults)
    _add_tokens(backend, special, all_special=class_name == "Qwen2Tokenizer")
    backend.encode_special_tokens = bool(settings.get("split_special_tokens"))

    if class_name != _tokenizer_class(settings, {}, byte_level):
        told = {**settings, "tokenizer_class": class_name}
        files["tokenizer_config.json"] = json.dumps(told, indent=2, ensure_ascii=False).encode()
    named = {name: str(token) for name, token in special.named.items()}
    return Tokenizer(
        backend=backend,
        special_tokens=named,
        eos_token_ids=_eos_token_ids(folder, parsed, backend, named.get("eos_token")),
        chat_templates=_chat_templates(folder, files, settings),
        clean_up_spaces=_cleans_up(backend, settings),
        files=files,
    )


def _tokenizer_files(folder: Path) -> list[Path]:
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


class _SpecialTokens(NamedTuple):
    """What a folder says of its special and added tokens, before they are added."""

    named: dict[str, AddedToken]  # "bos_token" -> token
    extra: list[AddedToken]  # special tokens without a name
    declared: dict[int, AddedToken]  # id -> token


def _special_tokens(
    folder: Path, parsed: Mapping[str, Any], defaults: Mapping[str, str | None]
) -> _SpecialTokens:
    """Special tokens from all four files, by transformers' order of precedence.

    tokenizer_config.json with an "added_tokens_decoder" is complete by itself; without one,
    special_tokens_map.json overrules it, and added_tokens.json and tokenizer.json add to it.
    """
    settings = parsed.get("tokenizer_config.json", {})
    complete = "added_tokens_decoder" in settings
    if not complete:
        settings = {**settings, **_special_tokens_map(settings, parsed)}
    problems: list[str] = []
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    named = {name: settings.get(name, defaults.get(name)) for name in _SPECIAL}
    named |= {
        k: v for k, v in settings.items() if k.endswith("_token") and isinstance(v, str | dict)
    }
    if isinstance(extra, dict):
        named, extra = {**named, **extra}, []
    if not isinstance(extra, list):
        problems.append(f"extra_special_tokens: {extra!r:.200}")
        extra = []
    named = {k: _token(v, k, problems, special=True) for k, v in named.items() if v is not None}
    extra = [_token(v, "extra_special_tokens", problems, special=True) for v in extra]
    special = {t.content for t in (*named.values(), *extra)}
    declared = _declared_tokens(parsed, complete, special, problems)
    raise_problems(
        CheckpointError,
        f"{folder}: {_named_in(parsed)}: special tokens that are neither text nor an added token:",
        problems,
        "Expected a string or an object with a string under content.",
    )
    by_content = {token.content: token for token in declared.values()}
    named = {name: by_content.get(token.content, token) for name, token in named.items()}
    return _SpecialTokens(named, extra, declared)


def _named_in(parsed: Mapping[str, Any]) -> str:
    names = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    return ", ".join(name for name in names if name in parsed)


def _special_tokens_map(settings: Mapping[str, Any], parsed: Mapping[str, Any]) -> dict[str, Any]:
    """special_tokens_map.json, less its nameless tokens where tokenizer_config.json has such."""
    tokens = dict(parsed.get("special_tokens_map.json", {}))
    if {"extra_special_tokens", "additional_special_tokens"} & settings.keys():
        tokens.pop("additional_special_tokens", None)
    return tokens


def _declared_tokens(
    parsed: Mapping[str, Any], complete: bool, special: set[str], problems: list[str]
) -> dict[int, AddedToken]:
    """Added tokens by id: of tokenizer_config.json, or of the two files that came before it."""
    if complete:
        entries = parsed["tokenizer_config.json"]["added_tokens_decoder"]
        where = "tokenizer_config.json: added_tokens_decoder"
    else:
        contents = parsed.get("added_tokens.json", {})
        flags = {t: {"normalized": t not in special, "special": t in special} for t in contents}
        pairs = [(str(i), {"content": t, **flags[t]}) for t, i in contents.items()]
        added = parsed["tokenizer.json"].get("added_tokens") or []
        pairs += [(str(t["id"]), t) for t in added if isinstance(t, dict) and "id" in t]
        entries, where = dict(pairs), "added_tokens.json"
    is_id = re.compile("[0-9]{1,10}").fullmatch
    if not isinstance(entries, dict) or not all(is_id(i) for i in entries):
        problems.append(f"{where}: ids must be whole numbers; got {entries!r:.200}")
        return {}
    return {int(i): _token(token, f"{where}, {i}", problems) for i, token in entries.items()}


def _token(value: Any, where: str, problems: list[str], special: bool = False) -> AddedToken:
    """An added token from its content or its record; anything else goes to `problems`."""
    if isinstance(value, str):
        return AddedToken(value, special=special)
    if not (isinstance(value, dict) and isinstance(value.get("content"), str)):
        problems.append(f"{where}: {value!r:.200}")
        return AddedToken("", special=special)
    names = ("single_word", "lstrip", "rstrip", "normalized", "special")
    flags = {k: value[k] for k in names if k in value}
    if wrong := [k for k, v in flags.items() if type(v) is not bool]:
        problems.append(f"{where}: {', '.join(wrong)} must be true or false; got {value!r:.200}")
        return AddedToken("", special=special)
    token = AddedToken(value["content"], **flags)
    token.special = token.special or special
    return token


def _add_tokens(backend: Backend, tokens: _SpecialTokens, all_special: bool) -> None:
    """Add to a fresh `backend`, in place: the declared tokens by id, then whatever is missing.

    A token that the vocabulary lacks gets the next free id, whatever id was declared for it.
    """
    names = {token.content for token in tokens.named.values()}
    known = {t.content for t in backend.get_added_tokens_decoder().values()}
    known |= {t.content for t in tokens.declared.values()}
    special = [*tokens.named.values(), *tokens.extra]
    declared = [token for _, token in sorted(tokens.declared.items())]
    for token in declared:
        token.special = token.special or token.content in names
    backend.add_tokens(declared + [token for token in special if token.content not in known])
    if all_special:
        backend.add_tokens([AddedToken(t.content, special=True) for t in special])


def _eos_token_ids(
    folder: Path, parsed: Mapping[str, Any], backend: Backend, eos_token: str | None
) -> tuple[int, ...]:
    """Every id that ends a text, the tokenizer's own first, without repetition."""
    own = None if eos_token is None else backend.token_to_id(eos_token)
    ids = [] if own is None else [own]
    problems = []
    for name in ("generation_config.json", "config.json"):
        given = parsed.get(name, {}).get("eos_token_id")
        listed = given if isinstance(given, list) else [] if given is None else [given]
        if not all(type(i) is int for i in listed):
            problems.append(
                f"{name}: eos_token_id is {given!r:.200}, expected an integer or a list of them"
            )
        ids += listed
    raise_problems(CheckpointError, f"{folder} names end-of-text ids that are none:", problems)
    return tuple(dict.fromkeys(ids))


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
