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
from typing import Any, Literal, overload

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from fastlora.checkpoints.atomic import atomic_write
from fastlora.text.chat_template import ChatTemplate
from fastlora.text.tokenizer_files import read_tokenizer_files, tokenizer_files

Messages = Sequence[Mapping[str, Any]]

Span = tuple[int, int]  # characters [start, end)


# Written around {% generation %} blocks to find them again; private-use characters, which no
# vocabulary gives a meaning to, around a word, so that a user's text does not hold them by chance.
_MARKS = ("\ue0f0generation\ue0f1", "\ue0f1generation\ue0f0")


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
        parts = read_tokenizer_files(folder, folder if config_folder is None else config_folder)
        return cls(**parts._asdict())

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
        for path in tokenizer_files(folder):
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
        from fastlora.text.chat_template import render  # noqa: PLC0415  jinja2 takes 50 ms to import

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
