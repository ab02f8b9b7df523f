"""Run an untrusted Jinja template of a model's folder in jinja2's sandbox.

Only chat_template.py imports this file, and only when a chat is rendered: importing jinja2 takes
50 ms.
"""

import json
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

# What rendering raises: errors in the template, and Python's compiler's on deep nesting.
_TEMPLATE_ERRORS = (
    *(jinja2.TemplateError, LookupError, ArithmeticError, TypeError, ValueError, AttributeError),
    *(RecursionError, MemoryError, SyntaxError),
)

# Larger products and powers are refused: 'a' * 10**9 would allocate a gigabyte in one step.
_MAX_PRODUCT_ITEMS = 1_000_000
_MAX_POWER_BASE = 2**64
_MAX_EXPONENT = 64


def run_template(
    template: str, variables: Mapping[str, Any], *, source: str, marks: tuple[str, str] = ("", "")
) -> str:
    """The text that a template writes.

    Args:
        template: Jinja source.
        variables: what the template may read. The sandbox keeps it from changing them.
        source: where the template comes from, for error messages.
        marks: written before and after the body of every {% generation %} block.

    Raises:
        ValueError: the template fails with these variables, or tries something unsafe.
    """
    try:
        return _compile(template, marks).render(**variables)
    except SecurityError as error:
        raise ValueError(
            f"{source} tries something unsafe: {error}. Do not use this template."
        ) from error
    except _TEMPLATE_ERRORS as error:
        raise ValueError(f"{source} does not render these messages: {error}") from error


@lru_cache(maxsize=32)  # compiling a template takes about 10 ms, and training renders every row
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
        "dict": lambda *args, **items: dict(*args, **items),  # hides dict's unbound methods
    }
    return environment.from_string(text)


class _Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox, which limits range(), with limits on products and powers added."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and (abs(left) > _MAX_POWER_BASE or abs(right) > _MAX_EXPONENT):
            raise SecurityError(f"a power as large as {left!r:.20} ** {right!r:.20}")
        sizes = [len(x) if isinstance(x, str | list | tuple) else abs(x) for x in (left, right)]
        if any(isinstance(x, str | list | tuple) for x in (left, right)) and (
            sizes[0] * sizes[1] > _MAX_PRODUCT_ITEMS
        ):
            raise SecurityError(f"a text or list of {sizes[0]} * {sizes[1]} items")
        return super().call_binop(context, operator, left, right)


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}`: writes the body between the environment's marks."""

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
    """jinja2's namespace without underscored names, which lead to Python's internals."""

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
