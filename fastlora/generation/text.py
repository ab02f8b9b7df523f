"""Text around generation: a prompt to ids, and streamed ids to pieces of text."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from fastlora.arguments import ENCODABLE_TEXT, Rule
from fastlora.errors import raise_problems
from fastlora.models.state import ModelState
from fastlora.text.boundaries import encode_with_one_bos, reply_stop_ids
from fastlora.text.chat_template import MESSAGES
from fastlora.text.tokenizer import Tokenizer

Prompt = str | Sequence[Mapping[str, Any]]  # a text, or a chat: messages with role and content

PROMPT = Rule(
    lambda x: ENCODABLE_TEXT.accepts(x) or MESSAGES.accepts(x),
    f"{ENCODABLE_TEXT.expected}, or {MESSAGES.expected}",
)


def encode_prompt(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """The ids of a text, or of a chat up to the beginning of its next reply.

    A text that begins with BOS, as rendered chats do, gets no second one.

    Raises:
        ValueError: the prompt has no token, or the chat template fails.
    """
    if isinstance(prompt, str):
        ids = encode_with_one_bos(tokenizer, prompt)
    else:
        try:
            ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)
        except ValueError as error:
            raise ValueError(f"prompt={prompt!r:.80}: {error}") from error
    if not ids:
        raise ValueError(f"prompt={prompt!r:.80}: expected at least one token, got none")
    return ids


def text_stop_ids(
    tokenizer: Tokenizer, checkpoint_ids: Sequence[int], vocab_size: int
) -> list[int]:
    """The ids that stop generated text: the checkpoint's, the tokenizer's, and the end of turn.

    The end of turn is the token with which the chat template ends a reply, which the files of base
    models often do not name as end of text. Ids outside the vocabulary are left out.
    """
    ids = {*checkpoint_ids, *reply_stop_ids(tokenizer)}
    return sorted(i for i in ids if 0 <= i < vocab_size)


# Arguments of `generate` that `continuation` gives itself.
_NOT_OF_TEXT = {
    "input_ids": "the prompt is encoded here; Model.generate takes ids",
    "return_logprobs": "the result is text alone; Model.generate and generate_many return them too",
}


def continuation(
    model: ModelState,
    generate: Callable[..., Int[Tensor, "1 t_new"]],
    tokenizer: Tokenizer,
    prompt: Prompt,
    stream: Callable[[str], Any] | None,
    settings: dict[str, Any],
) -> str:
    """The continuation of a text, or the reply to a chat, without the prompt.

    Args:
        model: the model that generates.
        generate: the model's method.
        tokenizer: the model's.
        prompt: a text or a chat.
        stream: called with pieces of text that join to the result.
        settings: arguments of `generate`. If eos_token_id is None, `text_stop_ids` gives the ids.

    Raises:
        ValueError: as `generate`; also if the prompt has no token, its chat template fails, or
            `settings` has input_ids or return_logprobs.
    """
    problems = [f"{name}: {why}" for name, why in _NOT_OF_TEXT.items() if name in settings]
    raise_problems(ValueError, "Model.generate_text cannot use these arguments:", problems)
    ids, config = encode_prompt(tokenizer, prompt), model.spec.config
    if settings["eos_token_id"] is None:
        stop = text_stop_ids(tokenizer, config.eos_token_id, config.vocab_size)
        settings = settings | {"eos_token_id": stop}
    pieces = TextStream(tokenizer.decode, stream)
    input_ids = torch.tensor([ids], dtype=torch.int64, device=model.base["norm"].device)
    out = generate(input_ids, stream=pieces, return_logprobs=False, **settings)
    # The last token may end inside a character, whose bytes the stream has held back.
    pieces.finish()
    return tokenizer.decode(out[0, len(ids) :].tolist())


class TextStream:
    """Turns streamed ids into streamed text. Holds back bytes of an unfinished character."""

    def __init__(
        self, decode: Callable[[list[int]], str], emit: Callable[[str], Any] | None
    ) -> None:
        """`decode` maps ids to text; `emit` is called with each new piece, unless it is None."""
        self.decode, self.emit = decode, emit
        self.ids: list[int] = []
        self.sent_chars = 0

    def __call__(self, token: Int[Tensor, "1"]) -> None:
        """Take the next id."""
        if self.emit is None:
            return
        self.ids.append(int(token))
        # Decode all ids again: the text of a token depends on the tokens before it.
        text = self.decode(self.ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._send(text)

    def finish(self) -> None:
        """Emit what was held back."""
        if self.emit is not None:
            self._send(self.decode(self.ids))

    def _send(self, text: str) -> None:
        if self.emit is not None and len(text) > self.sent_chars:
            self.emit(text[self.sent_chars :])
            self.sent_chars = len(text)
