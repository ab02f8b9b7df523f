"""Tensors read as views of their file, and files written atomically."""

import errno
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastlora.checkpoints.atomic import atomic_write
from fastlora.checkpoints.tensors import (
    WEIGHTS,
    read_entries,
    read_header,
    read_json,
    read_safetensors,
    write_json,
    write_safetensors,
    write_text,
)
from oracles.checkpoints import mapped_from
from oracles.raw_files import entry, raw_file

ROOT = str(Path(__file__).parents[2])


# ── reading ───────────────────────────────────────────────────────────────────────────────


def test_on_the_cpu_tensors_are_views_of_the_file(tmp_path):
    path = tmp_path / WEIGHTS
    write_safetensors(path, {"w": torch.arange(100.0)})
    (view,) = read_entries(read_header(path)).values()
    assert mapped_from(view) == str(path)
    (same,) = read_entries(read_header(path), dtype=torch.float32).values()
    assert mapped_from(same) == str(path)
    (converted,) = read_entries(read_header(path), dtype=torch.float64).values()
    assert mapped_from(converted) != str(path)
    assert torch.equal(converted, torch.arange(100.0).double())


def test_writing_to_a_view_leaves_the_file(tmp_path):
    path = tmp_path / WEIGHTS
    write_safetensors(path, {"w": torch.ones(4)})
    before = path.read_bytes()
    read_safetensors(path)["w"].zero_()
    assert path.read_bytes() == before


def test_overwriting_a_file_leaves_its_readers(tmp_path):
    path = tmp_path / WEIGHTS
    write_safetensors(path, {"w": torch.ones(4)})
    view = read_safetensors(path)["w"]
    write_safetensors(path, {"w": 2 * view})
    assert torch.equal(view, torch.ones(4))
    assert torch.equal(read_safetensors(path)["w"], 2 * torch.ones(4))


def test_a_misaligned_file_reads_right(tmp_path):
    values = struct.pack("<4f", 1, 2, 3, 4)
    header = {"b": entry("U8", [1], 0, 1), "a": entry("F32", [4], 1, 17)}
    tensors = read_safetensors(raw_file(tmp_path / "x", header, b"\7" + values))
    assert tensors["a"].tolist() == [1, 2, 3, 4]


# ── writing ───────────────────────────────────────────────────────────────────────────────


def tensors_of_every_kind() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(6, 5, generator=generator)
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8)
    tensors = {f"{dtype}": (matrix * 9).abs().to(dtype) for dtype in dtypes}
    return tensors | {
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
        "transposed": matrix.T,
        "strided": matrix[::2, 1::2],
        "column": matrix[:, 0],
        "alias": matrix,
        "alias again": matrix.view(-1),
        "bool": matrix > 0,
        "naïve": matrix[0].requires_grad_(),
    }


def test_safetensors_reads_the_written_values(tmp_path):
    tensors = tensors_of_every_kind()
    write_safetensors(tmp_path / "x.safetensors", tensors)
    for read in (load_file, read_safetensors):
        back = read(tmp_path / "x.safetensors")
        assert back.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert back[name].dtype == tensor.dtype
            assert torch.equal(back[name], tensor), name
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_file_has_the_bytes_that_safetensors_writes(tmp_path):
    tensors = {"b": torch.ones(3), "a": torch.zeros(2, 2), "c": torch.ones(5, dtype=torch.float16)}
    write_safetensors(tmp_path / "ours", tensors)
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_dtype_without_a_name_is_refused_before_writing(tmp_path):
    with pytest.raises(ValueError, match=r"w is torch\.complex64"):
        write_safetensors(tmp_path / "x", {"w": torch.ones(1, dtype=torch.complex64)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), ValueError()]
)
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "config.json"
    path.write_bytes(b"old")

    def write(file):
        file.write(b"new" * 10_000)
        raise error

    with pytest.raises(type(error)):
        atomic_write(path, write)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / WEIGHTS
    write_safetensors(path, {"w": torch.ones(4)})
    code = (
        "import resource, signal, sys, torch; from pathlib import Path\n"
        "from fastlora.checkpoints.tensors import write_safetensors\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"  # as a disk with 4 kB left
        "write_safetensors(Path(sys.argv[1]), {'w': torch.zeros(100_000)})"
    )
    result = python(code, path)
    assert "File too large" in result.stderr
    assert torch.equal(read_safetensors(path)["w"], torch.ones(4))
    assert [p.name for p in tmp_path.iterdir()] == [WEIGHTS]


def test_a_killed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(b"old")
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from fastlora.checkpoints.atomic import atomic_write\n"
        "def write(file):\n"
        "    file.write(b'new' * 10_000); file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "atomic_write(Path(sys.argv[1]), write)"
    )
    assert python(code, path).returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    write_text(path, "new")  # the dead process's temporary file does no harm
    assert path.read_bytes() == b"new"


def python(code: str, *arguments: Path) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": ROOT}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def test_bytes_are_on_disk_before_the_rename(tmp_path, monkeypatch):
    """A power cut cannot be tested; the order of the calls that guard against it can."""
    calls = []
    fsync, rename = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda fd: (calls.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd))
    )
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("rename"), rename(a, b)))
    write_text(tmp_path / "a.json", "{}")
    file, middle, folder = calls
    assert Path(file).parent == tmp_path and middle == "rename" and folder == str(tmp_path)


def test_json_keeps_its_order(tmp_path):
    write_json(tmp_path / "a.json", {"b": 1, "a": {"d": "é", "c": None}})
    text = (tmp_path / "a.json").read_text("utf-8")
    assert text.index('"b"') < text.index('"a"') < text.index('"d"') < text.index('"c"')
    assert read_json(tmp_path / "a.json") == {"b": 1, "a": {"d": "é", "c": None}}


def test_files_get_the_modes_that_open_gives(tmp_path):
    write_text(tmp_path / "ours", "")
    (tmp_path / "theirs").write_text("")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "theirs").stat().st_mode
