"""scripts/bench/host_shards.py: a run of a tiny shape on the CPU, and the reading of its trace."""

import json
import sys

import host_shards
import pytest
from trace_overlap import covered, joined, overlap_figures, shared_times


def test_the_tiny_shape_runs_and_the_losses_are_those_of_the_resident_model(
    tmp_path, monkeypatch, capsys
):
    given = ["--shape", "tiny", "--steps", "1", "--batch", "1", "--seq", "8", "--layers", "2"]
    monkeypatch.setattr(sys, "argv", ["host_shards.py", *given, "--out", str(tmp_path)])
    host_shards.main()
    lines = (tmp_path / "host_shards.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    *rows, last = rows
    assert last["same_losses"]
    assert [row["base"] for row in rows] == ["host, 1 ahead", "host, 0 ahead", "device"]
    assert all(row["ms"] > 0 and row["plan_gib"] > 0 for row in rows)
    assert rows[0]["reckoned_ms"] == pytest.approx(1.5 * rows[0]["ms"], rel=0.01)
    assert "| host, 1 ahead | 2 |" in capsys.readouterr().out


def test_overlap_of_intervals():
    copies = [(0, 4), (3, 6), (10, 12)]
    assert joined(copies) == [(0, 6), (10, 12)]
    assert covered(copies, [(2, 11)]) == 5 / 8
    assert covered(copies, [(0, 20), (3, 4)]) == 1
    assert covered(copies, []) == 0 and covered([], copies) == 0
    assert shared_times(copies, [(1, 2), (3, 5), (12, 13)]) == [2, 2, 0]


def test_a_transfer_that_begins_late_is_counted():
    kernels = [(2.0, 6.0), (6.0, 9.0), (12.0, 15.0)]
    found = overlap_figures([(0.0, 2.0), (3.0, 5.0), (9.0, 12.0)], kernels)
    assert (found["transfers"], found["without_any_kernel"]) == (3, 2)
    assert found["beside_kernels"] == pytest.approx(2 / 7, abs=1e-4)
    assert found["idle"] == pytest.approx(3 / 13, abs=1e-4)
