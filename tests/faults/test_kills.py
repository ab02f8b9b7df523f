"""Runs that are ended from outside: SIGKILL at random moments, SIGINT, SIGTERM."""

import signal

import pytest

from faults.bounded import shared_worker
from faults.kills import die_in_save, fingerprint, kill_loop, run_once, stale_files, stop


@pytest.fixture
def worker():
    """A server of processes that may be killed."""
    return shared_worker()


def test_twenty_kills_resume_to_the_same_bits(worker):
    tally = kill_loop(worker, 20, seed=1)
    assert not tally.errors, tally.errors[0]
    assert tally.kills == 20
    assert tally.same_bits == tally.runs


@pytest.mark.parametrize("write", [2, 9, 15])
def test_a_file_that_a_killed_process_left_is_swept(worker, write, tmp_path):
    """SIGKILL while the file of this number is on its way to the disk."""
    out, whole = tmp_path / "run", tmp_path / "whole"
    assert die_in_save(worker, out, write) == -signal.SIGKILL
    assert stale_files(out)
    for folder in (out, whole):
        run_once(worker, folder)
    assert fingerprint(out) == fingerprint(whole)
    assert not stale_files(out)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"]
)
def test_a_signal_ends_the_run_after_its_step_and_a_save(worker, number, code, tmp_path):
    out, whole = tmp_path / "run", tmp_path / "whole"
    ended = stop(worker, number, out)
    assert ended["exit"] in (code, -number)
    last = ended["steps"][-1]
    assert ended["saved"] == [last]
    assert f"checkpoint-{last}" in ended["text"]
    for folder in (out, whole):
        run_once(worker, folder)
    assert fingerprint(out) == fingerprint(whole)
