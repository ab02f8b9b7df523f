"""Where texts begin and replies end: one BOS, and the tokens at which a reply stops."""

from fastlora.text.tokenizer import Tokenizer

# The reply has private-use characters around it, so that it occurs only once in the chat.
_PROBE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\ue0f4reply\ue0f4"}]


def encode_with_one_bos(tokenizer: Tokenizer, text: str) -> list[int]:
    """As `tokenizer.encode(text)`, but a text that begins with BOS gets no second one.

    A chat that a template has rendered begins with BOS already.
    """
    ids, bos = tokenizer.encode(text), tokenizer.bos_token_id
    # Two: the text's BOS, and the one that the tokenizer adds.
    if bos is None or ids[:2] != [bos, bos]:
        return ids
    without = tokenizer.encode(text, add_special_tokens=False)
    # A tokenizer that adds none was given a text that begins with two, which stay.
    return ids[1:] if without[:1] == [bos] and len(without) < len(ids) else ids


def reply_stop_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids at which a reply stops: the tokenizer's eos ids and the template's end of turn.

    Base models with a chat template often name <|endoftext|> as end of text, while the template
    ends a turn with <|im_end|>.
    """
    end = unnamed_end_of_turn(tokenizer)
    return tokenizer.eos_token_ids if end is None else (*tokenizer.eos_token_ids, end)


def unnamed_end_of_turn(tokenizer: Tokenizer) -> int | None:
    """The id of the token that the default template writes after a reply, unless it is an eos id.

    None also if no added token follows the reply, or the one that follows begins the next reply.
    """
    return _unnamed_end(tokenizer, _tokens_after_reply(tokenizer))


def _unnamed_end(tokenizer: Tokenizer, tokens: list[int] | None) -> int | None:
    """`unnamed_end_of_turn`, from the tokens behind a reply."""
    if not tokens or tokens[0] in tokenizer.eos_token_ids:
        return None
    # Ordinary tokens may occur inside a reply, where generation must not stop.
    if tokens[0] not in tokenizer.backend.get_added_tokens_decoder():
        return None
    # A template that has no end of turn may write the next reply's header there.
    before = tokenizer.render_chat(_PROBE[:1])
    after = tokenizer.render_chat(_PROBE[:1], add_generation_prompt=True)
    opening = after[len(before) :] if after.startswith(before) else ""
    in_opening = tokens[0] in tokenizer.encode(opening, add_special_tokens=False)
    return None if in_opening else tokens[0]


def stop_warning(tokenizer: Tokenizer) -> str | None:
    """A warning if the default template ends replies in an unusual way, else None."""
    tokens = _tokens_after_reply(tokenizer)
    if tokens is None:
        return None
    source = tokenizer.chat_templates["default"].source
    if (end := _unnamed_end(tokenizer, tokens)) is not None:
        token = tokenizer.decode([end], skip_special_tokens=False)
        return (
            f"the chat template ({source}) ends a reply with {token!r} (id {end}), which the "
            "tokenizer's files do not name as end of text. It is trained as the end of a reply, "
            "and generate_text stops at it. For other programs, add the id to eos_token_id in "
            "generation_config.json."
        )
    if not set(tokens) & set(tokenizer.eos_token_ids):
        return (
            f"the chat template ({source}) writes no end-of-text token after a reply, so a model "
            "that is trained on it does not learn to stop. Let the template end replies with "
            "eos_token."
        )
    return None


def _tokens_after_reply(tokenizer: Tokenizer) -> list[int] | None:
    """The ids behind the last reply of a chat, without white space.

    None without a default template, or if the template refuses a simple chat.
    """
    if "default" not in tokenizer.chat_templates:
        return None
    try:
        text = tokenizer.render_chat(_PROBE)
    except ValueError:
        return None
    reply = _PROBE[1]["content"]
    if reply not in text:
        return None
    end = text.rindex(reply) + len(reply)
    ids, spans = tokenizer.encode_with_offsets(text)
    return [i for i, (a, b) in zip(ids, spans, strict=True) if a >= end and text[a:b].strip()]
