"""encode_chat(): token ids of a rendered chat, and which of them the assistant says."""

from collections.abc import Sequence

import numpy as np

from fastlora.data.examples import Example, TrainOn, make_example
from fastlora.data.reply_spans import Chat, find_reply
from fastlora.data.rows import Row, is_masked
from fastlora.text.tokenizer import Span, Tokenizer


def encode_chat(
    messages: Sequence[Row],
    first: int,
    tokenizer: Tokenizer,
    train_on: TrainOn,
    stops: Sequence[int],
) -> Example:
    """The tokens of a rendered chat. With train_on="responses", the assistant's replies among
    `messages[first:]` are trained; with "all", every token is.

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
        ids = tokenizer.encode(tokenizer.render_chat(messages), add_special_tokens=False)
        return make_example(ids, [True] * len(ids))
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i >= first]
    if train_on == "all":
        if others := [i + 1 for i in masked if i not in turns]:
            raise ValueError(
                f'messages {others} have weight 0 or train false; with train_on="all", only '
                "replies of the assistant can be left out"
            )
        ids, spans, hidden = _find_replies(messages, masked, tokenizer, stops)
        return make_example(ids, ~_in_replies(spans, hidden))
    wanted = [i for i in turns if i not in masked]
    ids, spans, replies = _find_replies(messages, wanted, tokenizer, stops)
    return make_example(ids, _in_replies(spans, replies))


def _find_replies(
    messages: Sequence[Row], wanted: Sequence[int], tokenizer: Tokenizer, stops: Sequence[int]
) -> tuple[list[int], list[Span], list[Span]]:
    """Ids of a chat, the characters of each, and the characters of the replies `wanted`."""
    rendered = tokenizer.render_replies(messages)
    text = tokenizer.render_chat(messages) if rendered is None else rendered[0]
    ids, spans = tokenizer.encode_with_offsets(text)
    if rendered is None:
        chat = Chat(messages, text, ids, spans, tokenizer, stops)
        return ids, spans, [find_reply(chat, i) for i in wanted]
    # A block does not say to which message it belongs. We count the blocks of the chat up to
    # message i, without and with it.
    blocks = rendered[1]
    chosen: list[Span] = []
    for i in wanted:
        before = len(_blocks(messages[:i], tokenizer))
        until = (
            len(blocks) if i + 1 == len(messages) else len(_blocks(messages[: i + 1], tokenizer))
        )
        chosen += blocks[before:until]
    return ids, spans, chosen


def _blocks(messages: Sequence[Row], tokenizer: Tokenizer) -> list[Span]:
    rendered = tokenizer.render_replies(messages) if messages else None
    return rendered[1] if rendered else []


def _in_replies(spans: Sequence[Span], replies: Sequence[Span]) -> np.ndarray:
    """For each token, whether it shares a character with a reply or is an empty token inside one.

    Args:
        spans: first character and end of every token.
        replies: first character and end of every reply.
    """
    a, b = np.array(spans, dtype=np.int64).reshape(-1, 2).T
    inside = np.zeros(len(spans), dtype=bool)
    for start, end in replies:
        inside |= (a < end) & ((b > start) | ((a == b) & (a >= start)))
    return inside
