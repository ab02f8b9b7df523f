"""scripts/bench/host_shards.py: a run of a tiny shape on the CPU, and the reading of its trace."""

import json
import sys

import host_shards
import pytest


def test_the_tiny_shape_runs_and_the_losses_are_those_of_the_resident_model(
    tmp_path, monkeypatch, capsys
):
    given = ["--shape", "tiny", "--steps", "1", "--batch", "1", "--seq", "8", "--layers", "2"]
    monkeypatch.setattr(sys, "argv", ["host_shards.py", *given, "--out", str(tmp_path)])
    host_shards.main()
    lines = (tmp_path / "host_shards.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["base"] for row in rows] == ["host, 1 ahead", "host, 0 ahead", "device"]
    assert all(row["same_losses"] and row["ms"] > 0 and row["plan_gib"] > 0 for row in rows)
    assert rows[0]["reckoned_ms"] == pytest.approx(1.5 * rows[0]["ms"], rel=0.01)
    assert "| host, 1 ahead | 2 |" in capsys.readouterr().out


def test_overlap_of_intervals():
    copies = [(0, 4), (3, 6), (10, 12)]
    assert host_shards.joined(copies) == [(0, 6), (10, 12)]
    assert host_shards.covered(copies, [(2, 11)]) == 5 / 8
    assert host_shards.covered(copies, [(0, 20), (3, 4)]) == 1
    assert host_shards.covered(copies, []) == 0 and host_shards.covered([], copies) == 0
