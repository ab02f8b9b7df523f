"""Run an untrusted Jinja template of a model's folder in jinja2's sandbox, with a budget.

Only chat_template.py imports this file, and only when a chat is rendered: importing jinja2 takes
50 ms.
"""

from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from functools import lru_cache, update_wrapper, wraps
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from fastlora.errors import printable
from fastlora.text.template_budget import Budget
from fastlora.text.template_names import (
    Generation,
    Namespace,
    raise_exception,
    strftime_now,
    to_json,
)

# What rendering raises: errors in the template, and Python's compiler's on deep nesting.
_TEMPLATE_ERRORS = (
    *(jinja2.TemplateError, LookupError, ArithmeticError, TypeError, ValueError, AttributeError),
    *(RecursionError, MemoryError, SyntaxError),
)

# Larger products and powers are refused: 'a' * 10**9 would allocate a gigabyte in one step.
_MAX_PRODUCT_ITEMS = 1_000_000
_MAX_POWER_BASE = 2**64
_MAX_EXPONENT = 64

_MAX_TEMPLATE_CHARS = 200_000  # the longest template on the Hub that we know of has 30,000
_MAX_SHOWN_CHARS = 500  # of an error that a template raises

# In place of the marks of a {% generation %} block where a template is only parsed. A template's
# own text cannot hold them: its line feeds are "\n".
_PROBES = ("\r(", "\r)")

# Compiled templates are shared, so functions inside them look up the budget of their rendering.
_BUDGET: ContextVar[Budget] = ContextVar("budget")


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
        ValueError: the template fails with these variables, tries something unsafe, or exceeds its
            `Budget` of steps, text or time.
    """
    if len(template) > _MAX_TEMPLATE_CHARS:
        raise ValueError(
            f"{source} has {len(template):,} characters; expected at most {_MAX_TEMPLATE_CHARS:,}. "
            "Do not use this template."
        )
    token = _BUDGET.set(Budget(variables))
    try:
        return _compile(template, marks).render(**variables)
    except SecurityError as error:
        raise ValueError(
            f"{source} tries something unsafe: {_shown(error)}. Do not use this template."
        ) from error
    except _TEMPLATE_ERRORS as error:
        raise ValueError(f"{source} does not render these messages: {_shown(error)}") from error
    finally:
        _BUDGET.reset(token)


def _shown(error: BaseException) -> str:
    return printable(str(error)[:_MAX_SHOWN_CHARS])


@lru_cache(maxsize=32)
def writes_blocks_directly(text: str) -> bool:
    """Whether no filter, macro or variable receives what {% generation %} blocks write.

    Blocks in loops and conditions write directly, but those in recursive loops do not: a template
    may pass the result of `loop(...)` to a filter. False for a template with a syntax error.
    """
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols", Generation])
    environment.extend(generation_marks=_PROBES)
    try:
        tree = environment.parse(text)
    except _TEMPLATE_ERRORS:
        return False
    captures = (nodes.FilterBlock, nodes.AssignBlock, nodes.Macro, nodes.CallBlock, nodes.Block)
    inside = [node for kind in captures for node in tree.find_all(kind)]
    inside += [loop for loop in tree.find_all(nodes.For) if loop.recursive]
    return not any(
        literal.data in _PROBES for node in inside for literal in node.find_all(nodes.TemplateData)
    )


@lru_cache(maxsize=32)  # compiling a template takes about 10 ms, and training renders every row
def _compile(text: str, marks: tuple[str, str]) -> jinja2.Template:
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.extend(generation_marks=marks)
    environment.filters["tojson"] = to_json
    environment.meter_filters()
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": strftime_now,
        "namespace": Namespace,
        "dict": lambda *args, **items: dict(*args, **items),  # hides dict's unbound methods
    }
    environment.globals.pop("lipsum")  # writes any amount of random text
    return environment.from_string(text)


class _Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox, with all work counted by the budget of the rendering."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, finalize=lambda value: _BUDGET.get().written(value))
        self.concat = _concat
        # For the nodes that _Metering adds to a template.
        self.step, self.made, self.joined, self.sliced = _step, _made, _joined, _sliced

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        return _Metering().visit(tree).set_environment(self)

    def meter_filters(self) -> None:
        """Make all filters count. Called when all of them are there."""
        self.filters = {name: _metered(name, f) for name, f in self.filters.items()}

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        budget = _BUDGET.get()
        if operator == "+":
            return budget.made(left + right)
        if operator == "**" and (abs(left) > _MAX_POWER_BASE or abs(right) > _MAX_EXPONENT):
            raise SecurityError(f"a power as large as {left!r:.20} ** {right!r:.20}")
        if operator == "*":
            sizes = [len(x) if isinstance(x, str | list | tuple) else abs(x) for x in (left, right)]
            if any(isinstance(x, str | list | tuple) for x in (left, right)) and (
                sizes[0] * sizes[1] > _MAX_PRODUCT_ITEMS
            ):
                raise SecurityError(f"a text or list of {sizes[0]} * {sizes[1]} items")
            budget.check_product(left, right)
        if operator == "%":
            budget.check_percent(left, right)
        return budget.made(super().call_binop(context, operator, left, right))

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        # It runs at every iteration and counts itself: the checks below would double its time.
        if obj is _step:
            return _step(*args)
        budget = _BUDGET.get()
        budget.step()
        owner = getattr(obj, "__self__", None)
        if isinstance(owner, str | bytes | int):
            args = budget.check_method(owner, getattr(obj, "__name__", ""), args, kwargs)
        return budget.made(super().call(context, obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def checked(*args: Any, **kwargs: Any) -> str:
            _BUDGET.get().check_format(value.__self__, args, kwargs)
            return wrapped(*args, **kwargs)

        return update_wrapper(checked, value)


class _Metering(NodeTransformer):
    """Adds calls that count to a parsed template, where jinja2 gives the sandbox no say.

    a loop's body            {{ step(characters of the body) }}, then the body
    [a, b], (a, b), {a: b}   made([a, b])
    a ~ b                    joined(a, b)
    a[i:j]                   sliced(a, i, j, None)
    """

    def _counted(self, node: Any) -> Any:
        self.generic_visit(node)
        chars = sum(len(data.data) for part in node.body for data in _literals(part))
        node.body.insert(0, nodes.ExprStmt(_call("step", node, nodes.Const(chars))))
        if getattr(node, "test", None) is not None:  # {% for … if … %}
            node.test = nodes.And(_call("step", node, nodes.Const(0)), node.test)
        return node

    visit_For = visit_Macro = visit_CallBlock = _counted

    def _literal(self, node: Any) -> Any:
        items = list(node.iter_child_nodes())
        self.generic_visit(node)
        # Targets of an assignment must stay as they are. A literal of constants is no longer than
        # the template, whose length has a bound.
        stored = getattr(node, "ctx", "load") != "load"
        if stored or all(isinstance(item, nodes.Const) for item in items):
            return node
        return _call("made", node, node)

    visit_List = visit_Tuple = visit_Dict = _literal

    def visit_Concat(self, node: Any) -> Any:
        self.generic_visit(node)
        return _call("joined", node, *node.nodes)

    def visit_Getitem(self, node: Any) -> Any:
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        bounds = (node.arg.start, node.arg.stop, node.arg.step)
        return _call("sliced", node, node.node, *(b or nodes.Const(None) for b in bounds))


def _literals(node: nodes.Node) -> Iterable[nodes.TemplateData]:
    if isinstance(node, nodes.TemplateData):
        return [node]
    return node.find_all(nodes.TemplateData)


def _call(function: str, near: nodes.Node, *args: nodes.Expr) -> nodes.Call:
    target = nodes.EnvironmentAttribute(function, lineno=near.lineno)
    return nodes.Call(target, list(args), [], None, None, lineno=near.lineno)


def _step(chars: int) -> bool:
    budget = _BUDGET.get()
    budget.step()
    if chars:
        budget.spend(chars)
    return True


def _made(value: Any) -> Any:
    return value  # `call` counts what it returns


def _joined(*values: Any) -> str:
    budget = _BUDGET.get()
    budget.check(sum(map(budget.weight, values)))
    return "".join(map(str, values))


def _sliced(value: Any, start: Any, stop: Any, step: Any) -> Any:
    return value[slice(start, stop, step)]


def _concat(pieces: Iterable[str]) -> str:
    """Join like "".join, after a check of the total length."""
    budget, kept, chars = _BUDGET.get(), [], 0
    for piece in pieces:
        kept.append(piece)
        chars += len(piece)
        budget.check(chars)
    return "".join(kept)


def _metered(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that counts. `wraps` keeps jinja2's mark of filters that take the context."""
    first = 1 if hasattr(function, "jinja_pass_arg") else 0

    @wraps(function)
    def metered(*args: Any, **kwargs: Any) -> Any:
        budget = _BUDGET.get()
        budget.step()
        value, rest = args[first], args[first + 1 :]
        budget.check_filter(name, value, rest, kwargs)
        if name == "join" and isinstance(value, Iterable) and not isinstance(value, str):
            separator = rest[0] if rest else kwargs.get("d", "")
            args = (*args[:first], budget.joinable(separator, value), *rest)
        return budget.made(function(*args, **kwargs))

    return metered
