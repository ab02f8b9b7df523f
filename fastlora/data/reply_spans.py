"""find_reply(): which characters of a rendered chat the model has to produce as one reply.

A chat template is a program, so we learn by experiment where it writes a message: we render the
chat once more with other text in that message and compare.

    chat       <user> Hi <end> <bot> Hello <end>
    marked     <user> Hi <end> <bot> MARK <end>      differs in [d, e): "Hello"
    prompt     <user> Hi <end> <bot>                 the reply begins behind it
    reply      Hello <end>                           up to the first stop at or after d
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fastlora.data.row_forms import Row
from fastlora.text.tokenizer import Span, Tokenizer

# Private-use characters, which no template changes and no message begins or ends with by chance.
_MARK, _OTHER_MARK = "\ue0f2reply\ue0f2", "\ue0f3other\ue0f3"


class Chat(NamedTuple):
    """A rendered chat and its tokens."""

    messages: Sequence[Row]
    text: str
    ids: list[int]
    spans: list[Span]  # first character and end of every token
    tokenizer: Tokenizer
    stops: Sequence[int]  # ids at which generation ends
    tools: Sequence[Mapping[str, Any]] | None = None  # that the template describes to the model

    def render(self, messages: Sequence[Row], *, add_generation_prompt: bool = False) -> str:
        """Other messages rendered as this chat is."""
        return self.tokenizer.render_chat(
            messages, add_generation_prompt=add_generation_prompt, tools=self.tools
        )

    @property
    def source(self) -> str:
        """The file of the chat template."""
        return self.tokenizer.chat_templates["default"].source


def find_reply(chat: Chat, i: int) -> Span:
    """The characters that the model has to produce as message `i`, up to the first stop.

    Text behind the stop (ChatML's line break, the next header, a second end token) is not part of
    the reply, because generation has stopped by then. Without a stop, the reply is all that the
    template writes behind the prompt for this message.

    Some templates shorten a reply once more messages follow (Qwen3 drops its thinking); then the
    shortened reply is trained. Others open thinking in the prompt and drop it from the history (R1,
    QwQ); then the reply begins where the history leaves the prompt.

    Raises:
        ValueError: the reply cannot be told from its prompt or from the next message.
    """
    marked = _with_mark(chat, i)
    if marked is None:
        raise _changed(chat, i, "leaves out")
    d = _common_prefix(chat.text, marked)
    e = len(chat.text) - _common_suffix(chat.text[d:], marked[d:])
    start = _start(chat, i, marked, d, e)
    is_last = i + 1 == len(chat.messages)
    turn = chat.text if is_last else chat.render(chat.messages[: i + 1])
    # Otherwise the template renders the turn in another way once more messages follow.
    complete = chat.text.startswith(turn) and max(start, e) <= len(turn) > start
    most = len(turn) if complete else len(chat.text)
    stop = next(
        (
            end
            for token, (a, end) in zip(chat.ids, chat.spans, strict=True)
            if token in chat.stops and start <= a and end <= most
        ),
        None,
    )
    if complete:
        return start, most if stop is None else stop
    if stop is None or stop < d or _MARK not in marked or _reaches_next(chat, i, marked, stop - e):
        raise _changed(chat, i, "changes")
    return start, stop


def _start(chat: Chat, i: int, marked: str, d: int, e: int) -> int:
    """The first character of the reply, whose content has the characters [d, e)."""
    before = chat.messages[:i]
    prompt = chat.render(before, add_generation_prompt=True)
    fits = chat.text.startswith(prompt)
    if fits and len(prompt) <= d:
        return len(prompt)
    bare = chat.render(before)
    opening = prompt[len(bare) :] if prompt.startswith(bare) else ""
    if fits and len(bare) <= d and len(prompt) <= e:
        return len(prompt)  # the content begins with the <think> that the prompt ends in
    shared = _common_prefix(prompt, marked)
    if opening and len(bare) < shared <= d:
        return shared
    # Earlier messages are rendered differently once more follow: look for the opening behind them.
    both = _with_mark(chat, i, other=i - 1)
    if opening and both is not None and _OTHER_MARK in both:
        lead = both[both.index(_OTHER_MARK) + len(_OTHER_MARK) : both.index(_MARK)]
        start = d - len(lead.rpartition(opening)[2])
        if opening in lead and chat.text.endswith(opening, 0, start):
            return start
    raise ValueError(
        f"the chat template ({chat.source}) renders the first {i} messages differently once more "
        "follow, so the reply cannot be told from its prompt. Use "
        'train_on="all", or a template with {% generation %} blocks'
    )


def _reaches_next(chat: Chat, i: int, marked: str, behind: int) -> bool:
    """Whether the `behind` characters after the content of message i show the next message."""
    if i + 1 == len(chat.messages):
        return False
    both = _with_mark(chat, i, other=i + 1)
    if both is None:
        return True
    return _common_prefix(marked, both) < marked.index(_MARK) + len(_MARK) + behind


def _with_mark(chat: Chat, i: int, other: int | None = None) -> str | None:
    """The chat with a mark in message i.

    None if that changes nothing: the template does not write the message. With `other`, another
    mark is in that message, and None also means that the template changed the first mark.
    """
    for change in (_content, _tool_name):
        messages = list(chat.messages)
        if (changed := change(messages[i], _MARK)) is None:
            continue
        messages[i] = changed
        if other is not None and other >= 0:
            messages[other] = _content(messages[other], _OTHER_MARK)
        try:
            text = chat.render(messages)
        except ValueError:  # templates may refuse content next to tool calls
            continue
        if text != chat.text and (other is None or _MARK in text):
            return text
    return None


def _content(message: Row, mark: str) -> dict[str, Any]:
    in_parts = isinstance(message.get("content"), list)
    return {**message, "content": [{"type": "text", "text": mark}] if in_parts else mark}


def _tool_name(message: Row, mark: str) -> dict[str, Any] | None:
    """The message with another name of its first tool call; some templates write nothing else."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list) or not calls or not isinstance(calls[0], dict):
        return None
    call = calls[0]
    inner = call.get("function")
    renamed = {**inner, "name": mark} if isinstance(inner, dict) else None
    first = {**call, "name": mark} if renamed is None else {**call, "function": renamed}
    return {**message, "tool_calls": [first, *calls[1:]]}


def _changed(chat: Chat, i: int, what: str) -> ValueError:
    return ValueError(
        f"the chat template ({chat.source}) {what} message {i + 1} once more messages follow, so "
        'the reply cannot be found. Use train_on="all", or a template with {% generation %} blocks'
    )


def _common_prefix(a: str, b: str) -> int:
    """The length of the longest common prefix, by bisection: comparing slices is fast."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _common_suffix(a: str, b: str) -> int:
    return _common_prefix(a[::-1], b[::-1])
