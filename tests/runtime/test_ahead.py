"""Threads that do work ahead: errors, the end of the process, Ctrl-C and fork."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from time import monotonic, sleep

import pytest

from fastlora.runtime.ahead import _wait_for_all, ahead, imports

ROOT = Path(__file__).parents[2]


def script(code: str, **more: object) -> subprocess.Popen[str]:
    """A process that runs the code, in which `slow(name)` writes a module that takes a second.

    The module leaves a file NAME.begun and a file NAME.done in `folder`.
    """
    start = """
        import os, signal, sys, tempfile, threading, time
        from pathlib import Path
        from fastlora.runtime.ahead import ahead, imports

        folder = tempfile.mkdtemp()
        sys.path.insert(0, folder)

        def slow(name):
            leave = f"Path({folder!r}, '{name}.%s').touch()"
            parts = ("from pathlib import Path", leave % "begun", "import time; time.sleep(1)")
            Path(folder, name + ".py").write_text("\\n".join((*parts, "value = 1", leave % "done")))
            return name
    """
    code = textwrap.dedent(start) + textwrap.dedent(code)
    command = [sys.executable, "-c", code]
    return subprocess.Popen(command, cwd=ROOT, stdout=-1, stderr=-1, text=True, **more)  # pyright: ignore


def output(code: str) -> str:
    process = script(code)
    out, err = process.communicate(timeout=30)
    assert not process.returncode and not err, err
    return out.strip()


def test_tasks_run_in_order_in_another_thread():
    seen: list[tuple[int, bool]] = []
    is_main = lambda: threading.current_thread() is threading.main_thread()
    ahead([lambda i=i: seen.append((i, is_main())) for i in range(3)]).wait()
    assert seen == [(0, False), (1, False), (2, False)]


def test_a_thread_that_is_stopped_ends_after_its_task():
    begun, end = threading.Event(), threading.Event()
    seen: list[int] = []
    thread = ahead([begun.set, lambda: end.wait(60), lambda: seen.append(1)])
    begun.wait(60)
    thread.stop()
    end.set()
    thread.wait()
    assert not seen


def test_an_error_reaches_nobody_and_later_tasks_run(capfd, tmp_path, monkeypatch):
    """The code that needs the module gets the error again."""
    (tmp_path / "fastlora_broken.py").write_text("raise OSError('disk')")
    monkeypatch.syspath_prepend(tmp_path)
    done = threading.Event()
    ahead([*imports(["fastlora_broken", "fastlora_no_such_module"]), done.set]).wait()
    assert done.is_set() and capfd.readouterr() == ("", "")
    with pytest.raises(OSError, match="disk"):
        __import__("fastlora_broken")


def test_the_process_ends_after_the_task_that_runs():
    """Of ten modules of a second each, one is imported."""
    begin = monotonic()
    assert output("ahead(imports(map(slow, 'abcdefghij'))); time.sleep(0.2)") == ""
    assert monotonic() - begin < 5


def test_an_import_in_the_main_thread_waits_for_the_one_that_runs():
    code = """
        thread = ahead(imports([slow("a")]))
        while not Path(folder, "a.begun").exists():
            time.sleep(0.01)
        Path(folder, "a.begun").unlink()
        import a
        print(a.value, Path(folder, "a.begun").exists())
    """
    assert output(code) == "1 False"  # the module has not run twice


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork is a call of POSIX systems")
def test_a_child_of_fork_can_import_a_module_that_was_being_imported():
    """Without the wait before the fork, the child waits forever for a lock that no thread holds."""
    code = """
        ahead(imports([slow("a")]))
        time.sleep(0.2)
        child = os.fork()
        signal.alarm(10)
        import a
        if child:
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), a.value)
        else:
            ahead([lambda: None]).wait()
            os._exit(0)
    """
    assert output(code) == "0 1"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork is a call of POSIX systems")
def test_fork_waits_for_threads_that_a_task_starts_meanwhile():
    started, seen = threading.Event(), []

    def second() -> None:
        started.wait(60)
        sleep(0.2)
        seen.append("second")

    def first() -> None:
        sleep(0.1)
        ahead([second])

    ahead([first])
    threading.Timer(0.15, started.set).start()
    _wait_for_all()  # what os.fork calls
    assert seen == ["second"]


def test_ctrl_c_ends_the_process_after_the_task_that_runs():
    # A process that a shell has started in the background ignores SIGINT, and so do its children.
    code = """
        signal.signal(signal.SIGINT, signal.default_int_handler)
        thread = ahead(imports(map(slow, "abcdefghij")))
        time.sleep(0.2)
        print(folder, flush=True)
        thread.wait()
    """
    process = script(code)
    assert process.stdout is not None
    folder = Path(process.stdout.readline().strip())
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    begun, done = ({p.stem for p in folder.glob(f"*.{x}")} for x in ("begun", "done"))
    assert begun == done and 1 <= len(done) < 10
    assert err.rstrip().endswith("KeyboardInterrupt") and "Exception ignored" not in err
