"""chat_steps(): token ids of a rendered chat, and which of them the assistant says."""

from collections.abc import Generator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from fastlora.data.examples import Example, TrainOn, make_example
from fastlora.data.reply_spans import Chat, find_reply
from fastlora.data.row_forms import Row
from fastlora.data.rows import is_masked
from fastlora.text.offsets import Encoded
from fastlora.text.tokenizer import Span, Tokenizer

Tools = Sequence[Mapping[str, Any]] | None


class Request(NamedTuple):
    """A text to encode."""

    text: str
    add_special_tokens: bool = False


def chat_steps(
    messages: Sequence[Row],
    first: int,
    tokenizer: Tokenizer,
    train_on: TrainOn,
    stops: Sequence[int],
    tools: Tools = None,
) -> Generator[Request, Encoded, Example]:
    """The tokens of a rendered chat, as steps (row_steps.py). With train_on="responses", the
    assistant's replies among `messages[first:]` are trained; with "last_response", the last of
    them; with "all", every token is.

    A reply with `"weight": 0` or `"train": false` is not trained in either case.

    A template with {% generation %} blocks marks the replies itself. For any other template we find
    each reply by rendering the messages before it as a prompt. It ends behind the first token of
    `stops`, where generation ends; text that the template writes behind it is not trained.

    Raises:
        ValueError: a reply cannot be found, or masked messages that are not replies.
    """
    masked = [i for i, m in enumerate(messages) if i >= first and is_masked(m)]
    # Replies need not be found then, so templates in which they cannot be found work too.
    if train_on == "all" and not masked:
        ids = (yield Request(tokenizer.render_chat(messages, tools=tools))).ids
        return make_example(ids, [True] * len(ids))
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i >= first]
    if train_on == "all":
        if others := [i + 1 for i in masked if i not in turns]:
            raise ValueError(
                f'messages {others} have weight 0 or train false; with train_on="all", only '
                "replies of the assistant can be left out"
            )
        found = yield from _find_replies(messages, masked, tokenizer, stops, tools)
        ids, spans, hidden = found
        return make_example(ids, ~_in_replies(spans, hidden))
    if train_on == "last_response":
        turns = turns[-1:]
    wanted = [i for i in turns if i not in masked]
    found = yield from _find_replies(messages, wanted, tokenizer, stops, tools)
    ids, spans, replies = found
    return make_example(ids, _in_replies(spans, replies))


def _find_replies(
    messages: Sequence[Row],
    wanted: Sequence[int],
    tokenizer: Tokenizer,
    stops: Sequence[int],
    tools: Tools,
) -> Generator[Request, Encoded, tuple[list[int], Int[np.ndarray, "t 2"], list[Span]]]:
    """Ids of a chat, the characters of each, and the characters of the replies `wanted`."""
    rendered = tokenizer.render_replies(messages, tools=tools)
    text = tokenizer.render_chat(messages, tools=tools) if rendered is None else rendered[0]
    encoded = yield Request(text)
    ids, spans = encoded.ids, encoded.span_array
    if rendered is None:
        chat = Chat(messages, text, ids, encoded.spans, tokenizer, stops, tools)
        return ids, spans, [find_reply(chat, i) for i in wanted]
    blocks = rendered[1]
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if [*wanted] == turns and len(blocks) == len(turns):
        return ids, spans, blocks  # one block each: no need to render the chat twice per reply
    # A block does not say to which message it belongs. We count the blocks of the chat up to
    # message i, without and with it.
    chosen: list[Span] = []
    for i in wanted:
        before = len(_blocks(messages[:i], tokenizer, tools))
        is_last = i + 1 == len(messages)
        until = len(blocks) if is_last else len(_blocks(messages[: i + 1], tokenizer, tools))
        chosen += blocks[before:until]
    return ids, spans, chosen


def _blocks(messages: Sequence[Row], tokenizer: Tokenizer, tools: Tools) -> list[Span]:
    rendered = tokenizer.render_replies(messages, tools=tools) if messages else None
    return rendered[1] if rendered else []


def _in_replies(spans: Int[np.ndarray, "t 2"], replies: Sequence[Span]) -> np.ndarray:
    """For each token, whether it shares a character with a reply or is an empty token inside one.

    Args:
        spans: first character and end of every token.
        replies: first character and end of every reply.
    """
    a, b = spans.T
    inside = np.zeros(len(spans), dtype=bool)
    for start, end in replies:
        inside |= (a < end) & ((b > start) | ((a == b) & (a >= start)))
    return inside
