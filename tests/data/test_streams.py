"""Stream: the batches depend on seed and position only, and every row comes once in a pass."""

import json
import threading
import time
from collections import Counter
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from fastlora.checkpoints.hub import DEMO
from fastlora.data import lanes, streams
from fastlora.data.batches import batches
from fastlora.data.encoding import RowLimits
from fastlora.data.lanes import is_streamed
from fastlora.data.row_steps import row_context
from fastlora.data.sources import sources_of
from fastlora.data.streams import Stream, StreamSettings
from fastlora.errors import CheckpointError
from fastlora.text.tokenizer import Tokenizer

LENGTH = 16


class HuggingFace:
    """An IterableDataset by its methods."""

    def __init__(self, rows):
        self.rows, self.epochs = rows, []

    def __iter__(self):
        return iter(self.rows)

    def take(self, n): ...

    def skip(self, n): ...

    def set_epoch(self, epoch):
        self.epochs.append(epoch)


def rows(count: int, letter: str = "a") -> list[dict]:
    return [{"text": f"{letter} {n}"} for n in range(count)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    tokenizer = Tokenizer.from_folder(DEMO)
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of a few chunks of seven rows."""
    monkeypatch.setattr(streams, "BLOCK_TOKENS", 160)
    monkeypatch.setattr(streams, "_LEAST_SEQUENCES", 1)
    monkeypatch.setattr(lanes, "CHUNK_ROWS", 7)


@pytest.fixture
def opened(tokenizer):
    """opened(data, ...): a Stream, closed after the test."""
    made = []

    def open_(data, seed=3, packing=True, **limits) -> Stream:
        how = RowLimits(LENGTH, packing, **limits)
        context = row_context(tokenizer, "responses")
        given = StreamSettings(context, how, None, seed, packing, 0, lambda examples: None)
        made.append(Stream(sources_of(data, "data"), given, "data"))
        return made[-1]

    yield open_
    for stream in made:
        stream.close()


def take(stream: Stream, steps: int, position=None, micro_batches=2):
    """[(ids of each micro-batch, position behind the step)]"""
    padded = partial(batches, pad_token_id=0, max_seq_length=LENGTH)
    found = stream.steps(position, 3, micro_batches, padded)
    return [
        ([batch["input_ids"].tolist() for batch in step], json.loads(json.dumps(stream.position)))
        for step in islice(found, steps)
    ]


def documents(stream: Stream, steps: int, tokenizer: Tokenizer) -> list[str]:
    """The texts of the documents in the first batches."""
    padded = partial(batches, pad_token_id=0, max_seq_length=LENGTH)
    found = []
    for step in islice(stream.steps(None, 3, 2, padded), steps):
        for batch in step:
            for ids, segments in zip(batch["input_ids"], batch["segment_ids"], strict=True):
                for segment in range(1, int(segments.max()) + 1):
                    found.append(tokenizer.decode(ids[segments == segment].tolist()))
    return found


@pytest.mark.parametrize("packing", [True, False])
def test_a_stream_that_goes_on_from_any_step_gives_the_same_batches(opened, packing):
    data = HuggingFace(rows(60))
    expected = take(opened(data, packing=packing), 24)
    assert expected[-1][1]["passes"] != [0]
    for step in (1, 5, 17):
        position = expected[step - 1][1]
        assert take(opened(data, packing=packing), 24 - step, position) == expected[step:]
    assert take(opened(data, packing=packing, seed=4), 24) != expected


def test_every_row_comes_once_in_a_pass_and_in_another_order(opened, tokenizer):
    # 59 rows: no whole number of chunks, blocks or batches.
    counts = Counter(documents(opened(HuggingFace(rows(59))), 60, tokenizer))
    assert counts.keys() == {row["text"] for row in rows(59)}
    first = documents(opened(HuggingFace(rows(59))), 6, tokenizer)
    assert first != sorted(first, key=[row["text"] for row in rows(59)].index)
    assert max(counts.values()) - min(counts.values()) <= 2


def test_packing_fills_the_sequences(opened):
    batch = next(opened(HuggingFace(rows(60))).steps(None, 8, 1, batches))[0]
    assert (batch["segment_ids"] > 0).float().mean() > 0.9


def test_weights_are_shares_of_the_rows(opened, tokenizer):
    data = {HuggingFace(rows(30)): 3.0, HuggingFace(rows(500, "b")): 1.0}
    found = documents(opened(data), 80, tokenizer)
    share = sum(text.startswith("a") for text in found) / len(found)
    assert abs(share - 0.75) < 4 * np.sqrt(0.75 * 0.25 / len(found))


def test_files_are_read_in_another_order_in_every_pass(opened, tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(lanes, "STREAM_BYTES", 10)
    for name in "abcdef":
        text = "\n".join(json.dumps(row) for row in rows(4, name))
        (tmp_path / f"{name}.jsonl").write_text(text)
    assert is_streamed(sources_of(tmp_path, "data"))
    lane = opened(tmp_path)._lanes[0]
    orders = [[Path(p.split(",")[0]).stem for p, _ in lane._one_pass(n)] for n in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1]
    assert all(Counter(order) == dict.fromkeys("abcdef", 4) for order in orders)


def test_a_data_set_is_told_its_pass(opened):
    data = HuggingFace(rows(10))
    take(opened(data), 20)
    assert data.epochs[:3] == [0, 1, 2]


def test_what_streams(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text("x" * 100)
    (tmp_path / "b.parquet").write_text("x" * 100)
    is_ = lambda data: is_streamed(sources_of(data, "data"))
    monkeypatch.setattr("fastlora.data.sources.require_pyarrow", lambda path: None)
    assert is_(HuggingFace([])) and is_([rows(1), HuggingFace([])])
    assert not is_(rows(3)) and not is_(iter(rows(3))) and not is_(tmp_path / "a.jsonl")
    monkeypatch.setattr(lanes, "STREAM_BYTES", 150)
    assert not is_(tmp_path / "a.jsonl") and is_(tmp_path / "b.parquet")
    assert is_([tmp_path / "a.jsonl", tmp_path / "a.jsonl"])
    with pytest.raises(ValueError, match="can be read once"):
        is_([HuggingFace([]), iter(rows(3))])


def test_a_bad_row_is_refused_when_it_is_reached(opened):
    data = HuggingFace([*rows(100), {"txt": "a"}])
    stream = opened(data)
    with pytest.raises(ValueError, match="row 101: keys"):
        take(stream, 50)


def test_a_bad_row_of_the_first_block_is_refused_at_once(opened):
    with pytest.raises(ValueError, match="row 2: keys"):
        opened(HuggingFace([*rows(1), {"txt": "a"}]))


def test_no_thread_stays_after_an_interruption(tokenizer, monkeypatch):
    def interrupted(seconds):
        raise KeyboardInterrupt

    def slow():
        for row in rows(10**6):
            time.sleep(0.01)
            yield row

    monkeypatch.setattr(streams, "sleep", interrupted)
    how, context = RowLimits(LENGTH, True), row_context(tokenizer, "responses")
    given = StreamSettings(context, how, None, 3, True, 0, lambda examples: None)
    data = HuggingFace([])
    monkeypatch.setattr(HuggingFace, "__iter__", lambda self: slow())
    with pytest.raises(KeyboardInterrupt):
        Stream(sources_of(data, "data"), given, "data", progress=True)
    assert not [t for t in threading.enumerate() if t.name.startswith("fastlora")]


def test_skipped_rows_are_counted(opened):
    stream = opened(HuggingFace([*rows(20), {"txt": "a"}]), on_bad_row="skip")
    take(stream, 20)
    skipped = stream.left_out.rows["skipped: not a row of a known kind"]
    assert skipped == pytest.approx(stream.left_out.read / 21, abs=1)


@pytest.mark.parametrize("bad", [[], [{"txt": "a"}] * 9], ids=["none", "all skipped"])
def test_a_stream_without_rows_ends_with_an_error(opened, bad):
    with pytest.raises(ValueError, match="no row"):
        opened(HuggingFace(bad), on_bad_row="skip")


@pytest.mark.parametrize(
    "position",
    [
        {},
        [1],
        {"chunk": 1, "passes": [0, 0], "rows": [1, 2], "taken": 0},
        {"chunk": -1, "passes": [0], "rows": [1], "taken": 0},
    ],
)
def test_a_position_of_other_data_is_refused(opened, position):
    with pytest.raises(CheckpointError, match="position"):
        take(opened(HuggingFace(rows(20))), 1, position)


def test_memory_is_that_of_two_blocks(opened, monkeypatch):
    """The thread waits: it reads no further than the block behind the one in use."""
    stream = opened(HuggingFace(rows(5000)))
    steps = stream.steps(None, 1, 1, batches)
    next(steps)
    time.sleep(0.3)
    read = stream.left_out.read
    time.sleep(0.2)
    assert stream.left_out.read == read < 300
