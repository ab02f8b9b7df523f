"""Which characters are trained as a reply, for templates that make this hard.

The templates write in the manner of Qwen3, R1-Distill, QwQ, Llama-3.1 and Mistral.
"""

import pytest

from fastlora.data.encoding import encode_rows
from fastlora.ops.loss.ignore import IGNORE
from fastlora.text.tokenizer import Tokenizer
from oracles.tokenizer_folders import CHATML, CHATML_MARKED, qwen

END = "<|im_end|>"
OPEN = "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
# Qwen/Qwen3-0.6B, shortened: thinking is written for replies behind the last question only.
QWEN3 = (
    """{% set ns = namespace(last=-1) %}{% for m in messages %}
{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{% for m in messages %}
{%- if m.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}
{%- else %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and loop.index0 > ns.last and (loop.last or m.reasoning_content) %}
{{- '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}
{%- endif %}
{{- m.content or '' }}
{%- for call in m.tool_calls or [] %}
{{- '\\n' if (loop.first and m.content) or not loop.first }}
{{- '<tool_call>\\n' + (call.function | tojson) + '\\n</tool_call>' }}
{%- endfor %}{{ '<|im_end|>\\n' }}{% endif %}{% endfor %}"""
    + OPEN
)
# deepseek-ai/DeepSeek-R1-Distill-Qwen and Qwen/QwQ-32B: the prompt opens thinking.
THINK_PROMPT = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}
{{- m.content.split('</think>')[-1].lstrip('\\n') if m.role == 'assistant' else m.content }}
{{- '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"""
# Llama 3.1 writes a tool call in place of the content.
CALL_ONLY = (
    """{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}
{%- if m.tool_calls %}{{ m.tool_calls[0].function.name + '(' ~ (loop.last and 'now') ~ ')' }}
{%- else %}{{ m.content }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"""
    + OPEN
)
DROPS_REPLIES = """{% for m in messages %}{% if m.role != 'assistant' or loop.last %}
{{- m.content + '<|im_end|>' }}{% endif %}{% endfor %}"""
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CALLED = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


def say(role: str, content: str | None = "", **more) -> dict:
    return {"role": role, "content": content, **more}


@pytest.fixture
def trained(tmp_path):
    """The stretches of text that are trained: trained(template, messages, **row or options)."""

    def run(template: str, messages: list[dict], train_on: str = "responses", **row) -> list[str]:
        tokenizer = Tokenizer.from_folder(qwen(tmp_path, template))
        row = {"messages": messages} if not row else row
        (example,) = encode_rows([row], tokenizer, train_on=train_on, max_seq_length=4096)
        pieces, last = [], False
        for token, label in zip(example.input_ids.tolist(), example.labels.tolist(), strict=True):
            if label != IGNORE:
                pieces = [*pieces, []] if not last else pieces
                pieces[-1].append(token)
            last = label != IGNORE
        return [tokenizer.decode(ids, skip_special_tokens=False) for ids in pieces]

    return run


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        (say("assistant", "", tool_calls=[CALL]), CALLED),
        (say("assistant", None, tool_calls=[CALL]), CALLED),
        (say("assistant", "Let me see.", tool_calls=[CALL]), "Let me see.\n" + CALLED),
        (say("assistant", "Let me see.", tool_calls=[CALL, CALL], reasoning_content="hm"),
         "Let me see.\n" + CALLED + "\n" + CALLED),
        (say("assistant", ""), ""),
        (say("assistant", "46"), "46"),
        (say("assistant", "Sure?"), "Sure?"),  # the next question's words
    ],
)  # fmt: skip
def test_replies_in_mid_chat_are_trained_as_they_are_rendered(trained, reply, text):
    chat = [say("user", "Hi"), reply, say("user", "Sure?"), say("assistant", "Yes.")]
    assert trained(QWEN3, chat) == [text + END, "<think>\n\n</think>\n\nYes." + END]


def test_steps_of_a_tool_use_that_later_messages_shorten_are_found(trained):
    """The prompt of the second step shows the first step's thinking; the complete chat does not."""
    chat = [
        *[say("user", "1 + 2?"), say("assistant", "", tool_calls=[CALL], reasoning_content="add")],
        *[say("tool", "3"), say("assistant", "It is 3.", reasoning_content="so")],
        *[say("user", "Sure?"), say("assistant", "Yes.")],
    ]
    assert trained(QWEN3, chat) == [
        CALLED + END,
        "It is 3." + END,
        "<think>\n\n</think>\n\nYes." + END,
    ]
    assert trained(QWEN3, chat[:4]) == [
        "<think>\nadd\n</think>\n\n" + CALLED + END,
        "<think>\nso\n</think>\n\nIt is 3." + END,
    ]


def test_a_prompt_that_opens_thinking_is_not_part_of_the_reply(trained):
    first = "<think>\nhm\n</think>\n\n46"
    chat = [say("user", "Hi"), say("assistant", first), say("user", "<b"), say("assistant", "<c>")]
    assert trained(THINK_PROMPT, chat) == ["46" + END, "<c>" + END]


def test_a_reply_that_begins_with_the_prompts_thinking_is_trained_behind_it(trained):
    template = THINK_PROMPT.replace(".split('</think>')[-1].lstrip('\\n')", "")
    chat = [say("user", "Hi"), say("assistant", "<think>\nhm\n</think>\n\n46")]
    assert trained(template, chat) == ["hm\n</think>\n\n46" + END]


def test_a_call_that_replaces_the_content_is_found_by_its_name(trained):
    chat = [say("user", "Hi"), say("assistant", "Hi", tool_calls=[CALL]), say("user", "add(now)")]
    assert trained(CALL_ONLY, [*chat, say("assistant", "ok")]) == ["add(False)" + END, "ok" + END]


@pytest.mark.parametrize("template", [DROPS_REPLIES, DROPS_REPLIES.replace("'<|im_end|>'", "''")])
@pytest.mark.parametrize("second", ["2", "3", "1"])
def test_a_users_turn_is_never_trained(trained, template, second):
    chat = [say("user", "1"), say("assistant", "2"), say("user", second), say("assistant", "3")]
    with pytest.raises(ValueError, match=r"row 1: .*message 2.*train_on=\"all\""):
        trained(template, chat)


@pytest.mark.parametrize("behind", ["<|im_end|>", "\\n<|im_start|>assistant\\n", "\\nBye."])
def test_nothing_behind_the_first_stop_is_trained(trained, behind):
    template = CHATML.replace("<|im_end|>' + '\\n'", f"<|im_end|>{behind}' + '\\n'")
    chat = [say("user", "Hi"), say("assistant", "46"), say("user", "Sure?"), say("assistant", "Y")]
    assert trained(template, chat) == ["46" + END, "Y" + END]


@pytest.mark.parametrize("mask", [{"weight": 0}, {"weight": 0.0}, {"train": False}])
@pytest.mark.parametrize("template", [CHATML, CHATML_MARKED], ids=["found", "marked"])
def test_a_masked_reply_is_not_trained(trained, template, mask):
    chat = [say("user", "Hi"), say("assistant", "46", **mask), say("user", "Sure?")]
    chat += [say("assistant", "Y", weight=1, train=True), say("user", "a"), say("assistant", "b")]
    assert trained(template, chat) == ["Y" + END, "b" + END]
    before, after = trained(template, chat[:4], train_on="all")
    assert before.endswith("<|im_start|>assistant\n") and after.startswith("\n<|im_start|>user")
    row = {"prompt": chat[:3], "completion": chat[3:]}
    assert trained(template, [], **row) == ["Y" + END, "b" + END]


def test_masks_that_leave_nothing_or_mean_nothing_are_refused(trained):
    chat = [say("user", "Hi"), say("assistant", "46", weight=0)]
    with pytest.raises(ValueError, match=r"row 1: no token to train: .*masked"):
        trained(CHATML, chat)
    with pytest.raises(ValueError, match=r"row 1: messages \[1\] have weight 0"):
        trained(CHATML, [say("user", "Hi", weight=0), say("assistant", "46")], train_on="all")
    for wrong in ({"weight": 0.5}, {"weight": True}, {"weight": "0"}, {"train": 0}):
        with pytest.raises(ValueError, match=r"row 1: messages, message 2: .* expected"):
            trained(CHATML, [say("user", "Hi"), say("assistant", "46", **wrong)])


def test_an_end_of_turn_that_no_file_names_is_trained_and_told(tmp_path):
    tokenizer = Tokenizer.from_folder(qwen(tmp_path, CHATML, eos_token="<|endoftext|>"))
    rows = [{"messages": [say("user", "Hi"), say("assistant", "46")]}, {"text": "a"}]
    with pytest.warns(UserWarning, match=r"ends a reply with '<\|im_end\|>' \(id \d+\)"):
        chat, text = encode_rows(rows, tokenizer, max_seq_length=64)
    kept = chat.input_ids[chat.labels != IGNORE].tolist()
    assert tokenizer.decode(kept, skip_special_tokens=False) == "46" + END
    assert text.input_ids[-1] == tokenizer.eos_token_ids[0]
