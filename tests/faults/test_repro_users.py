"""Section B of issue 16: one minimal reproduction for each report of a user."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import fastlora
from fastlora.data.encoding import encode_rows
from fastlora.model import Model
from faults import folders
from faults.case import IDS, tuned

BOS, STOP, USER, ASSISTANT, SYSTEM = 1, 2, 4, 5, 6
W = {word: i + len(folders.SPECIAL) for i, word in enumerate(folders.WORDS)}
TURN = "<|{{ m['role'] }}|> {{ m['content'] }} </s>"
PROMPT = "{% if add_generation_prompt %}<|assistant|>{% endif %}"


def load(folder, **settings):
    return fastlora.load(folder, device="cpu", local_files_only=True, **settings)


@pytest.fixture
def base(tmp_path) -> Path:
    """A model's folder with its tokenizer."""
    return folders.write_all(tmp_path) / "base"


def tokenizer_of(folder, template=folders.TEMPLATE, **settings):
    folders.write_tokenizer(folder, template, **settings)
    return load(folder)[1]


def chat(*contents, **last):
    roles = ("user", "assistant") * len(contents)
    turns = [dict(role=r, content=c) for r, c in zip(roles, contents, strict=False)]
    return [*turns[:-1], turns[-1] | last]


def encoded(tokenizer, messages):
    """(ids, trained ids) of one chat."""
    return of_row(tokenizer, {"messages": messages})


def of_row(tokenizer, row):
    (example,) = encode_rows([row], tokenizer, max_seq_length=64)
    labels = example.labels.tolist()
    return example.input_ids.tolist(), [label for label in labels if label != -100]


def ids_of(text):
    special = {token: i for i, token in enumerate(folders.SPECIAL)}
    return [special.get(word, W.get(word, 0)) for word in text.split()]


def test_b1_a_text_that_begins_with_bos_gets_no_second(base):
    tokenizer = tokenizer_of(base, bos=True)
    ids, _ = of_row(tokenizer, {"text": "<s> w1 w2"})
    assert ids == ids_of("<s> w1 w2 </s>")
    assert of_row(tokenizer, {"text": "w1 w2"})[0] == ids_of("<s> w1 w2 </s>")


def prompts_of(monkeypatch) -> list[list[int]]:
    """Filled with the ids that `generate` is given."""
    seen = []
    plain = Model.generate

    def spy(self, input_ids, **settings):
        out = plain(self, input_ids, **settings)
        seen.append((input_ids[0].tolist(), out.shape[1] - input_ids.shape[1]))
        return out

    monkeypatch.setattr(Model, "generate", spy)
    return seen


def test_b1_a_prompt_that_begins_with_bos_gets_no_second(base, monkeypatch):
    tokenizer, seen = tokenizer_of(base, bos=True), prompts_of(monkeypatch)
    load(base)[0].generate_text(tokenizer, "<s> w1 w2", max_new_tokens=1)
    assert seen[0][0] == ids_of("<s> w1 w2")


@pytest.mark.parametrize("behind", ["<|assistant|>", " </s>", " </s> <|assistant|>", " w9"])
def test_b2_nothing_behind_the_first_stop_is_trained(base, behind):
    last = "{% if add_generation_prompt %}<|assistant|>{% else %}" + behind + "{% endif %}"
    tokenizer = tokenizer_of(base, "{% for m in messages %}" + TURN + "{% endfor %}" + last)
    _, trained = encoded(tokenizer, chat("w1", "w2 w3"))
    assert trained == ids_of("w2 w3 </s>")


def test_b3_a_users_turn_is_never_trained(base):
    """The template drops all replies but the last: the first cannot be found, only guessed."""
    template = (
        "{% for m in messages %}{% if m['role'] != 'assistant' or loop.last %}"
        + TURN
        + "{% endif %}{% endfor %}"
    )
    tokenizer = tokenizer_of(base, template)
    try:
        _, trained = encoded(tokenizer, chat("w1", "w2", "w2", "w3"))
    except ValueError as error:
        assert "row 1" in str(error)
    else:
        assert W["w2"] not in trained


def always(folder, token: str) -> None:
    """Rewrite the model so that it gives one token for every input."""
    tensors = {k: torch.zeros_like(v) for k, v in folders.weights().items()}
    tensors["model.embed_tokens.weight"] += 1
    tensors["model.norm.weight"] += 1
    tensors["lm_head.weight"][ids_of(token)[0]] = 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_b4_generation_stops_at_the_templates_end_of_turn(base, monkeypatch):
    """Turns end in <|system|> here, which no file names as a stop."""
    template = "{% for m in messages %}" + TURN.replace("</s>", "<|system|>") + "{% endfor %}"
    always(base, "<|system|>")
    tokenizer, seen = tokenizer_of(base, template + PROMPT), prompts_of(monkeypatch)
    model = tuned(load(base)[0], init_lora_weights=True)
    rows = [{"messages": chat("w1", "w2")}]
    fastlora.train(model, tokenizer, rows, max_steps=1, packing=False, progress=False)
    assert encoded(tokenizer, chat("w1", "w2"))[1][-1] == SYSTEM
    load(base)[0].generate_text(tokenizer, chat("w1"), max_new_tokens=10)
    assert seen[-1][1] == 1


def test_b5_a_pad_id_beyond_the_vocabulary_does_not_matter(base):
    tokenizer = tokenizer_of(base, pad="<|pad2|>")
    assert load(base)[0].spec.config.vocab_size == 64
    model = tuned(load(base)[0])
    settings = dict(max_steps=2, batch_size=4, progress=False)
    for packing in (False, True):
        _, history = fastlora.train(model, tokenizer, folders.rows(8), packing=packing, **settings)
        assert all(torch.tensor(history.losses).isfinite())


@pytest.mark.parametrize("pad", [-1, 64, 999])
def test_b5_generation_pads_with_an_id_in_range(base, pad):
    for name in ("config.json", "generation_config.json"):
        raw = json.loads((base / name).read_text())
        (base / name).write_text(json.dumps(raw | {"pad_token_id": pad}))
    model, _ = load(base)
    prompts = torch.arange(10, 40).view(10, 3)
    first = model.generate(prompts, max_new_tokens=1)[:, -1].tolist()
    assert len(set(first)) > 1  # so that one row stops before the others
    out = model.generate(prompts, max_new_tokens=4, eos_token_id=first[0])
    assert out.min() >= 0
    assert out.max() < 64


@pytest.mark.parametrize("mask", [{"weight": 0}, {"train": False}])
def test_b6_a_message_may_be_masked(base, mask):
    tokenizer = tokenizer_of(base)
    messages = chat("w1", "w2", "w3", "w4")
    messages[1] |= mask
    assert encoded(tokenizer, messages)[1] == ids_of("w4 </s>")


@pytest.mark.parametrize(
    "row",
    [
        {"text": "w1 \ud800"},
        {"prompt": "w1 \ud800", "completion": "w2"},
        {"prompt": "w1", "completion": "\udfff"},
        {"instruction": "\ud800", "output": "w1"},
        {"messages": [dict(role="user", content="\ud800"), dict(role="assistant", content="w1")]},
    ],
)
def test_b7_a_lone_surrogate_is_refused_with_its_row(base, row):
    tokenizer = tokenizer_of(base)
    with pytest.raises(ValueError, match="row 2") as error:
        encode_rows([{"text": "w1"}, row], tokenizer, max_seq_length=64)
    assert "surrogate" in str(error.value)
    str(error.value).encode()


def test_b8_an_adapters_folder_may_hold_a_config(base, tmp_path):
    model = tuned(load(base)[0])
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "config.json").write_bytes((base / "config.json").read_bytes())
    read, _ = load(tmp_path / "adapter")
    torch.testing.assert_close(read(IDS), model(IDS), rtol=1e-6, atol=1e-6)


def test_b9_json_lines_in_a_json_file_are_read(base, tmp_path):
    tokenizer = tokenizer_of(base)
    path = tmp_path / "rows.json"
    folders.write_rows(path, 4)
    model = tuned(load(base)[0])
    settings = dict(max_steps=1, packing=False, progress=False)
    ours = fastlora.train(model, tokenizer, path, **settings)[1]
    assert ours.losses == fastlora.train(model, tokenizer, folders.rows(4), **settings)[1].losses


# As Qwen3's: thinking (w50 w51) only behind the last question; a tool call is w52, its name, w53.
QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|{{ m['role'] }}|> "
    "{% if m['role'] == 'assistant' and loop.index0 > ns.last %}w50 w51 {% endif %}"
    "{{ m['content'] }}{% for c in m.tool_calls or [] %} w52 {{ c.function.name }} w53{% endfor %}"
    " </s>{% endfor %}" + PROMPT
)
CALLS = [{"type": "function", "function": {"name": "w8", "arguments": {}}}]


@pytest.mark.parametrize(
    ("content", "calls", "reply"),
    [
        ("", CALLS, "w52 w8 w53 </s>"),
        ("w7", CALLS, "w7 w52 w8 w53 </s>"),
        ("", None, "</s>"),
        ("w7", None, "w7 </s>"),
    ],
)
def test_b10_a_reply_in_mid_chat_is_trained_as_it_is_rendered(base, content, calls, reply):
    tokenizer = tokenizer_of(base, QWEN3)
    messages = chat("w1", content, "w3", "w4")
    if calls:
        messages[1]["tool_calls"] = calls
    assert encoded(tokenizer, messages)[1] == ids_of(f"{reply} w50 w51 w4 </s>")


def test_b10_a_prompt_that_opens_thinking_is_no_part_of_the_reply(base):
    """As R1-Distill and QwQ: the prompt ends in <think> (w50), which history does not show."""
    template = "{% for m in messages %}" + TURN + "{% endfor %}"
    prompt = PROMPT.replace("<|assistant|>", "<|assistant|> w50")
    tokenizer = tokenizer_of(base, template + prompt)
    assert encoded(tokenizer, chat("w1", "w2 w3", "w4", "w5"))[1] == ids_of("w2 w3 </s> w5 </s>")


def test_b11_tools_that_the_template_does_not_read_are_refused_by_name(base):
    row = {"messages": chat("w1", "w2"), "tools": [{"type": "function"}]}
    with pytest.raises(ValueError, match="tools") as error:
        encode_rows([row], tokenizer_of(base), max_seq_length=64)
    assert "row 1" in str(error.value)


def test_b11_conversations_are_trained_as_messages(base):
    turns = [{"from": "human", "value": "w1"}, {"from": "gpt", "value": "w2"}]
    tokenizer = tokenizer_of(base)
    found = of_row(tokenizer, {"conversations": turns})
    assert found == encoded(tokenizer, chat("w1", "w2")) and found[1]
    with pytest.raises(ValueError, match="row 1: no token to train"):
        encode_rows([{"conversations": turns[:1]}], tokenizer, max_seq_length=64)
