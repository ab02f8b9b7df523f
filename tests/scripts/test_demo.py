"""The shipped demo: complete, small, and with held-out rows that training does not see."""

import json
import math
import re
from pathlib import Path

import demo_data
import jinja2
import pytest
from transformers import AutoTokenizer

from fastlora.data.encoding import encode_rows
from fastlora.models.config import LlamaConfig
from fastlora.models.config_json import config_from_json
from fastlora.models.names import base_tensors
from fastlora.text.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "fastlora" / "checkpoints" / "demo"

FILES = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("chat_template.jinja", "train.jsonl", "heldout.jsonl", "NOTICE", "LICENSE-python.txt"),
)
PLAIN_CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "# os\ndef walk(top):\n"},
    {"role": "assistant", "content": "Directory tree generator."},
    {"role": "user", "content": "  Why <br>?"},
]


@pytest.fixture(scope="module")
def rows() -> dict[str, list[list[dict[str, str]]]]:
    return {
        side: [json.loads(line)["messages"] for line in open(DEMO / f"{side}.jsonl")]
        for side in ("train", "heldout")
    }


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    found = Tokenizer.from_folder(DEMO)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def config() -> LlamaConfig:
    raw, generation = (
        json.loads((DEMO / name).read_text()) for name in ("config.json", "generation_config.json")
    )
    return config_from_json(raw, generation=generation)


def module_of(messages: list[dict[str, str]]) -> str:
    return messages[0]["content"].split("\n")[0].removeprefix("# ")


def name_of(messages: list[dict[str, str]]) -> str:
    """ "Lock.release", from "# threading\\nclass Lock:\\n    def release(self):"."""
    return ".".join(re.findall(r"^\s*(?:async def|def|class) (\w+)", messages[0]["content"], re.M))


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def test_the_demo_is_complete_and_at_most_8_megabytes(config):
    present = {path.name: path.stat().st_size for path in DEMO.iterdir() if path.is_file()}
    assert not set(FILES) - present.keys()
    bf16 = 2 * sum(math.prod(shape) for shape in base_tensors(config).values())
    rest = sum(present[name] for name in FILES if not name.endswith(".jsonl"))
    assert bf16 + rest <= 8_000_000
    assert sum(present.values()) <= 10_000_000, "rows, licence and all"


def test_the_vocabulary_is_the_config_s(config, tokenizer):
    assert tokenizer.vocab_size == config.vocab_size == demo_data.VOCAB_SIZE
    assert tokenizer.bos_token_id == config.bos_token_id
    assert tokenizer.eos_token_ids == config.eos_token_id
    assert tokenizer.pad_token_id == config.pad_token_id


def test_rows_are_short_chats_of_two_turns(rows, tokenizer, config):
    for side in rows.values():
        assert all([m["role"] for m in chat] == ["user", "assistant"] for chat in side)
        assert all(3 <= len(chat[1]["content"].split()) <= 20 for chat in side)
        examples = encode_rows(
            [{"messages": chat} for chat in side],
            tokenizer,
            max_seq_length=config.max_position_embeddings,
        )
        assert max(len(example.input_ids) for example in examples) <= 100
    assert len(rows["train"]) > 4000 and 300 <= len(rows["heldout"]) <= 500


def test_only_the_reply_and_its_end_are_trained(rows, tokenizer):
    other = AutoTokenizer.from_pretrained(DEMO)
    (example,) = encode_rows([{"messages": rows["train"][0]}], tokenizer, max_seq_length=512)
    options = dict(return_dict=True, return_assistant_tokens_mask=True)
    masks = other.apply_chat_template(rows["train"][0], **options)["assistant_masks"]
    assert [int(label != -100) for label in example.labels] == masks
    trained = [int(i) for i in example.labels if i != -100]
    assert tokenizer.decode(trained) == rows["train"][0][1]["content"]
    assert trained[-1] in tokenizer.eos_token_ids


def test_no_held_out_module_is_in_train(rows):
    packages = {side: {module_of(chat).split(".")[0] for chat in rows[side]} for side in rows}
    assert not packages["train"] & packages["heldout"]
    assert all(demo_data.is_held_out(module_of(chat)) for chat in rows["heldout"])
    assert not any(demo_data.is_held_out(module_of(chat)) for chat in rows["train"])


def test_no_function_occurs_twice(rows):
    functions = [(module_of(chat), name_of(chat)) for side in rows.values() for chat in side]
    assert all(name for _, name in functions)
    assert len(set(functions)) == len(functions)


def test_no_held_out_summary_resembles_one_of_train(rows):
    known = [words(chat[1]["content"]) for chat in rows["train"]]
    near = [
        chat
        for chat in rows["heldout"]
        if (w := words(chat[1]["content"])) and any(len(w & k) >= 0.8 * len(w | k) for k in known)
    ]
    assert not near


def test_tokens_are_those_of_transformers(rows, tokenizer):
    other = AutoTokenizer.from_pretrained(DEMO)
    assert len(other) == tokenizer.vocab_size
    texts = [
        (ROOT / "fastlora" / "errors.py").read_text(),
        "\n\tnaïve — 12.5 %\n\n    x = '\\u20ac'\n",
    ]
    texts += [chat[0]["content"] for chat in rows["heldout"][:50]]
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids == other(text)["input_ids"]
        assert tokenizer.decode(ids) == other.decode(ids, skip_special_tokens=True) == text


def test_an_indentation_is_one_token(tokenizer):
    for depth in (4, 8, 12, 16):
        indented = tokenizer.encode(f"x:\n{' ' * depth}return", add_special_tokens=False)
        assert len(indented) == len(tokenizer.encode("x: return", add_special_tokens=False)) + 1


@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_the_template_renders_the_same_everywhere(rows, tokenizer, add_generation_prompt):
    other = AutoTokenizer.from_pretrained(DEMO)
    text = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", demo_data.CHAT_TEMPLATE)
    plain = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(text)
    names = {"bos_token": demo_data.BOS, "eos_token": demo_data.END}
    for chat in (PLAIN_CHAT, PLAIN_CHAT[:2], *rows["heldout"][:20]):
        expected = plain.render(messages=chat, add_generation_prompt=add_generation_prompt, **names)
        options = dict(tokenize=False, add_generation_prompt=add_generation_prompt)
        assert other.apply_chat_template(chat, **options) == expected
        assert tokenizer.apply_chat_template(chat, **options) == expected
        rendered = tokenizer.apply_chat_template(chat, add_generation_prompt=add_generation_prompt)
        assert rendered == tokenizer.encode(expected, add_special_tokens=False)


def test_a_summary_is_one_complete_sentence():
    source = '''
class Lock:
    def release(self, *, force=False):
        """Release the lock.

        More of it.
        """
        def inner(): "Run inside of the other."
    def split(self):
        """This sentence goes on
        in the next line."""
    def short(self): "Too short."
    def echo(x): "echo(x) -> the same x again"
    def old(self): "See the other method."
    def none(self): pass
async def main(a: int, b='x') -> None:
    """Run   the event loop.
    Then stop."""
'''
    found = list(demo_data.rows_of("m", source))
    assert [tuple(row) for row in found] == [
        (
            *("m", "Lock.release", "class Lock:\n    def release(self, *, force=False):"),
            "Release the lock.",
        ),
        ("m", "inner", "def inner():", "Run inside of the other."),
        ("m", "main", "async def main(a: int, b='x') -> None:", "Run the event loop."),
    ]
