"""encode_chat(): token ids of a rendered chat, and which of them the assistant says."""

from collections.abc import Sequence

import numpy as np

from fastlora.data.examples import Example, TrainOn, make_example
from fastlora.data.rows import Row
from fastlora.text.tokenizer import Span, Tokenizer


def encode_chat(
    messages: Sequence[Row], first: int, tokenizer: Tokenizer, train_on: TrainOn
) -> Example:
    """The tokens of a rendered chat. With train_on="responses", the assistant's replies among
    `messages[first:]` are trained; with "all", every token is.

    A template with {% generation %} blocks marks the replies itself. For any other template we find
    each reply by rendering the messages before it as a prompt.
    """
    if train_on == "all":
        ids = tokenizer.encode(tokenizer.render_chat(messages), add_special_tokens=False)
        return make_example(ids, [True] * len(ids))
    if (rendered := tokenizer.render_replies(messages)) is not None:
        text, replies = rendered
        # Replies of the prompt's messages come first; leave them out.
        before = tokenizer.render_replies(messages[:first]) if first else None
        replies = replies[len(before[1]) if before else 0 :]
        ids, spans = tokenizer.encode_with_offsets(text)
    else:
        text = tokenizer.render_chat(messages)
        ids, spans = tokenizer.encode_with_offsets(text)
        # Without marks in the template: one rendering for each reply.
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i >= first]
        replies = [_find_reply(messages, i, text, (ids, spans), tokenizer) for i in turns]
    return make_example(ids, _in_replies(spans, replies))


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


def _find_reply(
    messages: Sequence[Row],
    i: int,
    text: str,
    tokens: tuple[list[int], list[Span]],
    tokenizer: Tokenizer,
) -> Span:
    """The characters of `text` that the model has to produce as message `i`, up to its end of turn.

    Text that the template writes after the end-of-turn token (ChatML's line break) is not part of
    the reply, because generation has stopped by then.

    Some templates shorten a reply once more messages follow (Qwen3 drops its thinking). Then the
    reply is the text between the prompt and the first end-of-turn token, provided that it is the
    message's own text or the last part of it.
    """
    start = len(_prompt(messages[:i], text, tokenizer))
    turn = text if i + 1 == len(messages) else tokenizer.render_chat(messages[: i + 1])
    # None if the template renders the turn in another way once more messages follow.
    turn_end = len(turn) if text.startswith(turn) and len(turn) > start else None
    eos_ends = [
        end
        for token, (a, end) in zip(*tokens, strict=True)
        if token in tokenizer.eos_token_ids and a >= start and (turn_end is None or end <= turn_end)
    ]
    if turn_end is not None:
        only_space_follows = eos_ends and not text[eos_ends[-1] : turn_end].strip()
        return start, eos_ends[-1] if only_space_follows else turn_end
    reply = text[start : eos_ends[0]] if eos_ends else ""
    eos_text = next((e for e in _eos_texts(tokenizer) if reply.endswith(e)), "")
    # The template changed the turn. Accept the text between prompt and end of turn if it is the
    # message or its last part, without the white space around it.
    body = reply.removesuffix(eos_text).strip()
    content = str(messages[i].get("content") or "").strip()
    if not (body and content and (content.endswith(body) or body.endswith(content))):
        raise ValueError(
            f"the chat template ({tokenizer.chat_templates['default'].source}) changes message "
            f"{i + 1} once more messages follow, so the reply cannot be found. Use "
            'train_on="all", or a template with {% generation %} blocks'
        )
    return start, eos_ends[0]


def _prompt(messages: Sequence[Row], text: str, tokenizer: Tokenizer) -> str:
    """The text from which generation starts after `messages`. `text` must begin with it."""
    prompt = tokenizer.render_chat(messages, add_generation_prompt=True)
    if not text.startswith(prompt):
        raise ValueError(
            f"the chat template ({tokenizer.chat_templates['default'].source}) renders the first "
            f"{len(messages)} messages differently once more follow, so the reply cannot be told "
            'from its prompt. Use train_on="all", or a template with {% generation %} blocks'
        )
    return prompt


def _eos_texts(tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.decode([i], skip_special_tokens=False) for i in tokenizer.eos_token_ids]
