"""replies."""

from collections.abc import Sequence

import numpy as np

from fastlora.data.examples import Example, TrainOn, make_example
from fastlora.data.rows import Row
from fastlora.text.tokenizer import Span, Tokenizer


# ── chats ──
def encode_chat(
    messages: Sequence[Row], first: int, tokenizer: Tokenizer, train_on: TrainOn
) -> Example:
    """A rendered chat; the replies among `messages[first:]` are trained."""
    if train_on == "all":
        ids = tokenizer.encode(tokenizer.render_chat(messages), add_special_tokens=False)
        return make_example(ids, [True] * len(ids))
    if (rendered := tokenizer.render_replies(messages)) is not None:
        text, replies = rendered
        before = tokenizer.render_replies(messages[:first]) if first else None
        replies = replies[len(before[1]) if before else 0 :]
        ids, spans = tokenizer.encode_with_offsets(text)
    else:
        text = tokenizer.render_chat(messages)
        ids, spans = tokenizer.encode_with_offsets(text)
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i >= first]
        replies = [_find_reply(messages, i, text, (ids, spans), tokenizer) for i in turns]
    return make_example(ids, _overlapping(spans, replies))


def _overlapping(spans: Sequence[Span], replies: Sequence[Span]) -> np.ndarray:
    """Which tokens share a character with a reply, or lie inside one without a character."""
    a, b = np.array(spans, dtype=np.int64).reshape(-1, 2).T
    inside = np.zeros(len(spans), dtype=bool)
    for start, end in replies:
        inside |= (a < end) & ((b > start) | ((a == b) & (a >= start)))
    return inside


def _prompt(messages: Sequence[Row], text: str, tokenizer: Tokenizer) -> str:
    """What generation starts from after `messages`, which must be how `text` begins."""
    prompt = tokenizer.render_chat(messages, add_generation_prompt=True)
    if not text.startswith(prompt):
        raise ValueError(
            f"the chat template ({tokenizer.chat_templates['default'].source}) renders the first "
            f"{len(messages)} messages differently once more follow, so the reply cannot be told "
            'from its prompt. Use train_on="all", or a template with {% generation %} blocks'
        )
    return prompt


def _find_reply(
    messages: Sequence[Row],
    i: int,
    text: str,
    tokens: tuple[list[int], list[Span]],
    tokenizer: Tokenizer,
) -> Span:
    """The characters of `text` that the model has to say as message `i`, up to its end of turn.

    What the template writes behind the end of turn (ChatML's line break) is no part of the reply:
    generation has stopped by then. A template that shortens a reply once more messages follow
    (Qwen3 drops its thinking) still has it between the prompt and the first end of turn; it is
    taken from there if it is the message's own text or the tail of it.
    """
    start = len(_prompt(messages[:i], text, tokenizer))
    turn = text if i + 1 == len(messages) else tokenizer.render_chat(messages[: i + 1])
    whole = len(turn) if text.startswith(turn) and len(turn) > start else None
    ends = [
        end
        for token, (a, end) in zip(*tokens, strict=True)
        if token in tokenizer.eos_token_ids and a >= start and (whole is None or end <= whole)
    ]
    if whole is not None:
        return start, ends[-1] if ends and not text[ends[-1] : whole].strip() else whole
    said = text[start : ends[0]] if ends else ""
    stop = next((e for e in _eos_texts(tokenizer) if said.endswith(e)), "")
    body, content = said.removesuffix(stop).strip(), str(messages[i].get("content") or "").strip()
    if not (body and content and (content.endswith(body) or body.endswith(content))):
        raise ValueError(
            f"the chat template ({tokenizer.chat_templates['default'].source}) changes message "
            f"{i + 1} once more messages follow, so the reply cannot be found. Use "
            'train_on="all", or a template with {% generation %} blocks'
        )
    return start, ends[0]


def _eos_texts(tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.decode([i], skip_special_tokens=False) for i in tokenizer.eos_token_ids]
