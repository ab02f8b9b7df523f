"""Count stilted phrases in comments, docstrings, texts of errors and Markdown files.

    python tests/oracles/plain_english.py [PATH...]

Prints the number of hits per 10,000 words, then the lines with hits. test_plain_english.py allows
15. Code in backquotes or code blocks does not count, nor do string literals other than docstrings.
"""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

PATTERNS = {
    # `what cannot be`, `arguments that may not be.`
    "unfinished verb": r"\b(?:what|that) cannot be\b"
    r"|\b(?:can|could|may|must) not be\b(?=\s*(?:[.;,:)]|$))",
    # `which is none`, `it is no tensor`; "no longer" and "no more" do not count.
    "negated noun": r"\b(?:that|which|who|it) (?:is|are|was|were) none\b"
    r"|\b(?:is|are|was|were) no (?!longer\b|more\b|less\b|fewer\b)\w",
    # `where there is one`, `where they lie`
    "where without a place": r"\bwhere (?:there is|they lie|it lies|nobody|nothing)\b"
    r"|\bitself where\b",
    # `as it is`, `as they stand`
    "as it is": r"\bas (?:it|they|he) (?:is|are|was|were|stands?|lies?)\b",
    # `a name of its own`
    "of its own": r"\bof (?:its|their|our|his) own\b",
    "literary word": r"\b(?:whatever|nobody|somebody|anybody|likewise|anew|hitherto|thereby)\b"
    r"|\b(?:save that|but for)\b",
    # `the file lies there`, `goes by a name`
    "figure of speech": r"\b(?:stands?|lies?|goes by|comes to)\b",
    # `What is not there is not read.`
    "headless clause": r"(?:^|[.:;,] )what (?:is|it|the|of|was|one|an?|no)\b",
}
RULES = {name: re.compile(pattern, re.IGNORECASE) for name, pattern in PATTERNS.items()}


def python_prose(text: str) -> Iterator[tuple[int, str]]:
    """(line number, text) of comments and docstrings."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string.lstrip("# ")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = ast.get_docstring(node, clean=False)
            if docstring is not None:
                first = node.body[0].lineno
                yield from enumerate(docstring.split("\n"), first)


def markdown_prose(text: str) -> Iterator[tuple[int, str]]:
    """(line number, text) outside code blocks."""
    code = False
    for number, line in enumerate(text.split("\n"), 1):
        if line.lstrip().startswith("```"):
            code = not code
        elif not code:
            yield number, line


def prose(path: Path) -> list[tuple[int, str]]:
    """(line number, text) of a file's prose, without what is in backquotes."""
    lines = python_prose if path.suffix == ".py" else markdown_prose
    found = lines(path.read_text(encoding="utf-8"))
    return [(number, re.sub(r"`[^`]*`", "", line)) for number, line in found]


def files(paths: list[Path]) -> list[Path]:
    """The Python and Markdown files among paths and below folders."""
    found = [f for p in paths for f in ([p] if p.is_file() else sorted(p.rglob("*")))]
    return [f for f in found if f.suffix in (".py", ".md")]


def count(paths: list[Path]) -> tuple[int, list[str]]:
    """Number of words, and one line of text per hit."""
    words, hits = 0, []
    for path in files(paths):
        for number, line in prose(path):
            words += len(line.split())
            for name, rule in RULES.items():
                hits += [f"{path}:{number}: {name}: {line.strip()}" for _ in rule.findall(line)]
    return words, hits


def main() -> None:
    words, hits = count([Path(p) for p in sys.argv[1:] or ["fastlora", "scripts", "tests"]])
    print(f"{len(hits)} hits in {words} words: {1e4 * len(hits) / max(words, 1):.1f} per 10,000")
    print("\n".join(hits))


if __name__ == "__main__":
    main()
