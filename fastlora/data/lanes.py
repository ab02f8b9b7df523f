"""Lane: the rows of one weight, pass after pass; chunks(): rows of all lanes, drawn by weight."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np

from fastlora.data.row_chunks import CHUNK_ROWS, Chunk
from fastlora.data.rows import no_rows
from fastlora.data.sources import Source

# Files that are larger together are streamed. As token ids they take about twice as much memory.
STREAM_BYTES = 8 * 2**30

_COMPRESSION = {".parquet": 4, ".feather": 2}  # rough sizes of the text by that of the file


def is_streamed(sources: Sequence[Source]) -> bool:
    """Whether these sources are read while they are trained on: a Hugging Face stream
    (`IterableDataset`), or files of more than `STREAM_BYTES`.

    Raises:
        ValueError: beside a stream, a source can be read only once.
    """
    streams = [_is_stream(source.iterable) for source in sources]
    files = [file for source in sources for file in source.files]
    size = sum(file.stat().st_size * _COMPRESSION.get(file.suffix, 1) for file in files)
    if not any(streams) and size <= STREAM_BYTES:
        return False
    for source in sources:
        if isinstance(source.iterable, Iterator):
            raise ValueError(
                f"{source.name} is a {type(source.iterable).__name__}, which can be read once;"
                " expected a list, a data set or a file beside data that are streamed"
            )
    return True


def _is_stream(rows: Any) -> bool:
    """Whether this is a Hugging Face stream, by the methods that it has."""
    return all(hasattr(rows, name) for name in ("__iter__", "take", "skip")) and not hasattr(
        rows, "__len__"
    )


@dataclass(frozen=True, slots=True)
class Place:
    """Where a stream is: before chunk number `chunk`."""

    chunk: int
    passes: tuple[int, ...]  # complete ones, by lane
    rows: tuple[int, ...]  # of the present pass that were read, by lane


class PlacedChunk(NamedTuple):
    """A chunk of rows, and where the stream is behind it."""

    rows: Chunk
    after: Place


class Lane:
    """The rows of several sources, one behind the other, without end.

    Each pass reads the files in another order, which depends on the seed.
    """

    def __init__(self, sources: Sequence[Source], seed: int, skip_unreadable: bool) -> None:
        self.weight = sources[0].weight or 1.0
        self.sources, self.seed, self.skip_unreadable = sources, seed, skip_unreadable

    def rows(self, passes: int, done: int) -> Iterator[tuple[tuple[int, int], tuple[str, Any]]]:
        """((passes, rows read) behind the row, (place, row)), from behind the first `done` rows."""
        while True:
            count = done
            stream = self._one_pass(passes)
            # Rows that were trained on are read again, but not encoded.
            for count, row in enumerate(islice(stream, done, None), done + 1):
                yield (passes, count), row
            if not count:
                raise no_rows(self.sources[0].name)
            passes, done = passes + 1, 0

    def _one_pass(self, number: int) -> Iterator[tuple[str, Any]]:
        draw = np.random.default_rng([self.seed, number])
        for source in self.sources:
            if hasattr(source.iterable, "set_epoch"):  # a Hugging Face stream that shuffles
                source.iterable.set_epoch(number)
        return chain.from_iterable(
            _in_order(source, draw).rows(skip_unreadable=self.skip_unreadable, streamed=True)
            for source in self.sources
        )


def _in_order(source: Source, draw: np.random.Generator) -> Source:
    """The source with its files in a drawn order."""
    order = draw.permutation(len(source.files))
    return source._replace(files=tuple(source.files[i] for i in order))


def lanes_of(sources: Sequence[Source], seed: int, skip_unreadable: bool) -> list[Lane]:
    """One lane for all sources, or one each if they have weights."""
    groups = [[source] for source in sources] if sources[0].weight is not None else [sources]
    return [Lane(group, seed, skip_unreadable) for group in groups]


def start_of(lanes: Sequence[Lane]) -> Place:
    """The place of a stream that has not begun."""
    return Place(0, (0,) * len(lanes), (0,) * len(lanes))


def chunks(lanes: Sequence[Lane], place: Place, seed: int) -> Iterator[PlacedChunk]:
    """Chunks of rows from a place on, without end. Each row is of a lane drawn by weight.

    The draws of a chunk depend on `seed` and its number only.
    """
    weights = np.array([lane.weight for lane in lanes])
    streams = [
        lane.rows(passes, done)
        for lane, passes, done in zip(lanes, place.passes, place.rows, strict=True)
    ]
    while True:
        passes, rows, chunk = [*place.passes], [*place.rows], []
        draw = np.random.default_rng([seed, place.chunk])
        for i in draw.choice(len(lanes), CHUNK_ROWS, p=weights / weights.sum()).tolist():
            (passes[i], rows[i]), row = next(streams[i])
            chunk.append(row)
        place = replace(place, chunk=place.chunk + 1, passes=tuple(passes), rows=tuple(rows))
        yield PlacedChunk(chunk, place)
