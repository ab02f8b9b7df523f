"""scripts/test.sh with other programs in place of pytest and pyright: failures and Ctrl-C."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = {
    "ruff": "exit 0",
    "pip": "exit 0",
    "chromium": "exit 0",
    "pyright": "echo $$ >pyright.pid; echo types; exit 0",
    "python": 'echo "tests $*"; exit 0',
}
# As pyright's wrapper does, which starts node and waits for it.
SLOW = 'sleep 60 & echo "$!" >pyright.pid; wait'
WRONG = "echo wrong type; echo $$ >pyright.pid; exit 1"
STARTED = "until [ -s pyright.pid ]; do sleep 0.01; done;"


@pytest.fixture
def run(tmp_path):
    """run(name=script, ...): test.sh with these programs in place of PROGRAMS."""
    (tmp_path / "scripts").mkdir()
    for name in ("test.sh", "environment.sh", "constraints.txt"):
        shutil.copy(ROOT / "scripts" / name, tmp_path / "scripts")
    for file in ROOT.glob("scripts/requirements*.txt"):
        shutil.copy(file, tmp_path / "scripts")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    folder = tmp_path / ".venv-test"
    for peer in ("torchtune", "unsloth", "triton"):
        (folder / peer / "site-packages").mkdir(parents=True)
    (folder / "bin").mkdir()
    stamp = "cat scripts/requirements*.txt scripts/constraints.txt pyproject.toml | cksum"
    stamp += " | tr -d ' '"
    told = subprocess.run(stamp, shell=True, cwd=tmp_path, capture_output=True, text=True)
    (folder / told.stdout.strip()).touch()

    def start(**programs: str) -> subprocess.Popen:
        for name, script in (PROGRAMS | programs).items():
            (folder / "bin" / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
            (folder / "bin" / name).chmod(0o755)
        shutil.copytree(folder / "bin", tmp_path / "programs", dirs_exist_ok=True)
        path = f"{tmp_path / 'system'}:{folder / 'bin'}:{os.environ['PATH']}"
        return subprocess.Popen(
            # The tests may run in the background, where shells have SIGINT ignored.
            ["env", "--default-signal=INT", "bash", "scripts/test.sh"],
            cwd=tmp_path,
            env=os.environ | {"PATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    return start


def ends(pid: int) -> bool:
    """Whether a process ends within ten seconds; a zombie has ended."""
    for _ in range(1000):
        try:
            if ") Z " in Path(f"/proc/{pid}/stat").read_text():
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.01)
    return False


def test_all_parts_run(run):
    process = run()
    told, _ = process.communicate(timeout=30)
    first, types, second = told.strip().split("\n")
    assert process.returncode == 0 and types == "types"
    assert "not compile" in first and second.endswith("-m compile")


@pytest.mark.parametrize(
    "failing, said",
    [
        ({"pyright": "echo wrong type; exit 1"}, "wrong type"),
        ({"python": "exit 5"}, ""),
        ({"pyright": WRONG, "python": f"{STARTED} sleep 0.1; exit 5"}, "wrong type"),
        ({"ruff": "exit 1"}, ""),
    ],
)
def test_a_part_that_fails_is_the_result(run, failing, said):
    process = run(**failing)
    told, _ = process.communicate(timeout=30)
    assert process.returncode in (1, 5) and said in told and "-m compile" not in told


def test_a_failed_installation_of_chromium_is_named(run, tmp_path):
    with (tmp_path / "scripts" / "environment.sh").open("a") as script:
        script.write("install_chromium() { exit 1; }\n")
    process = run()
    told, _ = process.communicate(timeout=30)
    assert process.returncode == 1 and "Chromium" in told and "tests" not in told


def test_ctrl_c_ends_a_set_up_that_compiles(run, tmp_path):
    """compileall answers SIGINT with an ordinary exit status. The environment has no stamp then."""
    changed = tmp_path / "scripts" / "constraints.txt"
    changed.write_text(changed.read_text() + "\n")
    python3 = tmp_path / "system" / "python3"  # makes an environment of the same programs
    python3.parent.mkdir()
    python3.write_text('#!/usr/bin/env bash\nmkdir "$3" && cp -r programs "$3/bin"\n')
    python3.chmod(0o755)
    # sleep is in the background: bash runs no trap while it waits for a program in the foreground,
    # and a signal between that program's fork and exec is lost.
    process = run(python="trap 'kill $! 2>/dev/null; exit 1' INT; sleep 60 & echo ready >&2; wait")
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGINT)
    told, _ = process.communicate(timeout=30)
    assert process.returncode == 130 and told == ""
    assert [x.name for x in (tmp_path / ".venv-test").iterdir()] == ["bin"]


def test_pyright_ends_with_the_script(run, tmp_path):
    """With the processes that it has started, after failing tests and after Ctrl-C."""
    process = run(pyright=SLOW, python=f"{STARTED} exit 5")
    process.communicate(timeout=30)
    assert process.returncode == 5 and ends(int((tmp_path / "pyright.pid").read_text()))
    (tmp_path / "pyright.pid").unlink()
    # pytest answers SIGINT with an ordinary exit status.
    tests = f"trap 'kill $! 2>/dev/null; exit 2' INT; {STARTED} sleep 60 & echo ready; wait"
    process = run(pyright=SLOW, python=tests)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130 and ends(int((tmp_path / "pyright.pid").read_text()))
