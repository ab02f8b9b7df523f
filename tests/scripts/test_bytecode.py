"""Python keeps bytecode of torch in the user's cache if it is not kept beside torch."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"

CODE = """
import sys
sys.path[:0] = sys.argv[1:]
from finetuning.bytecode import keep_bytecode
keep_bytecode("package_of_test")
import package_of_test
print(sys.pycache_prefix)
"""


@pytest.fixture
def package(tmp_path) -> Path:
    """A package without bytecode."""
    folder = tmp_path / "site" / "package_of_test"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("value = 1")
    return folder


def prefix(package: Path, cache: Path, **more: str) -> str:
    """sys.pycache_prefix of a process that has imported the package."""
    hidden = ("PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX")
    environment = {name: x for name, x in os.environ.items() if name not in hidden}
    environment |= {"XDG_CACHE_HOME": str(cache)} | more
    command = [sys.executable, "-c", CODE, str(package.parent), str(SCRIPTS)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return ran.stdout.strip()


def test_bytecode_that_may_not_be_written_is_kept_in_the_cache(package, tmp_path):
    cache = tmp_path / "cache"
    found = prefix(package, cache, PYTHONDONTWRITEBYTECODE="1")
    assert found == str(cache / "fastlora" / "bytecode")
    assert [*Path(found).rglob("package_of_test/__init__*.pyc")]
    assert not (package / "__pycache__").exists()


def test_nothing_changes_where_python_keeps_bytecode(package, tmp_path):
    cache = tmp_path / "cache"
    assert prefix(package, cache) == "None"  # Python writes it beside the package
    assert Path(importlib.util.cache_from_source(str(package / "__init__.py"))).exists()
    assert prefix(package, cache, PYTHONDONTWRITEBYTECODE="1") == "None"  # it is there
    assert not cache.exists()


def test_a_prefix_of_the_user_stays(package, tmp_path):
    chosen = str(tmp_path / "chosen")
    more = {"PYTHONPYCACHEPREFIX": chosen, "PYTHONDONTWRITEBYTECODE": "1"}
    assert prefix(package, tmp_path / "cache", **more) == chosen
