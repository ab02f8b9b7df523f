"""Write each example as a notebook: python scripts/examples/make_notebooks.py FOLDER.

A line "# %%" begins a code cell, "# %% [markdown]" a text cell, whose lines begin with "# ".
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MARK = re.compile(r"^# %%(?P<markdown> \[markdown\])?\n", re.MULTILINE)
# The newest format whose cells need no ids. https://nbformat.readthedocs.io/en/latest/format_description.html
FORMAT = {"nbformat": 4, "nbformat_minor": 4}


def scripts() -> list[Path]:
    """The scripts of this folder that have cells."""
    return [path for path in sorted(HERE.glob("*.py")) if path.read_text().startswith("# %%")]


def cells(text: str) -> list[dict[str, Any]]:
    """The cells of a script, in nbformat's form; empty ones are left out."""
    _, *parts = MARK.split(text)
    found = []
    for markdown, body in zip(parts[::2], parts[1::2], strict=True):
        body = body.strip("\n")
        if markdown:
            body = re.sub(r"^# ?", "", body, flags=re.MULTILINE)
        if body:
            source = body.splitlines(keepends=True)
            found.append(_text(source) if markdown else _code(source))
    return found


def _text(source: list[str]) -> dict[str, Any]:
    return {"cell_type": "markdown", "metadata": {}, "source": source}


def _code(source: list[str]) -> dict[str, Any]:
    empty = {"metadata": {}, "execution_count": None, "outputs": []}
    return {"cell_type": "code", "source": source, **empty}


def notebook(text: str) -> dict[str, Any]:
    """The notebook of a script."""
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": cells(text), "metadata": metadata, **FORMAT}


def code(text: str) -> str:
    """The source of all code cells of a script."""
    found = (cell["source"] for cell in cells(text) if cell["cell_type"] == "code")
    return "\n\n\n".join("".join(source) for source in found) + "\n"


def write_notebooks(folder: Path) -> list[Path]:
    """Write the notebooks of all scripts; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for path in scripts():
        target = folder / f"{path.stem}.ipynb"
        target.write_text(
            json.dumps(notebook(path.read_text()), indent=1, ensure_ascii=False) + "\n"
        )
        written.append(target)
    return written


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    for path in write_notebooks(parser.parse_args().folder):
        print(path)
