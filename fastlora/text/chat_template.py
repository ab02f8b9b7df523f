"""A chat as text: its messages, rendered by the Jinja template of a model's folder.

The texts are those of transformers 5.23's `apply_chat_template`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fastlora.arguments import Rule

Messages = Sequence[Mapping[str, Any]]

Span = tuple[int, int]  # characters [start, end)

# Written around {% generation %} blocks to find them in the text. A word between private-use
# characters, which no vocabulary gives a meaning to, does not occur in a user's text by chance.
_MARKS = ("\ue0f0generation\ue0f1", "\ue0f1generation\ue0f0")


class ChatTemplate(NamedTuple):
    """A Jinja template."""

    text: str
    source: str  # the file that it comes from, for error messages


def _are_messages(value: Any) -> bool:
    is_list = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    return is_list and all(
        isinstance(message, Mapping) and isinstance(message.get("role"), str) for message in value
    )


def _are_tools(value: Any) -> bool:
    is_list = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    return is_list and all(isinstance(tool, Mapping) for tool in value)


MESSAGES = Rule(_are_messages, "a list of dicts with role and content")

TOOLS = Rule(_are_tools, "a list of dicts that describe functions, as JSON schemas")

# Variables that `render` sets itself.
_RESERVED = ("messages", "tools", "documents", "add_generation_prompt")


def _are_template_kwargs(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    names = [isinstance(name, str) and name.isidentifier() for name in value]
    reserved = [name in _RESERVED or str(name).endswith("_token") for name in value]
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return all(names) and not any(reserved)


TEMPLATE_KWARGS = Rule(
    _are_template_kwargs,
    "a dict of JSON values by the names of variables of the chat template, such as"
    ' {"enable_thinking": False}; without messages, tools, documents, add_generation_prompt and'
    " special tokens",
)


def template_kwargs_problem(
    template_kwargs: Mapping[str, Any], templates: Mapping[str, ChatTemplate]
) -> str | None:
    """Why these variables have no effect on any template; None if each is read by one."""
    unread = [
        name
        for name in template_kwargs
        if not any(re.search(rf"\b{name}\b", template.text) for template in templates.values())
    ]
    if not unread:
        return None
    where = sorted(template.source for template in templates.values()) or "it has none"
    return f"template_kwargs: no chat template of the tokenizer ({where}) reads {unread}"


def render(
    template: ChatTemplate,
    messages: Messages,
    special_tokens: Mapping[str, str],
    *,
    add_generation_prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    marks: tuple[str, str] = ("", ""),
) -> str:
    """The text of a chat.

    Args:
        template: one of the tokenizer's.
        messages: the chat.
        special_tokens: variables of the template: "bos_token" -> "<s>", ...
        add_generation_prompt: end with the beginning of the assistant's next message.
        tools: descriptions of functions that the model may call, as JSON schemas.
        template_kwargs: more variables of the template.
        marks: written before and after every {% generation %} block.

    Raises:
        ValueError: no messages, messages or tools that are not JSON values, or a template that
            fails with them or tries something unsafe.
    """
    from fastlora.text.template_sandbox import run_template  # noqa: PLC0415  jinja2 takes 50 ms

    variables = {
        **json.loads(json.dumps(dict(template_kwargs or {}))),
        **special_tokens,
        "messages": _json_copy(messages),
        "tools": None if tools is None else _json_values("tools", list(tools)),
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
    }
    return run_template(template.text, variables, source=template.source, marks=marks)


def render_replies(
    template: ChatTemplate,
    messages: Messages,
    special_tokens: Mapping[str, str],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[str, list[Span]] | None:
    """A chat's text and the spans that the template writes inside {% generation %} blocks.

    None if the template has no such block.

    Raises:
        ValueError: as `render`; also if the template changes the text of a block afterwards.
    """
    if not re.search(r"{%[-+]?\s*generation\s*[-+]?%}", template.text):
        return None
    given: dict[str, Any] = {"tools": tools, "template_kwargs": template_kwargs}
    marked = render(template, messages, special_tokens, **given, marks=_MARKS)
    text, spans, start = "", [], 0
    for piece in re.split(f"({'|'.join(_MARKS)})", marked):
        if piece == _MARKS[0]:
            start = len(text)
        elif piece == _MARKS[1]:
            spans.append((start, len(text)))
        else:
            text += piece
    if _may_change(template, [messages, tools, template_kwargs]) and text != render(
        template, messages, special_tokens, **given
    ):
        raise ValueError(
            f"{template.source}: what a {{% generation %}} block writes is changed afterwards "
            "(a filter around it?), so the replies cannot be located. Move the block outwards."
        )
    return text, spans


def _may_change(template: ChatTemplate, values: Any) -> bool:
    """Whether the text without marks may differ from the text rendered without them."""
    from fastlora.text.template_sandbox import writes_blocks_directly  # noqa: PLC0415

    has_marks = _MARKS[0][0] in json.dumps(values, ensure_ascii=False, default=str)
    return has_marks or not writes_blocks_directly(template.text)


def _json_copy(messages: Messages) -> list[dict[str, Any]]:
    """A copy of `messages` in JSON's types: the template is untrusted code and sees only this.

    Keys whose value is None are dropped, as templates expect. A reply's reasoning is given under
    both names that templates on the Hub read.
    """
    if not messages:
        raise ValueError("messages=[]: a chat needs at least one message")
    present = [{k: v for k, v in message.items() if v is not None} for message in messages]
    chat = _json_values("messages", present)
    for i, message in enumerate(chat):
        names = ("reasoning_content", "thinking", "reasoning")
        if reasoning := [message[name] for name in names if name in message]:
            chat[i] = {"thinking": reasoning[0], **message, "reasoning_content": reasoning[0]}
    return chat


def _json_values(name: str, value: list[Any]) -> list[Any]:
    """A copy of an argument in JSON's types."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name} must hold JSON values only: {error}") from error


def choose_template(templates: Mapping[str, ChatTemplate], name: str | None) -> ChatTemplate:
    """The template of a name; None is "default".

    Raises:
        ValueError: there is none of this name, or none at all.
    """
    if not templates:
        raise ValueError(
            "this tokenizer has no chat template: its folder has neither chat_template.jinja "
            "nor a chat_template in tokenizer_config.json. Put a chat_template.jinja there (an "
            "instruct model of the same family has one), or give plain text, not messages."
        )
    chosen = "default" if name is None else name
    if chosen not in templates:
        raise ValueError(
            f"chat_template={name!r}: this tokenizer has no template named {chosen!r}, only "
            f"{sorted(templates)}"
        )
    return templates[chosen]
