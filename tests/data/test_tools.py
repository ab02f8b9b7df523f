"""Rows with tools, content in parts and template arguments, as the template renders them."""

import pytest

from fastlora.data.encoding import encode_rows
from fastlora.ops.loss.ignore import IGNORE
from fastlora.text.tokenizer import Tokenizer
from oracles.tokenizer_folders import CHATML, CHATML_MARKED, qwen

END = "<|im_end|>"
OPEN = "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
TOOLS = (
    """{%- if tools %}{{- '<|im_start|>system\\n' }}
{%- for tool in tools %}{{- tool | tojson + '\\n' }}{% endfor %}{{- '<|im_end|>\\n' }}{% endif %}
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + (m.content or '') }}
{%- for call in m.tool_calls or [] %}
{{- call.function.name + ' ' + call.function.arguments | tojson }}
{%- endfor %}{{- '<|im_end|>\\n' }}{% endfor %}"""
    + OPEN
)
MARKED_TOOLS = """{%- for tool in tools or [] %}{{- tool | tojson + '\\n' }}{% endfor %}
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}
{%- generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{- m.content + '<|im_end|>' }}{% endif %}{% endfor %}"""
PARTS = (
    """{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.content is string %}{{- m.content }}{% else %}
{%- for part in m.content %}{{- '(' + part.text + ')' }}{% endfor %}{% endif %}
{{- '<|im_end|>\\n' }}{% endfor %}"""
    + OPEN
)
# As Qwen3: without thinking, the prompt closes it before the reply.
SWITCH = """{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and loop.last and enable_thinking is defined and not enable_thinking %}
{{- '<think></think>' }}{% endif %}{{- m.content + '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{- '<think></think>' }}{% endif %}
{%- endif %}"""
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}


def encoded(tokenizer: Tokenizer, row: dict, **options) -> tuple[str, list[str]]:
    """The text of a row, and its stretches that are trained."""
    (example,) = encode_rows([row], tokenizer, max_seq_length=4096, **options)
    pieces, last = [], False
    for token, label in zip(example.input_ids.tolist(), example.labels.tolist(), strict=True):
        if label != IGNORE:
            pieces = [*pieces, []] if not last else pieces
            pieces[-1].append(token)
        last = label != IGNORE
    decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=False)
    return decode(example.input_ids.tolist()), [decode(piece) for piece in pieces]


def make(folder, template: str) -> Tokenizer:
    tokenizer = Tokenizer.from_folder(qwen(folder, template))
    assert tokenizer is not None
    return tokenizer


def say(role: str, content=None, **more) -> dict:
    return {"role": role, "content": content, **more}


def test_a_tool_use_is_rendered_with_its_tools_and_only_replies_are_trained(tmp_path):
    tokenizer = make(tmp_path, TOOLS)
    chat = [
        *[say("user", "1 + 2?"), say("assistant", tool_calls=[CALL]), say("tool", "3")],
        say("assistant", "It is 3."),
    ]
    text, trained = encoded(tokenizer, {"messages": chat, "tools": [TOOL]})
    assert trained == ['add {"a": 1}' + END, "It is 3." + END]
    as_dict = {**CALL, "function": {"name": "add", "arguments": {"a": 1}}}
    rendered = [chat[0], say("assistant", tool_calls=[as_dict]), *chat[2:]]
    assert text == tokenizer.render_chat(rendered, tools=[TOOL])
    assert '"name": "add"' in text
    _, trained = encoded(tokenizer, {"prompt": chat[:3], "completion": chat[3:], "tools": [TOOL]})
    assert trained == ["It is 3." + END]
    text, _ = encoded(tokenizer, {"messages": chat, "tools": [TOOL]}, train_on="all")
    assert '"name": "add"' in text
    row = {"instruction": "1 + 2?", "output": "3", "tools": [TOOL]}
    assert '"name": "add"' in encoded(tokenizer, row)[0]


def test_marked_replies_are_found_beside_tools(tmp_path):
    chat = [say("user", "Hi"), say("assistant", "a"), say("user", "Hi"), say("assistant", "b")]
    row = {"messages": chat, "tools": [TOOL]}
    text, trained = encoded(make(tmp_path, MARKED_TOOLS), row)
    assert trained == ["a" + END, "b" + END]
    assert '"name": "add"' in text


def test_tools_that_the_template_does_not_read_are_refused(tmp_path):
    row = {"messages": [say("user", "a"), say("assistant", "b")], "tools": [TOOL]}
    with pytest.raises(ValueError, match=r"row 1: has tools, which the chat template"):
        encode_rows([row], make(tmp_path, CHATML), max_seq_length=64)


@pytest.mark.parametrize(("template", "question"), [(CHATML, "one, two"), (PARTS, "(one)(, two)")])
def test_content_parts_are_joined_unless_the_template_reads_them(tmp_path, template, question):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": ", two"}]
    reply = [{"type": "text", "text": "b"}]
    row = {"messages": [say("user", parts), say("assistant", reply)]}
    text, trained = encoded(make(tmp_path, template), row)
    assert question + END in text
    assert trained == [("(b)" if template == PARTS else "b") + END]


@pytest.mark.parametrize("template", [CHATML, CHATML_MARKED], ids=["found", "marked"])
def test_the_last_response_alone_is_trained(tmp_path, template):
    tokenizer = make(tmp_path, template)
    chat = [say("user", "Hi"), say("assistant", "a"), say("user", "Hi"), say("assistant", "b")]
    last = lambda row: encoded(tokenizer, row, train_on="last_response")[1]
    assert last({"messages": chat}) == ["b" + END]
    assert last({"messages": [*chat, say("user", "more")]}) == ["b" + END]
    assert last({"prompt": chat[:1], "completion": chat[1:]}) == ["b" + END]
    assert last({"prompt": "a", "completion": " b"}) == [" b" + END]
    masked = [*chat[:3], say("assistant", "b", weight=0)]
    with pytest.raises(ValueError, match="no token to train"):
        last({"messages": masked})


def test_template_arguments_apply_to_training_and_generation(tmp_path):
    tokenizer = make(tmp_path, SWITCH)
    chat = [say("user", "Hi"), say("assistant", "a"), say("user", "Hi"), say("assistant", "b")]
    quiet = tokenizer.with_template_kwargs({"enable_thinking": False})
    text, trained = encoded(quiet, {"messages": chat})
    assert trained == ["a" + END, "b" + END]
    prompt = quiet.apply_chat_template(chat[:3], add_generation_prompt=True, tokenize=False)
    assert text.startswith(prompt) and prompt.endswith("<think></think>")
    assert "<think>" not in encoded(tokenizer, {"messages": chat})[0]
    assert "<think>" not in tokenizer.render_chat(chat[:1], add_generation_prompt=True)


@pytest.mark.parametrize(
    "given",
    [
        {"messages": []},
        {"bos_token": "x"},
        {"enable_thinking": object()},
        {"a b": 1},
        {3: 1},
        [("enable_thinking", False)],
        None,
    ],
)
def test_template_arguments_of_wrong_types_or_names_are_refused(tmp_path, given):
    tokenizer = make(tmp_path, SWITCH)
    method = getattr(Tokenizer.with_template_kwargs, "__wrapped__", Tokenizer.with_template_kwargs)
    with pytest.raises((ValueError, TypeError), match="template_kwargs"):
        method(tokenizer, given)


def test_a_template_argument_that_no_template_reads_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"reads \['enable_thinkin'\]"):
        make(tmp_path, SWITCH).with_template_kwargs({"enable_thinkin": False})
