"""Broken safetensors and JSON files are refused at once, by name."""

import json
import os
import time

import pytest
import torch

from fastlora.checkpoints.tensors import (
    INDEX,
    read_header,
    read_index,
    read_json,
    read_safetensors,
    write_json,
    write_safetensors,
)
from fastlora.errors import CheckpointError
from oracles.raw_files import entry, raw_file

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
    start = time.process_time()
    for read in (read_header, read_safetensors):
        with pytest.raises(CheckpointError, match=r"weights\.safetensors"):
            read(path)
    assert time.process_time() - start < 1


def test_every_truncation_is_refused(tmp_path):
    whole = tmp_path / "whole.safetensors"
    write_safetensors(whole, {"a": torch.ones(3), "b": torch.ones(2, 2)})
    data, cut = whole.read_bytes(), tmp_path / "cut.safetensors"
    for length in range(len(data)):
        cut.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"cut\.safetensors"):
            read_header(cut)


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"1", b"null", b'{"a": 1, "a": 2}', b"\xff", b"[" * 100_000, b"1" * 5000],
    ids=lambda data: repr(data[:20]),
)
def test_json_other_than_an_object_is_refused_and_named(tmp_path, data):
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


def _header_of(count: int, name: str = "x") -> bytes:
    entry = '"{}{}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    header = ("{" + ",".join(entry.format(name, i) for i in range(count)) + "}").encode()
    return len(header).to_bytes(8, "little") + header


@pytest.mark.parametrize(("count", "name"), [(100_001, "x"), (300_000, "x"), (20, "x" * 2**20)])
def test_a_header_of_too_many_tensors_is_refused_before_it_is_parsed(tmp_path, count, name):
    path = tmp_path / "model.safetensors"
    path.write_bytes(_header_of(count, name))
    start = time.process_time()
    with pytest.raises(CheckpointError, match=r"model\.safetensors has more than 100,000 tensors"):
        read_header(path)
    assert time.process_time() - start < 0.5


@pytest.mark.parametrize("data", [b"", b"\0" * 8, b"\xff" * 8, b"\x10" + b"\0" * 7 + b"{}"])
def test_a_file_shorter_than_its_header_is_refused(tmp_path, data):
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        read_header(path)


def test_a_pipe_is_refused_before_it_is_opened(tmp_path):
    path = tmp_path / "model.safetensors"
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_header(path)
