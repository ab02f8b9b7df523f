"""The prose of the project is plain: few phrases of the kinds in oracles/plain_english.py."""

from pathlib import Path

import pytest

from oracles.plain_english import count

ROOT = Path(__file__).parents[1]
PER_10_000_WORDS = 15


def markdown() -> list[Path]:
    """README.md and the other Markdown files of the top folder."""
    return sorted(ROOT.glob("*.md"))


@pytest.mark.parametrize("folder", ["fastlora", "scripts", "tests", "*.md"])
def test_at_most_15_hits_per_10_000_words(folder):
    words, hits = count(markdown() if folder == "*.md" else [ROOT / folder])
    assert words > 500
    assert len(hits) * 10_000 <= PER_10_000_WORDS * words, "\n".join(hits)


@pytest.mark.parametrize(
    ("line", "hits"),
    [
        ("# Arguments that cannot be are refused.", 1),
        ("# It is no tensor.", 1),
        ("# It is no longer read.", 0),
        ("# Written where there is one.", 1),
        ("# The file as it is.", 1),
        ("# A name of its own.", 1),
        ("# Nobody reads whatever lies here.", 3),
        ("# What is not there is not read.", 1),
        ("# `nobody` reads the code.", 0),
        ("x = 'nobody lies'", 0),
    ],
)
def test_each_kind_of_phrase_is_counted(line, hits, tmp_path):
    (tmp_path / "a.py").write_text(line + "\n")
    assert len(count([tmp_path])[1]) == hits


def test_docstrings_and_markdown_are_read(tmp_path):
    (tmp_path / "a.py").write_text('def f():\n    """As it is.\n\n    Nobody.\n    """\n')
    (tmp_path / "b.md").write_text("Nobody.\n\n```\nnobody\n```\n")
    words, hits = count([tmp_path])
    assert words == 5
    assert [hit.split("/")[-1].split(": ")[0] for hit in hits] == ["a.py:2", "a.py:4", "b.md:1"]
