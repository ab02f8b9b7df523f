"""Atomic writes: what they leave behind, what they sweep away, and how they fail."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastlora.checkpoints import atomic
from fastlora.checkpoints.atomic import atomic_write, sweep_temporary_files

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def dead_process_leaves_a_file(folder: Path) -> Path:
    """A process writes a file and dies before the file gets its name."""
    script = (
        "import os, signal, sys; from pathlib import Path\n"
        "from fastlora.checkpoints.atomic import atomic_write\n"
        "die = lambda file: (file.write(b'half'), file.flush(), os.kill(os.getpid(), 9))\n"
        "atomic_write(Path(sys.argv[1]) / 'a.bin', die)"
    )
    environ = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    ended = subprocess.run([sys.executable, "-c", script, str(folder)], env=environ, timeout=60)
    assert ended.returncode == -9
    (left,) = folder.iterdir()
    return left


def test_the_next_save_sweeps_the_files_of_a_dead_process(tmp_path):
    left = dead_process_leaves_a_file(tmp_path)
    atomic_write(tmp_path / "b.bin", lambda file: file.write(b"b"))
    assert not left.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["b.bin"]


def test_a_process_with_the_number_of_a_dead_one_does_not_protect_its_files(tmp_path):
    """In a container every run may be process 1."""
    pid, start = os.getpid(), atomic._start_time(os.getpid())
    mine, earlier = (tmp_path / f".a.{pid}-{s}.0123abcd.tmp" for s in (start, start - 1))
    for path in (mine, earlier):
        path.write_bytes(b"half")
    sweep_temporary_files(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [mine.name]


def test_files_of_others_are_left_alone(tmp_path):
    names = [".a.0123abcd.tmp", "a.tmp", ".a.4711-1.tmp", ".a.4711-1.0123abcd.bak"]
    for name in names:
        (tmp_path / name).write_text("")
    sweep_temporary_files(tmp_path)
    sweep_temporary_files(tmp_path / "absent")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names)


def test_a_full_disk_names_the_final_path_and_the_bytes(tmp_path, monkeypatch):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def fsync(_):
        raise FULL

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="12 bytes of this file were written") as error:
        atomic_write(path, lambda file: file.write(b"x" * 12))
    assert error.value.errno == errno.ENOSPC
    assert error.value.filename == str(path)
    assert "bytes free" in str(error.value)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_an_error_of_another_file_keeps_its_name(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        atomic_write(tmp_path / "a.bin", lambda _: (tmp_path / "source").read_bytes())
    assert error.value.filename == str(tmp_path / "source")
    with pytest.raises(FileNotFoundError) as error:
        atomic_write(tmp_path / "absent" / "a.bin", lambda _: None)
    assert error.value.filename == str(tmp_path / "absent" / "a.bin")


def test_errors_name_their_cause_and_only_a_full_disk_names_bytes(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    for path, cause in {
        "no/such/a.png": "the folder no/such does not exist; make it first",
        "file/a.png": "file is a file and cannot be a folder",
        "folder": "this is a folder; add the name of a file",
    }.items():
        with pytest.raises(OSError, match=cause) as error:
            atomic_write(Path(path), lambda file: file.write(b"x"))
        assert "bytes" not in str(error.value)
