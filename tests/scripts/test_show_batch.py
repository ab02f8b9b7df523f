"""scripts/show_batch.py: what is shown as trained is what the labels of train's batch say."""

import re
import sys
from html.parser import HTMLParser

import pytest
import show_batch

import fastlora
from fastlora.checkpoints.hub import DEMO
from fastlora.data.rows import read_rows

ROWS = DEMO / "heldout.jsonl"


@pytest.fixture
def run(monkeypatch, capsys):
    """run(arguments): what the script prints."""

    def with_arguments(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["show_batch.py", *map(str, arguments)])
        show_batch.main()
        return capsys.readouterr().out

    return with_arguments


class Page(HTMLParser):
    """Trained and other tokens of a page, in order, with what the pointer shows."""

    def __init__(self, text: str):
        super().__init__()
        self.tokens, self.headings, self._open = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self._open = (tag, dict(attrs).get("title"))
        if tag in "bi" and self._open[1]:
            self.tokens.append([*self._open, ""])

    def handle_endtag(self, tag):
        self._open = None

    def handle_data(self, data):
        if self._open and self._open[0] == "h3":
            self.headings.append(data)
        elif self._open and self._open[1]:
            self.tokens[-1][2] += data


def test_replies_and_their_end_are_marked_as_trained(run):
    plain = run(ROWS, "--sequences", 3)
    replies = {row["messages"][-1]["content"] + "<|end|>" for row in read_rows(ROWS)}
    marked = re.findall(r"(?s)<\|assistant\|>\[(.*?<\|end\|>)\]", plain)
    assert len(marked) > 20 and set(marked) <= replies
    coloured = run(ROWS, "--sequences", 3, "--colour")
    found = re.findall(r"(?s)\x1b\[1;32m(.*?)\x1b\[0m", coloured)
    assert found == marked
    stripped = re.sub(r"\x1b\[[0-9;]*m", "", coloured)
    assert stripped == re.sub(r"(?s)(<\|assistant\|>)\[(.*?<\|end\|>)\]", r"\1\2", plain)


def test_the_page_has_every_token_with_its_position_and_id(run, tmp_path):
    path = tmp_path / "batch.html"
    run(ROWS, "--html", path, "--sequences", 2, "--max-seq-length", 256)
    page = Page(path.read_text())
    tokenizer = fastlora.Tokenizer.from_folder(DEMO)
    assert tokenizer is not None
    starts = [i for i, token in enumerate(page.tokens) if token[1].endswith(" position 0")]
    assert len(starts) == sum(heading.startswith("document") for heading in page.headings)
    for first, end in zip(starts, [*starts[1:], len(page.tokens)], strict=True):
        document = page.tokens[first:end]
        ids = [int(title.split()[1].rstrip(",")) for _, title, _ in document]
        assert [title.split()[-1] for _, title, _ in document] == [*map(str, range(len(ids)))]
        text = tokenizer.decode(ids, skip_special_tokens=False)
        assert "".join(piece for _, _, piece in document) == show_batch.printable(text)
    trained = sum(tag == "b" for tag, _, _ in page.tokens)
    told = [re.search(r": (\d+) of", heading) for heading in page.headings]
    assert trained == sum(int(found[1]) for found in told if found)


def test_a_terminal_gets_no_control_characters():
    document = show_batch.Document(1, 0, [show_batch.Token(5, "\x1b[2J\x07a\nb\u202e", True)])
    shown = show_batch.as_text([[document]], colour=False)
    assert r"[\x1b[2J\x07a" + "\n" + r"b\u202e]" in shown


def test_characters_of_several_tokens_and_markup_are_shown_once(run, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "🙂 <b>straße</b> &amp; 🙂🙂"}')
    shown = run(tmp_path / "rows.jsonl", "--sequences", 1)
    assert "🙂 <b>straße</b> &amp; 🙂🙂<|end|>]" in shown
    run(tmp_path / "rows.jsonl", "--html", tmp_path / "x.html")
    assert "".join(t for _, _, t in Page((tmp_path / "x.html").read_text()).tokens) == (
        "<|begin|>🙂 <b>straße</b> &amp; 🙂🙂<|end|>"
    )
