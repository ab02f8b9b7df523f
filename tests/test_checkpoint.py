"""Reading, refusing and writing checkpoint files."""

import errno
import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from models import mapped_from
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastlora.checkpoints.atomic import atomic_write
from fastlora.checkpoints.tensors import (
    INDEX,
    WEIGHTS,
    Entry,
    read_entries,
    read_header,
    read_index,
    read_json,
    read_safetensors,
    write_json,
    write_safetensors,
    write_text,
)
from fastlora.checkpoints.weight_files import check_entries, resolve_tied_head, scan
from fastlora.errors import CheckpointError
from fastlora.models.names import EMBED_TOKENS, LM_HEAD

ROOT = str(Path(__file__).parents[1])


def raw_file(path: Path, header: bytes | dict, data: bytes = b"", size: int | None = None) -> Path:
    """A safetensors file, or what pretends to be one."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header) if size is None else size) + header + data)
    return path


def entry(dtype: str, shape: list, start: int, end: int) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


A = entry("F32", [4], 0, 16)
TWICE = b'{"a":%s,"a":%s}' % ((json.dumps(A).encode(),) * 2)
HOSTILE = {
    "empty": lambda p: p.write_bytes(b""),
    "three bytes": lambda p: p.write_bytes(b"abc"),
    "no header": lambda p: p.write_bytes(b"\xff" * 64),
    "length 2^60": lambda p: raw_file(p, b"{}", size=2**60),
    "length 2^64 - 1": lambda p: raw_file(p, b"{}", size=2**64 - 1),
    "bad JSON": lambda p: raw_file(p, b"{"),
    "bad UTF-8": lambda p: raw_file(p, b'{"\xff": 1}'),
    "a list": lambda p: raw_file(p, b"[]"),
    "nested arrays": lambda p: raw_file(p, b"[" * 100_000),
    "nested objects": lambda p: raw_file(p, b'{"a":' * 100_000),
    "truncated": lambda p: raw_file(p, {"a": A}, b"\0" * 15),
    "too long": lambda p: raw_file(p, {"a": A}, b"\0" * 17),
    "overlapping": lambda p: raw_file(p, {"a": A, "b": entry("F32", [4], 8, 24)}, b"\0" * 24),
    "shared bytes": lambda p: raw_file(p, {"a": A, "b": A}, b"\0" * 16),
    "a hole": lambda p: raw_file(p, {"a": A, "b": entry("F32", [4], 24, 40)}, b"\0" * 40),
    "backwards": lambda p: raw_file(p, {"a": entry("F32", [4], 16, 0)}, b"\0" * 16),
    "negative shape": lambda p: raw_file(p, {"a": entry("F32", [-4], 0, 16)}, b"\0" * 16),
    "huge shape": lambda p: raw_file(p, {"a": entry("F32", [2**40] * 2, 0, 16)}, b"\0" * 16),
    "wrong size": lambda p: raw_file(p, {"a": entry("F32", [5], 0, 16)}, b"\0" * 16),
    "no such dtype": lambda p: raw_file(p, {"a": entry("X9", [4], 0, 16)}, b"\0" * 16),
    "no shape": lambda p: raw_file(p, {"a": {"dtype": "F32"}}, b"\0" * 16),
    "a key twice": lambda p: raw_file(p, TWICE, b"\0" * 16),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_broken_file_is_refused_at_once_and_named(tmp_path, name):
    path = tmp_path / "weights.safetensors"
    HOSTILE[name](path)
    start = time.perf_counter()
    for read in (read_header, read_safetensors):
        with pytest.raises(CheckpointError, match=r"weights\.safetensors"):
            read(path)
    assert time.perf_counter() - start < 1


def test_every_truncation_is_refused(tmp_path):
    whole = tmp_path / "whole.safetensors"
    write_safetensors(whole, {"a": torch.ones(3), "b": torch.ones(2, 2)})
    data, cut = whole.read_bytes(), tmp_path / "cut.safetensors"
    for length in range(len(data)):
        cut.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"cut\.safetensors"):
            read_header(cut)


# ── JSON ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"1", b"null", b'{"a": 1, "a": 2}', b"\xff", b"[" * 100_000, b"1" * 5000],
    ids=lambda data: repr(data[:20]),
)
def test_json_that_is_no_object_is_refused_and_named(tmp_path, data):
    path = tmp_path / "config.json"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_json(path)


@pytest.mark.parametrize(
    "file",
    [
        "../x.safetensors",
        "a/../../x.safetensors",
        "/etc/x.safetensors",
        "\\x.safetensors",
        "C:\\x.safetensors",
        "..\\x.safetensors",
        "model.bin",
        "x\0.safetensors",
        7,
        None,
        "",
    ],
)
def test_an_index_leads_only_to_safetensors_inside_its_folder(tmp_path, file):
    write_json(tmp_path / INDEX, {"weight_map": {"fine": "x.safetensors", "the_key": file}})
    with pytest.raises(CheckpointError, match=rf"{INDEX}(.|\n)*the_key"):
        read_index(tmp_path / INDEX)


@pytest.mark.parametrize("value", [{}, {"weight_map": {}}, {"weight_map": ["a"]}])
def test_an_index_without_a_map_is_refused(tmp_path, value):
    write_json(tmp_path / INDEX, value)
    with pytest.raises(CheckpointError, match="weight_map"):
        read_index(tmp_path / INDEX)


# ── a folder ──────────────────────────────────────────────────────────────────────────────


def shards(folder: Path, files: dict[str, list[str]], weight_map: dict[str, str]) -> Path:
    for file, keys in files.items():
        write_safetensors(folder / file, {key: torch.ones(2) for key in keys})
    write_json(folder / INDEX, {"weight_map": weight_map})
    return folder


def test_shards_are_one_checkpoint(tmp_path):
    files = {"1.safetensors": ["model.a", "model.b"], "2.safetensors": [LM_HEAD]}
    where = {"model.a": "1.safetensors", "model.b": "1.safetensors", LM_HEAD: "2.safetensors"}
    entries = scan(shards(tmp_path, files, where))
    assert {name: e.path.name for name, e in entries.items()} == where


def test_missing_shards_are_named(tmp_path):
    where = {"a": "1.safetensors", "b": "2.safetensors", "c": "3.safetensors"}
    shards(tmp_path, {"1.safetensors": ["a"]}, where)
    with pytest.raises(FileNotFoundError, match=r"2\.safetensors, 3\.safetensors"):
        scan(tmp_path)


def test_shards_and_index_must_agree(tmp_path):
    files = {"1.safetensors": ["a", "twice"], "2.safetensors": ["b", "twice", "unlisted"]}
    where = {"a": "2.safetensors", "b": "2.safetensors", "twice": "1.safetensors"}
    with pytest.raises(CheckpointError) as refused:
        scan(shards(tmp_path, files, where))
    text = str(refused.value)
    assert "a: not in 2.safetensors" in text
    assert "a: in 1.safetensors" in text
    assert "twice: stored twice, in 1.safetensors and 2.safetensors" in text.replace("model.", "")
    assert "unlisted: in 2.safetensors" in text


def test_all_broken_shards_are_listed(tmp_path):
    files = {"1.safetensors": ["a"], "2.safetensors": ["b"]}
    shards(tmp_path, files, {"a": "1.safetensors", "b": "2.safetensors"})
    for file in files:
        (tmp_path / file).write_bytes(b"abc")
    with pytest.raises(CheckpointError, match=r"1\.safetensors(.|\n)*2\.safetensors"):
        scan(tmp_path)


def test_pickles_are_never_read(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin.*pickles"):
        scan(tmp_path)


def test_names_get_their_prefix_and_stale_keys_go(tmp_path):
    stored = ["embed_tokens.weight", "layers.0.self_attn.rotary_emb.inv_freq", LM_HEAD, "model.x"]
    write_safetensors(tmp_path / WEIGHTS, {key: torch.ones(1) for key in stored})
    assert scan(tmp_path).keys() == {EMBED_TOKENS, LM_HEAD, "model.x"}


def test_a_tensor_stored_with_and_without_prefix_is_refused(tmp_path):
    write_safetensors(tmp_path / WEIGHTS, {"model.a": torch.ones(1), "a": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"model\.a: stored twice"):
        scan(tmp_path)


def test_every_difference_is_listed_at_once(tmp_path):
    stored = {
        "model.misshapen": torch.ones(2, 3),
        "model.whole_numbers": torch.ones(2, dtype=torch.int32),
        "model.extra": torch.ones(1),
    }
    write_safetensors(tmp_path / WEIGHTS, stored)
    expected = {"model.misshapen": (3, 2), "model.whole_numbers": (2,), "model.absent": (5,)}
    with pytest.raises(CheckpointError) as refused:
        check_entries(tmp_path, scan(tmp_path), expected)
    lines = str(refused.value).split("\n")
    assert "  missing     model.absent (5,)" in lines
    assert f"  unexpected  model.extra in {WEIGHTS} (1,)" in lines
    assert any("model.misshapen" in x and "(2, 3)" in x and "(3, 2)" in x for x in lines)
    assert any("model.whole_numbers" in x and "I32" in x and "BF16" in x for x in lines)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F4", "U8", "BOOL", "I64"])
def test_weights_are_floats(dtype):
    found = {"w": Entry(Path("f"), "w", dtype, (2,))}
    with pytest.raises(CheckpointError, match=f"w in f: file has {dtype}"):
        check_entries(Path("folder"), found, {"w": (2,)})


# ── a tied head ───────────────────────────────────────────────────────────────────────────


def with_head(folder: Path, **stored: torch.Tensor) -> dict[str, Entry]:
    names = {"embedding": EMBED_TOKENS, "head": LM_HEAD}
    write_safetensors(folder / WEIGHTS, {names[k]: t for k, t in stored.items()})
    return scan(folder)


def test_an_equal_head_is_tied(tmp_path):
    entries, tied = resolve_tied_head(
        with_head(tmp_path, embedding=torch.ones(2, 3), head=torch.ones(2, 3)), True
    )
    assert tied and entries.keys() == {EMBED_TOKENS}


@pytest.mark.parametrize(
    "head", [torch.zeros(2, 3), torch.ones(3, 3), torch.ones(2, 3, dtype=torch.bfloat16)]
)
def test_a_different_head_is_its_own(tmp_path, head):
    entries, tied = resolve_tied_head(
        with_head(tmp_path, embedding=torch.ones(2, 3), head=head), True
    )
    assert not tied and entries.keys() == {EMBED_TOKENS, LM_HEAD}


def test_a_head_alone_is_the_embedding(tmp_path):
    entries, tied = resolve_tied_head(with_head(tmp_path, head=torch.ones(2, 3)), True)
    assert tied and entries[EMBED_TOKENS].key == LM_HEAD
    assert torch.equal(read_entries(entries)[EMBED_TOKENS], torch.ones(2, 3))


def test_an_untied_model_keeps_its_entries(tmp_path):
    found = with_head(tmp_path, embedding=torch.ones(2, 3))
    assert resolve_tied_head(found, False) == (found, False)


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


def test_what_is_written_is_what_safetensors_reads(tmp_path):
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


def test_the_file_is_byte_for_byte_safetensors_own(tmp_path):
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
        "from fastlora.checkpoint import write_safetensors\n"
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
        "from fastlora.checkpoint import atomic_write\n"
        "def write(file):\n"
        "    file.write(b'new' * 10_000); file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "atomic_write(Path(sys.argv[1]), write)"
    )
    assert python(code, path).returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    write_text(path, "new")  # what the dead process left behind is in nobody's way
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
