"""Modules that the first step needs are imported while data are read."""

import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch

from fastlora.runtime import first_step
from fastlora.runtime.first_step import preparing_first_step

CPU = torch.device("cpu")


@pytest.fixture
def imported(monkeypatch) -> list[tuple[str, str]]:
    """A list that gets (module, thread) of every import, which do nothing."""
    found: list[tuple[str, str]] = []
    note = lambda name: found.append((name, threading.current_thread().name))
    monkeypatch.setattr(first_step, "import_module", note)
    return found


def test_inductor_is_imported_for_compiled_models_only(imported):
    for compile, names in (
        ("auto", ["torch._dynamo"]),
        (False, ["torch._dynamo"]),
        (True, ["torch._dynamo", "torch._inductor.compile_fx"]),
    ):
        imported.clear()
        with preparing_first_step(compile, CPU):
            pass
        assert [name for name, _ in imported] == names
        assert all(thread.startswith("fastlora-imports") for _, thread in imported)


def test_an_error_of_the_block_does_not_wait(monkeypatch):
    begun, end = threading.Event(), threading.Event()

    def slow(name: str) -> None:
        begun.set()
        end.wait(60)

    monkeypatch.setattr(first_step, "import_module", slow)
    with pytest.raises(KeyError), preparing_first_step(False, CPU):
        begun.wait(60)
        raise KeyError("row")
    assert not end.is_set()
    end.set()


def test_an_import_that_fails_is_left_to_its_user(monkeypatch):
    def fail(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(first_step, "import_module", fail)
    with preparing_first_step(True, CPU):
        pass


def test_the_modules_exist():
    """In a process of its own, where torch._dynamo is not imported yet."""
    code = """
        import sys
        import torch
        from fastlora.runtime.first_step import preparing_first_step

        names = ("torch._dynamo", "torch._inductor.compile_fx")
        before = [name in sys.modules for name in names]
        with preparing_first_step(True, torch.device("cpu")):
            pass
        print(before, [name in sys.modules for name in names])
    """
    root = Path(__file__).parents[2]
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=root, capture_output=True, text=True
    )
    assert ran.stdout.strip() == "[False, False] [True, True]", ran.stderr
