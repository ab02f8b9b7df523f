"""The tag, the filter and the functions that transformers adds to Jinja for chat templates."""

import json
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension


class Generation(Extension):
    """`{% generation %}…{% endgeneration %}`: writes the body between the environment's marks."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's protocol)

    def parse(self, parser: Any) -> nodes.Node:
        """The block's nodes, with the marks around them."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        before, after = (
            nodes.Output([nodes.TemplateData(mark)])
            for mark in self.environment.generation_marks  # pyright: ignore[reportAttributeAccessIssue]
        )
        return nodes.Scope([before, *body, after]).set_lineno(line)


class Namespace(jinja2.utils.Namespace):
    """jinja2's namespace without underscored names, which lead to Python's internals."""

    def __init__(self, *args: Any, **items: Any) -> None:
        super().__init__()
        for name, value in dict(*args, **items).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a namespace may not hold the underscored name {name!r}")
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"  # the contents may hold other namespaces, and so on


def to_json(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """JSON as transformers writes it; jinja2's own filter would escape <, > and & for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def raise_exception(message: str) -> None:
    """Fail with the template's own message, for messages that it does not support."""
    raise jinja2.TemplateError(message)


def strftime_now(form: str) -> str:
    """The local time, in a form such as "%d %b %Y". Llama 3's templates write the date."""
    if len(form) > 1000:
        raise SecurityError(f"a time format of {len(form):,} characters")
    return datetime.now().strftime(form)
