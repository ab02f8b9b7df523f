"""scripts/compare_with.py runs the table of the program that it is asked for."""

import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "compare_with.py"


@pytest.fixture
def run(monkeypatch):
    """run(program): the names of the modules that the script runs."""
    script = runpy.run_path(str(SCRIPT))

    def of(program: str) -> list[str]:
        ran: list[str] = []
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [str(SCRIPT), program])
            patch.setattr(sys, "path", [*sys.path])
            patch.setattr(runpy, "run_module", lambda name, run_name: ran.append(name))
            script["main"]()
        return ran

    return of


def test_each_program_has_a_table(run):
    for program in ("transformers", "peft", "llama.cpp"):
        (table,) = run(program)
        assert find_spec(table) is not None, table


def test_another_program_is_refused(run, capsys):
    with pytest.raises(SystemExit, match="2"):
        run("vllm")
    assert "llama.cpp" in capsys.readouterr().err
