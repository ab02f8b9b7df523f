"""go_template(): a chat template as Ollama's Go template, for templates that only put text around
each message.

The text before and after the messages of each role is found by rendering chats. The result is
checked: it must give the same text for longer chats.
"""

from typing import Any, NamedTuple

from fastlora.text.tokenizer import Tokenizer


class _Around(NamedTuple):
    """The text before and after the content of one role's messages."""

    before: str
    after: str


class _Pieces(NamedTuple):
    bos: str  # at the beginning of every chat
    default_system: str  # written if the chat has no system message
    system: _Around | None  # None: the template refuses system messages
    user: _Around
    assistant: _Around
    opening: str  # of the next reply


def go_template(tokenizer: Tokenizer) -> str | None:
    """The default chat template in Go; None if there is none, or it does more than put text around
    each message."""
    if "default" not in tokenizer.chat_templates:
        return None
    pieces = _pieces(tokenizer)
    if pieces is None or not all(_agrees(tokenizer, pieces, chat) for chat in _chats(pieces)):
        return None
    texts = [x for part in pieces for x in (part if isinstance(part, tuple) else [part]) if x]
    # Go would read these as its own; the Modelfile ends the template at three quotes.
    if any(sign in text for text in texts for sign in ("{{", "}}", '"""')):
        return None
    return _in_go(tokenizer, pieces)


def _in_go(tokenizer: Tokenizer, pieces: _Pieces) -> str:
    roles = {"system": pieces.system, "user": pieces.user, "assistant": pieces.assistant}
    cases = [
        f'if eq .Role "{role}" }}}}{around.before}{{{{ .Content }}}}{around.after}'
        for role, around in roles.items()
        if around is not None
    ]
    loop = "{{ range .Messages }}{{ " + "{{ else ".join(cases) + "{{ end }}{{ end }}"
    default = pieces.default_system
    start = f"{{{{ if not .System }}}}{default}{{{{ end }}}}" if default else ""
    # Ollama encodes with BOS if the tokenizer adds one.
    adds_bos = tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]
    return ("" if adds_bos else pieces.bos) + start + loop + pieces.opening


def _pieces(tokenizer: Tokenizer) -> _Pieces | None:
    """The pieces of which the template seems to put chats together."""
    one, both = _render(tokenizer, "user"), _render(tokenizer, "user", "assistant")
    three = _render(tokenizer, "user", "assistant", "user")
    opened = _render(tokenizer, "user", opened=True)
    if one is None or both is None or three is None or opened is None:
        return None
    first, _, user_after = one.partition(_content(0))
    assistant_after = both.partition(_content(1))[2]
    between = three.partition(_content(0))[2].partition(_content(1))[0]
    again = three.partition(_content(1))[2].partition(_content(2))[0]
    user_before = again.removeprefix(assistant_after)
    start = first.removesuffix(user_before)
    bos = tokenizer.bos_token or ""
    bos = bos if start.startswith(bos) else ""
    with_system, system = _render(tokenizer, "system", "user"), None
    if with_system is not None:
        before, _, rest = with_system.partition(_content(0))
        after = rest.partition(_content(1))[0].removesuffix(user_before)
        system = _Around(before.removeprefix(bos), after)
    return _Pieces(
        bos=bos,
        default_system=start.removeprefix(bos),
        system=system,
        user=_Around(user_before, user_after),
        assistant=_Around(between.removeprefix(user_after), assistant_after),
        opening=opened.removeprefix(one),
    )


def _chats(pieces: _Pieces) -> list[tuple[str, ...]]:
    turns = ("user", "assistant", "user", "assistant", "user")
    chats = [turns[:1], turns[:3], turns]
    return chats + ([("system", *chat) for chat in chats] if pieces.system else [])


def _agrees(tokenizer: Tokenizer, pieces: _Pieces, roles: tuple[str, ...]) -> bool:
    """Whether the pieces give what the template gives, for a chat that waits for a reply."""
    text = pieces.bos + ("" if roles[0] == "system" else pieces.default_system)
    for i, role in enumerate(roles):
        around = getattr(pieces, role)
        text += around.before + _content(i) + around.after
    return text + pieces.opening == _render(tokenizer, *roles, opened=True)


def _render(tokenizer: Tokenizer, *roles: str, opened: bool = False) -> str | None:
    """A chat of these roles; None if the template refuses it."""
    chat: list[dict[str, Any]] = [
        {"role": role, "content": _content(i)} for i, role in enumerate(roles)
    ]
    try:
        return tokenizer.render_chat(chat, add_generation_prompt=opened)
    except ValueError:
        return None


def _content(i: int) -> str:
    # Between private-use characters, so that it occurs once in the chat.
    return f"\ue0f4text {i}\ue0f4"
