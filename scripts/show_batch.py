"""Show packed sequences of training rows: which tokens are trained, and where documents begin.

    python scripts/show_batch.py --model meta-llama/Llama-3.2-1B-Instruct rows.jsonl
    python scripts/show_batch.py fastlora/checkpoints/demo/train.jsonl --html batch.html

In a terminal, trained tokens are green and other tokens grey. Without colours, trained tokens stand
between [ and ]. A line before each document gives its positions in the sequence, and how many of
its tokens are trained; positions of the model restart at 0 with each document. On the HTML page, a
border shows every token, and the pointer over it shows its id and position.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
from finetuning.ending import user_errors

from fastlora.arguments import RANDOM_SEED, option, whole_number
from fastlora.checkpoints.hub import DEMO, find_folder
from fastlora.checkpoints.tensors import write_text
from fastlora.data.batches import batches
from fastlora.data.encoding import RowLimits
from fastlora.data.left_out import report
from fastlora.data.packing import pack
from fastlora.data.reading import read_examples
from fastlora.ops.loss.ignore import IGNORE
from fastlora.text.tokenizer import Tokenizer

GREEN, GREY, BLUE, PLAIN = "\x1b[1;32m", "\x1b[90m", "\x1b[36m", "\x1b[0m"

STYLE = """
body { font: 14px/1.7 ui-monospace, monospace; max-width: 110ch; margin: 2em auto; }
section { border: 1px solid #999; margin: 1em 0; padding: 0 1em; }
article { border-top: 2px solid #36c; margin: 1em 0; white-space: pre-wrap; }
h2, h3 { font-size: 1em; color: #36c; white-space: normal; }
b, i { font-weight: normal; font-style: normal; border-left: 1px solid #ccc; }
b { background: #bfe8bf; } i { color: #777; }
""".strip()

# Tokens before a token with which it is decoded: a leading space may depend on them.
_BEFORE = 4


class Token(NamedTuple):
    """One token of a document."""

    id: int
    text: str  # "" if the character is completed by a later token
    trained: bool


class Document(NamedTuple):
    """One segment of a packed sequence."""

    number: int  # 0 is padding
    start: int  # its first position in the sequence
    tokens: list[Token]

    @property
    def title(self) -> str:
        """The document's number, place and count of trained tokens."""
        at = f"positions {self.start} to {self.start + len(self.tokens) - 1}"
        if self.number == 0:
            return f"padding, {at}: {len(self.tokens)} tokens"
        trained = sum(token.trained for token in self.tokens)
        return f"document {self.number}, {at}: {trained} of {len(self.tokens)} tokens trained"


def documents(
    ids: np.ndarray, labels: np.ndarray, segments: np.ndarray, tokenizer: Tokenizer
) -> list[Document]:
    """The documents of one sequence in order, and its padding."""
    found = []
    for number, group in groupby(range(len(ids)), key=lambda i: int(segments[i])):
        at = [*group]
        texts = token_texts(ids[at].tolist(), tokenizer) if number else [""] * len(at)
        marks = (labels[at] != IGNORE).tolist()
        tokens = [Token(*parts) for parts in zip(ids[at].tolist(), texts, marks, strict=True)]
        found.append(Document(number, at[0], tokens))
    return found


def token_texts(ids: list[int], tokenizer: Tokenizer) -> Iterator[str]:
    """The text of each token. A character of several tokens is given with the last of them."""
    begin, shown = 0, ""  # `shown` is the text of ids[begin:i] that was given already
    for i in range(len(ids)):
        text = tokenizer.decode(ids[begin : i + 1], skip_special_tokens=False)
        if text.endswith("\N{REPLACEMENT CHARACTER}") and i + 1 < len(ids):
            yield ""
            continue
        yield text[len(shown) :]
        begin = max(begin, i + 1 - _BEFORE)
        shown = tokenizer.decode(ids[begin : i + 1], skip_special_tokens=False)


def printable(text: str) -> str:
    """Text without control characters, which a terminal obeys; line breaks and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def as_text(sequences: Sequence[list[Document]], *, colour: bool) -> str:
    """All sequences for a terminal, or with marks in place of colours."""
    heading = f"{BLUE}%s{PLAIN}" if colour else "%s"
    styles = {True: f"{GREEN}%s{PLAIN}", False: f"{GREY}%s{PLAIN}"}
    styles = styles if colour else {True: "[%s]", False: "%s"}
    lines = []
    for row, parts in enumerate(sequences, 1):
        lines.append(heading % f"===== sequence {row} =====")
        for document in parts:
            lines.append(heading % f"--- {document.title}")
            runs = groupby(document.tokens, key=lambda token: token.trained)
            text = [styles[t] % printable("".join(x.text for x in run)) for t, run in runs]
            lines += ["".join(text)] if document.number else []
    return "\n".join(lines) + "\n"


def as_html(sequences: Sequence[list[Document]]) -> str:
    """All sequences as one page."""
    body = []
    for row, parts in enumerate(sequences, 1):
        body.append(f"<section><h2>sequence {row}</h2>")
        for document in parts:
            body.append(f"<article><h3>{escape(document.title)}</h3>")
            if document.number:
                body += [_html(token, i) for i, token in enumerate(document.tokens)]
            body.append("</article>")
        body.append("</section>")
    head = f'<meta charset="utf-8"><title>packed batch</title><style>{STYLE}</style>'
    legend = "<p><b>trained tokens</b> <i>other tokens</i></p>"
    return f"<!doctype html>\n{head}\n{legend}\n{''.join(body)}\n"


def _html(token: Token, position: int) -> str:
    tag = "b" if token.trained else "i"
    title = f"id {token.id}, position {position}"
    return f'<{tag} title="{title}">{escape(printable(token.text))}</{tag}>'


def packed_batch(arguments: argparse.Namespace) -> list[list[Document]]:
    """The documents of the first sequences that `train` would use."""
    tokenizer = Tokenizer.from_folder(find_folder(arguments.model))
    if tokenizer is None:
        raise ValueError(f"{arguments.model} has no tokenizer.json")
    length = arguments.max_seq_length
    limits = RowLimits(length, split_text=True, too_long=arguments.too_long)
    given = dict(train_on=arguments.train_on, progress=True)
    examples, left_out = read_examples(arguments.data, tokenizer, limits, **given)
    report([left_out], None)
    sequences = pack(examples, length, pad_token_id=tokenizer.pad_token_id)
    batch = next(batches(sequences, arguments.sequences, seed=arguments.seed))
    ids, labels, segments = (batch[x].numpy() for x in ("input_ids", "labels", "segment_ids"))
    rows = zip(ids, labels, segments, strict=True)
    return [documents(i, trained, s, tokenizer) for i, trained, s in rows]


@user_errors()
def main() -> None:
    show(parse_arguments())


def show(arguments: argparse.Namespace) -> None:
    """Show the batch, or write the page."""
    sequences = packed_batch(arguments)
    if arguments.html is not None:
        write_text(arguments.html, as_html(sequences))
        return
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    colour = colour if arguments.colour is None else arguments.colour
    sys.stdout.write(as_text(sequences, colour=colour))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("data", nargs="?", default=DEMO / "train.jsonl", help="as for train: file, folder or glob")
    add("--model", default="demo", help='the tokenizer\'s: "demo", a folder, or a Hub id')
    count = option(int, whole_number(1))
    add("--max-seq-length", type=count, default=512)
    add("--sequences", type=count, default=2, help="number of sequences to show")
    add("--train-on", default="responses", choices=["responses", "last_response", "all"])
    add("--too-long", default="error", choices=["error", "drop", "truncate", "split"])
    add("--seed", type=option(int, RANDOM_SEED), default=3407)
    add("--html", type=Path, help="write a page to this file")
    add("--colour", action=argparse.BooleanOptionalAction, help="default: in a terminal")
    return parser.parse_args()


if __name__ == "__main__":
    main()
