"""run_python_blocks(): the Python code of a page of documentation, run as one program."""

import re
import runpy
from pathlib import Path
from typing import Any


def run_python_blocks(page: Path, folder: Path) -> dict[str, Any]:
    """All names that the page's blocks of Python define, run from top to bottom.

    Args:
        page: a Markdown file.
        folder: where the program is written.
    """
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    path = folder / "example.py"
    path.write_text("\n".join(blocks))
    return runpy.run_path(str(path))
