"""The demo's data, made from the text of Python's standard library.

The Python Software Foundation owns that text (PSF License 2); a copy of the licence is shipped as
fastlora/checkpoints/demo/LICENSE-python.txt. The task: given a function's signature, write the
first line of its docstring. Modules are split into a train and a held-out side, so that neither
the base model nor the adapter has read the source of a held-out function.
"""

import ast
import hashlib
import json
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from fastlora.checkpoints.atomic import atomic_write
from fastlora.checkpoints.tensors import write_json, write_text

VOCAB_SIZE = 4096
PAD, BOS, END = "<|pad|>", "<|begin|>", "<|end|>"
ROLES = [f"<|{role}|>" for role in ("system", "user", "assistant")]
SPECIAL_TOKENS = [PAD, BOS, END, *ROLES]  # ids 0 to 5

# A turn ends with <|end|>, which also ends every document in the base model's training, so the base
# model already knows it. Only the assistant's replies are trained on.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {{- '<|' + message['role'] + '|>' -}}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}
    {%- else -%}
        {{- message['content'] + eos_token -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""

# Skip test suites, encodings (40 copies of one codec) and tables. A file is a table if fewer than
# 28 of 100 characters belong to lower-case words (html/entities, stringprep, _sysconfigdata, ...).
SKIPPED = {"site-packages", "test", "tests", "idle_test", "encodings"}
WORD_SHARE = 0.28
# Modules with similar text must be on one side: decimal and _pydecimal, posixpath and ntpath.
TWINS = {"pydecimal": "decimal", "pyio": "io", "py_abc": "abc"} | dict.fromkeys(
    ("posixpath", "ntpath", "genericpath", "nturl2path", "pathlib"), "os"
)
HELD_OUT = {4, 6}  # of ten hash classes: 9 % of the functions, 11 % of the text
MAX_PROMPT_TOKENS = 64
PLACEHOLDER = re.compile(r"(see|test|todo|xxx|deprecated)\b|[\w.]+\(|.*(->|:$)", re.IGNORECASE)


class Row(NamedTuple):
    """One function: its location, the user's prompt, and the reply to learn."""

    module: str
    name: str  # "Lock.release"
    signature: str
    summary: str

    def messages(self) -> dict:
        prompt = f"# {self.module}\n{self.signature}"
        turns = (("user", prompt), ("assistant", self.summary))
        return {"messages": [{"role": role, "content": content} for role, content in turns]}


class Rows(NamedTuple):
    train: list[Row]
    heldout: list[Row]


# ── reading the library ───────────────────────────────────────────────────────────────────


def sources(stdlib: Path) -> dict[str, str]:
    """Dotted module name -> source text, in the order of the names."""
    found = {}
    for path in sorted(stdlib.rglob("*.py")):
        parts = path.relative_to(stdlib).with_suffix("").parts
        text = path.read_text(encoding="utf-8", errors="ignore")
        words = sum(map(len, re.findall(r"[a-z]{3,}", text)))
        if not SKIPPED & set(parts) and words > WORD_SHARE * len(text):
            found[".".join(parts).removesuffix(".__init__")] = text
    found["pydoc_data.topics"] = _language_reference(found["pydoc_data.topics"])
    return dict(sorted(found.items()))


def _language_reference(source: str) -> str:
    """The prose of pydoc_data.topics, whose source is one dict of escaped strings."""
    topics = ast.literal_eval(source[source.index("{") :])
    return "\n\n".join(topics.values())


def is_held_out(module: str) -> bool:
    """Whether a module is on the held-out side: a fixed hash of its top-level package decides."""
    package = module.split(".")[0].strip("_")
    digest = hashlib.sha256(TWINS.get(package, package).encode()).hexdigest()
    return int(digest, 16) % 10 in HELD_OUT


# ── functions and their summaries ─────────────────────────────────────────────────────────


def rows_of(module: str, source: str) -> Iterator[Row]:
    """Every function with a one-line summary, in the order of the source."""
    with warnings.catch_warnings(action="ignore"):  # old escapes such as "\." in the library
        tree = ast.parse(source)
    for owner, node in _functions(tree, None):
        if summary := _summary(ast.get_docstring(node)):
            name = f"{owner}.{node.name}" if owner else node.name
            yield Row(module, name, _signature(owner, node), summary)


def _functions(
    parent: ast.AST, owner: str | None
) -> Iterator[tuple[str | None, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, ast.ClassDef):
            yield from _functions(node, node.name)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield owner, node
            yield from _functions(node, None)
        else:
            yield from _functions(node, owner)


def _signature(owner: str | None, node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    prefix = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    line = f"{prefix} {node.name}({ast.unparse(node.args)}){returns}:"
    return f"class {owner}:\n    {line}" if owner else line


def _summary(docstring: str | None) -> str | None:
    """The docstring's first line, if it is a complete sentence."""
    first, _, rest = (docstring or "").strip().partition("\n")
    summary = " ".join(first.split())
    whole = summary.endswith(".") or not rest or rest.startswith("\n")
    plain = summary.isascii() and summary[:1].isupper() and not PLACEHOLDER.match(summary)
    return summary if whole and plain and 3 <= len(summary.split()) <= 20 else None


# ── the split ─────────────────────────────────────────────────────────────────────────────


def split_rows(texts: dict[str, str], tokenizer: Tokenizer) -> Rows:
    """Rows of both sides, without long prompts and duplicates.

    Held-out rows whose summary resembles one of the train side are dropped.
    """
    rows, seen = Rows([], []), set()
    for module, text in texts.items():
        for row in rows_of(module, text) if module != "pydoc_data.topics" else ():
            keys = {(row.module, row.name), (row.signature, row.summary)}
            prompt = row.messages()["messages"][0]["content"]
            if not keys & seen and len(tokenizer.encode(prompt).ids) <= MAX_PROMPT_TOKENS:
                seen |= keys
                (rows.heldout if is_held_out(module) else rows.train).append(row)
    train_text = " ".join(" ".join(texts[m].split()) for m in texts if not is_held_out(m))
    known = [_words(row.summary) for row in rows.train]
    fresh = [row for row in rows.heldout if row.summary not in train_text and not _near(row, known)]
    return Rows(rows.train, fresh)


def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", text.lower()))


def _near(row: Row, known: list[frozenset[str]]) -> bool:
    """Whether a train summary shares at least 80 % of its words with this row's."""
    words = _words(row.summary)
    return any(len(words & other) >= 0.8 * len(words | other) for other in known)


# ── tokens ────────────────────────────────────────────────────────────────────────────────


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Train a byte-level BPE of VOCAB_SIZE tokens that puts <|begin|> before every text."""
    tokenizer = Tokenizer(models.BPE())
    # Words, single digits, punctuation, white space. The last space of a run of white space belongs
    # to the next word, so "\n" + indentation is one token and " return" is the same everywhere.
    words = Regex(r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return tokenizer


def token_stream(texts: Iterable[str], tokenizer: Tokenizer) -> np.ndarray:
    """uint16 [n]: all documents, each between <|begin|> and <|end|>."""
    end = tokenizer.token_to_id(END)
    ids = [i for text in texts for i in (*tokenizer.encode(text).ids, end)]
    return np.asarray(ids, dtype=np.uint16)


TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": BOS,
    "eos_token": END,
    "pad_token": PAD,
    "extra_special_tokens": ROLES,
    "clean_up_tokenization_spaces": False,
    "model_max_length": 512,
}


# ── writing ───────────────────────────────────────────────────────────────────────────────


def write_data(stdlib: Path, demo: Path, tokens: Path) -> None:
    """Write rows, tokenizer and licence to `demo`, and the base model's tokens to `tokens`."""
    demo.mkdir(parents=True, exist_ok=True)
    tokens.mkdir(parents=True, exist_ok=True)
    texts = sources(stdlib)
    train = [text for module, text in texts.items() if not is_held_out(module)]
    heldout = [text for module, text in texts.items() if is_held_out(module)]
    tokenizer = train_tokenizer(train)
    write_text(demo / "tokenizer.json", tokenizer.to_str())
    write_json(demo / "tokenizer_config.json", TOKENIZER_CONFIG)
    write_text(demo / "chat_template.jinja", CHAT_TEMPLATE)
    write_text(demo / "LICENSE-python.txt", (stdlib / "LICENSE.txt").read_text())

    print(f"CPython {sys.version.split()[0]}, {stdlib}")
    for name, rows in split_rows(texts, tokenizer)._asdict().items():
        lines = [json.dumps(row.messages()) + "\n" for row in rows]
        write_text(demo / f"{name}.jsonl", "".join(lines))
        print(f"{name}: {len(rows):,} rows")
    for name, documents in (("train", train), ("heldout", heldout)):
        stream, size = token_stream(documents, tokenizer), len("".join(documents).encode())
        atomic_write(tokens / f"demo_{name}.bin", lambda file, s=stream: file.write(s.tobytes()))
        print(f"{name}: {len(documents)} modules, {size:,} bytes, {len(stream):,} tokens")
