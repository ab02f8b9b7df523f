"""Text to token ids and back, and chats to text, as a Hugging Face folder defines it.

For the same folder, `Tokenizer.from_folder` gives the ids, decoded texts and rendered chats of
transformers 5.23's `AutoTokenizer.from_pretrained`, which the tests compare with.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, overload

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from fastlora.arguments import (
    ENCODABLE_TEXT,
    FLAG,
    PATH,
    TEXT,
    Rule,
    check_arguments,
    describe,
    instance,
    int_list,
    optional,
)
from fastlora.checkpoints.atomic import atomic_write
from fastlora.text.backend import backend_errors, clean_up_spaces
from fastlora.text.chat_template import (
    MESSAGES,
    TEMPLATE_KWARGS,
    TOOLS,
    ChatTemplate,
    Messages,
    Span,
    choose_template,
    render,
    render_replies,
    template_kwargs_problem,
)
from fastlora.text.offsets import spans_without_gaps
from fastlora.text.tokenizer_files import (
    check_output_folder,
    read_tokenizer_files,
    tokenizer_files,
    with_added_tokens,
)

# The library keeps ids in 32 bits and raises OverflowError for others.
TOKEN_IDS = Rule(
    lambda ids: type(ids) is list and all(type(i) is int and 0 <= i < 2**32 for i in ids),
    "a list of token ids, whole numbers in [0, 2**32); decode one row of a batch at a time",
)

TEXTS = Rule(
    lambda x: isinstance(x, list | tuple) and all(map(ENCODABLE_TEXT.accepts, x)),
    "a list of texts (without unpaired surrogates)",
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tokenizer:
    """A tokenizer as its folder describes it. `from_folder` reads it; no file stays open."""

    backend: Backend = field(repr=False)
    special_tokens: Mapping[str, str]  # "bos_token" -> "<s>", …: the variables of a chat template
    eos_token_ids: tuple[int, ...]  # the tokenizer's, generation_config.json's and config.json's
    chat_templates: Mapping[str, ChatTemplate] = field(repr=False)
    clean_up_spaces: bool
    files: Mapping[str, bytes] = field(repr=False)  # name -> contents, for `save_pretrained`
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)  # variables of chat templates

    @classmethod
    def from_folder(
        cls, folder: str | os.PathLike[str], *, config_folder: str | os.PathLike[str] | None = None
    ) -> "Tokenizer | None":
        """The tokenizer of a folder in Hugging Face layout; None if it has no tokenizer.json.

        Args:
            folder: has the tokenizer's files.
            config_folder: has config.json and generation_config.json; None is `folder`. An
                adapter's folder has a tokenizer but no model configuration.

        Raises:
            ValueError: an argument is not a path.
            CheckpointError: files are unreadable or have wrong contents; lists all of them.
        """
        check_arguments(
            "Tokenizer.from_folder",
            folder=(folder, PATH),
            config_folder=(config_folder, optional(PATH)),
        )
        folder = Path(folder)
        if not (folder / "tokenizer.json").is_file():
            return None
        configs = folder if config_folder is None else Path(config_folder)
        return cls(**read_tokenizer_files(folder, configs)._asdict())

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids. Special tokens written out in `text` become their ids, as in transformers.

        Raises:
            ValueError: an argument of another type.
            CheckpointError: the tokenizers library fails with this text.
        """
        check_arguments(
            "Tokenizer.encode",
            text=(text, ENCODABLE_TEXT),
            add_special_tokens=(add_special_tokens, FLAG),
        )
        with backend_errors(f"the tokenizer cannot encode {text!r:.80}"):
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[Span]]:
        """Ids without added special tokens, and for each id the characters of `text` it covers.

        The spans leave no gap: tokens that share a character have overlapping spans, and a token
        gets back the leading spaces that ByteLevel's `trim_offsets` cuts off its span.

        Raises:
            ValueError: `text` is not a text.
        """
        check_arguments("Tokenizer.encode_with_offsets", text=(text, ENCODABLE_TEXT))
        with backend_errors(f"the tokenizer cannot encode {text!r:.80}"):
            encoding = self.backend.encode(text, add_special_tokens=False)
        return encoding.ids, spans_without_gaps(encoding.offsets)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of one row of ids. Ids beyond the vocabulary, which pad embeddings, are skipped.

        Raises:
            ValueError: `ids` is not a row of whole numbers >= 0.
        """
        ids = int_list(ids)
        check_arguments(
            "Tokenizer.decode",
            ids=(ids, TOKEN_IDS),
            skip_special_tokens=(skip_special_tokens, FLAG),
        )
        with backend_errors(f"the tokenizer cannot decode {describe(ids)}"):
            text = self.backend.decode(ids, skip_special_tokens=skip_special_tokens)
        return clean_up_spaces(text) if self.clean_up_spaces else text

    @overload
    def apply_chat_template(
        self,
        messages: Messages,
        *,
        add_generation_prompt: bool = False,
        tokenize: Literal[True] = True,
        chat_template: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]: ...

    @overload
    def apply_chat_template(
        self,
        messages: Messages,
        *,
        add_generation_prompt: bool = False,
        tokenize: Literal[False],
        chat_template: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str: ...

    def apply_chat_template(
        self,
        messages: Messages,
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        chat_template: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int] | str:
        """A chat's token ids, or its text with `tokenize=False`.

        The text is encoded without added special tokens: templates write BOS themselves.

        Args:
            messages: dicts with "role" and "content".
            add_generation_prompt: end with the beginning of the assistant's next message.
            tokenize: False returns the text.
            chat_template: a name in `chat_templates`; None is "default".
            tools: descriptions of functions that the model may call, as JSON schemas. A template
                that does not read `tools` ignores them.

        Raises:
            ValueError: as `render_chat`.
        """
        check_arguments("Tokenizer.apply_chat_template", tokenize=(tokenize, FLAG))
        text = self.render_chat(
            messages,
            add_generation_prompt=add_generation_prompt,
            chat_template=chat_template,
            tools=tools,
        )
        return self.encode(text, add_special_tokens=False) if tokenize else text

    def render_chat(
        self,
        messages: Messages,
        *,
        add_generation_prompt: bool = False,
        chat_template: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """A chat's text, rendered in jinja2's sandbox.

        Raises:
            ValueError: no such template, no messages, messages or tools that are not JSON values, a
                template that fails or tries something unsafe, or an argument of another type.
        """
        check_arguments(
            "Tokenizer.render_chat",
            messages=(messages, MESSAGES),
            add_generation_prompt=(add_generation_prompt, FLAG),
            chat_template=(chat_template, optional(TEXT)),
            tools=(tools, optional(TOOLS)),
        )
        return render(
            choose_template(self.chat_templates, chat_template),
            messages,
            self.special_tokens,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            template_kwargs=self.template_kwargs,
        )

    def render_replies(
        self,
        messages: Messages,
        *,
        chat_template: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> tuple[str, list[Span]] | None:
        """A chat's text and the spans that its template writes inside `{% generation %}` blocks.

        None if the template has no such block.

        Raises:
            ValueError: as `render_chat`.
        """
        check_arguments(
            "Tokenizer.render_replies",
            messages=(messages, MESSAGES),
            chat_template=(chat_template, optional(TEXT)),
            tools=(tools, optional(TOOLS)),
        )
        return render_replies(
            choose_template(self.chat_templates, chat_template),
            messages,
            self.special_tokens,
            tools=tools,
            template_kwargs=self.template_kwargs,
        )

    def with_tokens(self, tokens: Sequence[str], *, special: bool = False) -> "Tokenizer":
        """A tokenizer with these tokens added, at the next free ids, in this order.

        As with transformers' `add_tokens`, a text is searched for them before any other token is.
        Texts that are tokens already keep their ids. The given tokenizer is unchanged.

        Raises:
            ValueError: an argument of another type.
        """
        check_arguments("Tokenizer.with_tokens", tokens=(tokens, TEXTS), special=(special, FLAG))
        # A copy, because the library's objects are changed in place.
        backend = Backend.from_str(self.backend.to_str())
        backend.encode_special_tokens = self.backend.encode_special_tokens  # to_str drops it
        new = [AddedToken(t, normalized=not special, special=special) for t in tokens]
        (backend.add_special_tokens if special else backend.add_tokens)(new)
        return replace(self, backend=backend, files=with_added_tokens(self.files, backend))

    def with_template_kwargs(self, template_kwargs: Mapping[str, Any]) -> "Tokenizer":
        """A tokenizer whose chats are rendered with these variables, in training and generation:
        `tokenizer.with_template_kwargs({"enable_thinking": False})`. No file holds them.

        Raises:
            ValueError: values that are not JSON, or a name that no template of the tokenizer reads.
        """
        rules = dict(template_kwargs=(template_kwargs, TEMPLATE_KWARGS))
        check_arguments("Tokenizer.with_template_kwargs", **rules)
        if problem := template_kwargs_problem(template_kwargs, self.chat_templates):
            raise ValueError(problem)
        return replace(self, template_kwargs={**self.template_kwargs, **template_kwargs})

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the files that this tokenizer was read from, each atomically.

        If only config.json named the tokenizer's class, tokenizer_config.json names it now, so that
        transformers chooses the same class without config.json. Files of another tokenizer in
        `folder` that would overrule the written ones are removed.

        Raises:
            ValueError: `folder` is not a path, or its additional_chat_templates is a link.
        """
        check_arguments("Tokenizer.save_pretrained", folder=(folder, PATH))
        folder = Path(folder)
        check_output_folder(folder)
        for name, data in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            atomic_write(folder / name, lambda file, data=data: file.write(data))
        # An older chat_template.jinja, for example, would hide the template in
        # tokenizer_config.json.
        for path in tokenizer_files(folder):
            if path.relative_to(folder).as_posix() not in self.files:
                path.unlink()

    def __len__(self) -> int:
        """Size of the vocabulary, added tokens included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary without added tokens, as in transformers."""
        return self.backend.get_vocab_size(with_added_tokens=False)

    @property
    def bos_token(self) -> str | None:
        """The token that begins a text."""
        return self.special_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        """The token that ends a text."""
        return self.special_tokens.get("eos_token")

    @property
    def bos_token_id(self) -> int | None:
        """The id of `bos_token`."""
        return self._id("bos_token")

    @property
    def pad_token_id(self) -> int:
        """The tokenizer's padding id, else its first end-of-text id, else 0.

        Any id works: attention mask and labels say what is padding, never the id.
        """
        pad_id = self._id("pad_token")
        return pad_id if pad_id is not None else next(iter(self.eos_token_ids), 0)

    def _id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.backend.token_to_id(token)


TOKENIZER = instance(Tokenizer, "a fastlora.Tokenizer, as fastlora.load returns it")
