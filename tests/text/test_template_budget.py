"""A chat template gets a budget of steps, text and time, and an ordinary one never feels it."""

import time

import pytest

from fastlora.text.chat_template import ChatTemplate, render

GROW = "{% set ns = namespace(x='aaaaaaaaaa') %}{% for i in range(60) %}"
LOOP = "{% for i in range(99999) %}"
HOSTILE = {
    "nested loops": LOOP * 3 + "{% endfor %}" * 3,
    "a loop whose condition never holds": LOOP + LOOP[:-3] + " if false %}{% endfor %}{% endfor %}",
    "loops that write": LOOP * 2 + "a" * 1000 + "{% endfor %}" * 2,
    "a long value, written often": "{% set x = 'ab' * 400000 %}" + LOOP + "{{ x }}{% endfor %}",
    "squares": "{% set ns = namespace(x=10 ** 15) %}{% for i in range(40) %}"
    "{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "replace": GROW + "{% set ns.x = ns.x.replace('a', 'aa') %}{% endfor %}",
    "the filter replace": GROW + "{% set ns.x = ns.x | replace('a', 'aa') %}{% endfor %}",
    "sums": GROW + "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "concatenation": GROW + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "joins": GROW + "{% set ns.x = ns.x.join(['', '', '']) %}{% endfor %}",
    "a generator, joined": "{% set x = 'a' * 900000 %}{{ range(99999) | map('string') | join(x) }}",
    "percent": GROW + "{% set ns.x = '%s%s' % (ns.x, ns.x) %}{% endfor %}",
    "format": GROW + "{% set ns.x = '{0}{0}'.format(ns.x) %}{% endfor %}",
    "set blocks": "{% set x = 'a' %}"
    + "".join(f"{{% set x %}}{'{{ x }}' * 9}{{% endset %}}" for _ in range(12)),
    "lists in lists": "{% set ns = namespace(x=['a']) %}{% for i in range(60) %}"
    "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "dicts in dicts": "{% set ns = namespace(x='a') %}{% for i in range(60) %}"
    "{% set ns.x = {'a': ns.x, 'b': ns.x} %}{% endfor %}{{ ns.x | tojson }}",
    "namespaces in namespaces": "{% set ns = namespace(x='a') %}"
    + "{% set ns = namespace(x=[ns.x], y=ns) %}" * 50
    + LOOP
    + "{{ ns }}"
    + "{% endfor %}" * 1
    + LOOP * 2
    + "{% endfor %}" * 2,
    "a wide format": "{{ '%1000000000d' % 1 }}",
    "a width from an argument": "{{ '%*d' | format(1000000000, 1) }}",
    "a nested width": "{{ '{:{}}'.format(1, 1000000000) }}",
    "a wide centre": "{{ 'a' | center(1000000000) }}",
    "a wide indent": "{{ 'a\\nb' | indent(1000000000) }}",
    "tabs": "{{ ('\\t' * 900000).expandtabs(9999) }}",
    "bytes of a number": "{{ (1).to_bytes(1000000000, 'big') }}",
    "rounding": "{{ 7 | round(-1000000000) }}",
    "a wide batch": "{{ ['a'] | batch(1000000000, 'b') | list }}",
    "wordwrap": "{{ ('a' * 900000) | wordwrap(1) }}",
    "lipsum": "{{ lipsum(n=100000) }}",
    "a tree of macros": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}"
    "{% endmacro %}{{ m(100) }}",
    "a long template": "a" * 1_000_000,
}
CHAT = [
    {"role": ("user", "assistant")[i % 2], "content": f"Message {i}. " + "word " * 50}
    for i in range(400)
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_without_end_is_refused_within_five_seconds(name):
    start = time.process_time()
    with pytest.raises(ValueError, match=r"bad\.jinja") as error:
        render(ChatTemplate(HOSTILE[name], "bad.jinja"), CHAT[:1], {})
    assert time.process_time() - start < 5
    assert len(str(error.value)) < 2000


def test_the_text_of_a_template_error_cannot_steer_the_terminal():
    template = ChatTemplate("{{ raise_exception('\\x1b[2J' ~ 'a' * 9999) }}", "bad.jinja")
    with pytest.raises(ValueError, match=r"\\x1b\[2J") as error:
        render(template, CHAT[:1], {})
    assert "\x1b" not in str(error.value) and len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for m in messages if m.role == 'user' %}{{ loop.index }},{% endfor %}", "200,"),
        ("{% set ns = namespace(x=[]) %}{% for m in messages %}{% set ns.x = ns.x + [m] %}"
         "{% endfor %}{{ ns.x | length }}", "400"),
        ("{% for m in messages %}{% for n in messages[:50] %}{% endfor %}{% endfor %}k",
         "k"),
        ("{{ messages[1:3] | map(attribute='role') | join('-') }}", "assistant-user"),
        ("{{ 'a' ~ 1 ~ none ~ [1, 'b'] }}{{ (1, 2) }}{{ {'a': messages | length} }}", "400}"),
        ("{{ '%s-%5.2f|%-4d' % ('a', 1.5, 3) }}{{ '{:>6}'.format('x') }}", "     x"),
        ("{% macro m(x) %}<{{ x }}>{% endmacro %}{{ m('a') | indent(2) | upper }}", "<A>"),
        ("{{ messages | tojson | length > 1000 }}{{ 'a,b'.split(',')[-1].join(['x', 'y']) }}",
         "xby"),
        ("{{ 'abc'[::-1] }}{{ [1, 2] * 2 }}{{ 2 ** 3 * 4 }}{{ 7 % 4 }}", "[1, 2, 1, 2]323"),
    ],
)  # fmt: skip
def test_ordinary_templates_stay_within_it(template, expected):
    text = render(ChatTemplate(template, "good.jinja"), CHAT, {})
    assert text.endswith(expected)


def test_long_chats_stay_within_it():
    chat = [{"role": "user", "content": "a" * 2_000_000}, {"role": "assistant", "content": "b"}]
    template = "{% for m in messages %}{{ (m.content | trim) + '\\n' }}{% endfor %}"
    text = render(ChatTemplate(template, "good.jinja"), chat * 20, {})
    assert len(text) == 20 * (2_000_000 + 3)
