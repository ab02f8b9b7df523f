"""Workers: other processes give the examples that this one gives, in order, whatever ends them."""

import os
import signal
import time

import numpy as np
import pytest

from fastlora.checkpoints.hub import DEMO
from fastlora.data import workers
from fastlora.data.encoding import RowEncoder, RowLimits
from fastlora.data.left_out import LeftOut
from fastlora.data.row_chunks import chunked
from fastlora.data.row_steps import row_context
from fastlora.data.rows import read_rows
from fastlora.text.tokenizer import Tokenizer

ROWS = read_rows(DEMO / "train.jsonl")
LIMITS = RowLimits(64, too_long="drop", on_bad_row="skip")


class Unknown(dict):
    """A row of a class that the other process cannot import."""

    __module__ = "__main__"


class Encoder(RowEncoder):
    def __init__(self, most: int) -> None:
        tokenizer = Tokenizer.from_folder(DEMO)
        assert tokenizer is not None
        super().__init__(row_context(tokenizer, "responses"), LIMITS, LeftOut("rows"))
        self._workers._most = most

    def wait(self) -> None:
        """Start the processes, and wait for them."""
        while self._workers._ready_pool() is None or self._workers._pool.size < 2:
            time.sleep(0.05)

    def encode(self, rows):
        stream = ((f"row {n}", row) for n, row in enumerate(rows, 1))
        return [example for chunk in self.chunks(chunked(stream)) for example in chunk]


def columns(examples):
    return [np.concatenate([getattr(e, c) for e in examples]) for c in ("input_ids", "labels")]


@pytest.fixture(scope="module")
def monkeymodule():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def pool(monkeymodule):
    """An encoder with two processes."""
    monkeymodule.setattr(workers, "START_AFTER_SECONDS", -1.0)
    monkeymodule.setattr("fastlora.data.row_chunks.CHUNK_ROWS", 64)
    encoder = Encoder(2)
    encoder.wait()
    yield encoder
    encoder.close()


def test_processes_give_the_same_examples_and_counts(pool):
    rows = [*ROWS[:500], {"txt": 1}, Unknown(ROWS[0]), *ROWS[500:700]]
    here = Encoder(1)
    for mine, theirs in zip(columns(here.encode(rows)), columns(pool.encode(rows)), strict=True):
        assert np.array_equal(mine, theirs) and mine.dtype == theirs.dtype == np.int32
    assert here.left_out.lines() == pool.left_out.lines()
    assert here.left_out.rows.total() > 1
    assert here.left_out.listed == pool.left_out.listed
    assert here.chats == pool.chats is True


def test_rows_of_a_process_that_was_killed_are_encoded_here(pool):
    expected = columns(Encoder(1).encode(ROWS[:300]))
    for process in pool._workers._pool._processes:
        os.kill(process.pid, signal.SIGKILL)
    with pytest.warns(UserWarning, match="has ended") as warned:
        found = columns(pool.encode(ROWS[:300]))
    assert all(map(np.array_equal, expected, found))
    assert len(warned) == 1


def test_few_rows_start_no_process(monkeypatch):
    monkeypatch.setattr(workers, "START_AFTER_SECONDS", 3.0)
    encoder = Encoder(2)
    encoder._workers._seconds = 1.0
    encoder.encode(ROWS[:1])
    assert encoder._workers._pool is None


def test_closing_ends_the_processes(monkeypatch):
    monkeypatch.setattr(workers, "START_AFTER_SECONDS", -1.0)
    encoder = Encoder(1)
    encoder._workers._most = 2
    encoder.encode(ROWS[:1])
    pool = encoder._workers._pool
    encoder.close()  # while they start
    assert all(process.poll() is not None for process in pool._processes)
