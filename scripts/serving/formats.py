"""Replies as OpenAI's JSON: complete ones, and the chunks of a stream."""

import time
import uuid
from collections.abc import Sequence
from typing import Any, NamedTuple

import fastlora
from serving.replies import Piece, Token

JSON = dict[str, Any]


class Usage(NamedTuple):
    """Numbers of tokens."""

    prompt: int
    completion: int

    def json(self) -> JSON:
        """The object `usage`."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
        }


class Format:
    """What chats and completions share. One object serves one request."""

    prefix: str
    complete: str  # the object's name
    chunk: str

    def __init__(self, model: str, tokenizer: fastlora.Tokenizer, *, logprobs: bool) -> None:
        """`model` is the name that the request gave."""
        self._tokenizer, self._logprobs = tokenizer, logprobs
        self._head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": f"fastlora-{fastlora.__version__}",
        }

    def whole(self, pieces: Sequence[Piece], choices: int, usage: Usage) -> JSON:
        """A complete reply, from all its pieces."""
        whole = []
        for i in range(choices):
            own = [piece for piece in pieces if piece.choice == i]
            text = "".join(piece.text for piece in own)
            tokens = [token for piece in own for token in piece.tokens]
            reason = own[-1].finish_reason if own else None
            choice = {"index": i, **self._content(text), "finish_reason": reason}
            whole.append(choice | {"logprobs": self._tokens(tokens) if self._logprobs else None})
        return {**self._head, "object": self.complete, "choices": whole, "usage": usage.json()}

    def opening(self, choices: int) -> list[JSON]:
        """The chunks before the first token."""
        return []

    def chunks(self, piece: Piece) -> list[JSON]:
        """The chunks of a piece. The finish reason comes in a separate chunk, as from OpenAI."""
        logprobs = self._tokens(piece.tokens) if self._logprobs and piece.tokens else None
        found = []
        if piece.text or piece.tokens:
            found.append(self._chunk(piece.choice, self._delta(piece.text), logprobs, None))
        if piece.finish_reason:
            found.append(self._chunk(piece.choice, self._delta(None), None, piece.finish_reason))
        return found

    def usage_chunk(self, usage: Usage) -> JSON:
        """The last chunk with `include_usage`."""
        return {**self._head, "object": self.chunk, "choices": [], "usage": usage.json()}

    def _chunk(self, index: int, delta: JSON, logprobs: JSON | None, reason: str | None) -> JSON:
        choice = {"index": index, **delta, "logprobs": logprobs, "finish_reason": reason}
        return {**self._head, "object": self.chunk, "choices": [choice]}

    def _token_text(self, token: int) -> str:
        return self._tokenizer.decode([token], skip_special_tokens=False)

    def _content(self, text: str) -> JSON:
        raise NotImplementedError

    def _delta(self, text: str | None) -> JSON:
        raise NotImplementedError

    def _tokens(self, tokens: Sequence[Token]) -> JSON:
        raise NotImplementedError


class ChatFormat(Format):
    """/v1/chat/completions."""

    prefix, complete, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self, choices: int) -> list[JSON]:
        """One chunk with the role for each choice."""
        role = {"delta": {"role": "assistant", "content": ""}}
        return [self._chunk(i, role, None, None) for i in range(choices)]

    def _content(self, text: str) -> JSON:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _delta(self, text: str | None) -> JSON:
        return {"delta": {} if text is None else {"content": text}}

    def _tokens(self, tokens: Sequence[Token]) -> JSON:
        content = [
            {
                **self._token(token.id, token.logprob),
                "top_logprobs": [self._token(*other) for other in token.alternatives],
            }
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> JSON:
        text = self._token_text(token)
        # A token may be a part of a character; its bytes are not known then.
        whole = "\N{REPLACEMENT CHARACTER}" not in text
        return {
            "token": text,
            "logprob": logprob,
            "bytes": list(text.encode()) if whole else None,
        }


class CompletionFormat(Format):
    """/v1/completions."""

    prefix, complete, chunk = "cmpl", "text_completion", "text_completion"

    def _content(self, text: str) -> JSON:
        return {"text": text}

    def _delta(self, text: str | None) -> JSON:
        return {"text": text or ""}

    def _tokens(self, tokens: Sequence[Token]) -> JSON:
        asked = any(token.alternatives for token in tokens)
        return {
            "tokens": [self._token_text(token.id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [self._likeliest(token) for token in tokens] if asked else None,
            "text_offset": [token.offset for token in tokens],
        }

    def _likeliest(self, token: Token) -> dict[str, float]:
        """Text -> log-probability, also of the sampled token."""
        pairs = (*token.alternatives, (token.id, token.logprob))
        return {self._token_text(i): logprob for i, logprob in pairs}
