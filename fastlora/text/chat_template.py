"""A chat's text: an untrusted Jinja template of a model's folder, rendered in jinja2's sandbox.

The oracle is transformers 5.23's `apply_chat_template`. A file of its own because jinja2 takes
50 ms to import, which only a chat needs.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment


# ── 1. what callers use ───────────────────────────────────────────────────────────────────
class ChatTemplate(NamedTuple):
    """A Jinja template, and the file it came from, for error messages."""

    text: str
    source: str


# What a template can raise: in it, or, of Python's compiler, by its nesting.
_ERRORS = (
    *(jinja2.TemplateError, LookupError, ArithmeticError, TypeError, ValueError, AttributeError),
    *(RecursionError, MemoryError, SyntaxError),
)


# A product or power beyond these is refused: 'a' * 10**9 would take a gigabyte in one step.
_LONGEST, _LARGEST = 1_000_000, 2**64


def render(
    template: str,
    messages: Sequence[Any],
    special_tokens: Mapping[str, str],
    *,
    source: str,
    add_generation_prompt: bool = False,
    marks: tuple[str, str] = ("", ""),
) -> str:
    """The text of `messages`, with `marks` written around every {% generation %} block.

    Raises:
        ValueError: no messages, messages that are not JSON values, or a template that refuses them
            or tries something unsafe. `source` says in it where the template came from.
    """
    chat = _plain_messages(messages)
    try:
        return _compile(template, marks).render(
            messages=chat,
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **special_tokens,
        )
    except SecurityError as error:
        raise ValueError(
            f"{source} tries something unsafe: {error}. Do not use this template."
        ) from error
    except _ERRORS as error:
        raise ValueError(f"{source} does not render these messages: {error}") from error


def _plain_messages(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """A copy of `messages` in plain JSON types: all that a template, which is untrusted code, sees.

    Keys whose value is None are dropped, as templates expect, and a reply's reasoning is given
    under both names that templates of the Hub read.
    """
    if isinstance(messages, str) or not all(isinstance(m, Mapping) for m in messages):
        raise ValueError(
            f"messages must be a list of dicts with role and content; got {messages!r:.80}"
        )
    if not messages:
        raise ValueError("a chat needs at least one message; got none")
    present = [{k: v for k, v in message.items() if v is not None} for message in messages]
    try:
        chat = json.loads(json.dumps(present))
    except TypeError as error:
        raise ValueError(f"messages must hold JSON values only: {error}") from error
    for i, message in enumerate(chat):
        names = ("reasoning_content", "thinking", "reasoning")
        if reasoning := [message[name] for name in names if name in message]:
            chat[i] = {"thinking": reasoning[0], **message, "reasoning_content": reasoning[0]}
    return chat


@lru_cache(maxsize=32)  # a template costs some 10 ms to compile, and training renders every row
def _compile(text: str, marks: tuple[str, str]) -> jinja2.Template:
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.extend(generation_marks=marks)
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "namespace": _Namespace,
        "dict": lambda *args, **items: dict(*args, **items),  # without dict's unbound methods
    }
    return environment.from_string(text)


class _Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox, which bounds range(), with bounds on products and powers besides."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and (abs(left) > _LARGEST or abs(right) > 64):
            raise SecurityError(f"a power as large as {left!r:.20} ** {right!r:.20}")
        sizes = [len(x) if isinstance(x, str | list | tuple) else abs(x) for x in (left, right)]
        if any(isinstance(x, str | list | tuple) for x in (left, right)) and (
            sizes[0] * sizes[1] > _LONGEST
        ):
            raise SecurityError(f"a text or list of {sizes[0]} * {sizes[1]} items")
        return super().call_binop(context, operator, left, right)


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}`: its body, between the environment's two marks."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's protocol)

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        before, after = (
            nodes.Output([nodes.TemplateData(mark)])
            for mark in self.environment.generation_marks  # pyright: ignore[reportAttributeAccessIssue]
        )
        return nodes.Scope([before, *body, after]).set_lineno(line)


class _Namespace(jinja2.utils.Namespace):
    """jinja2's namespace without underscored names, the way to Python's internals."""

    def __init__(self, *args: Any, **items: Any) -> None:
        super().__init__()
        for name, value in dict(*args, **items).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a namespace may not hold the underscored name {name!r}")
        super().__setitem__(name, value)


def _to_json(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """JSON as transformers writes it; jinja2's own filter would escape <, > and & for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
