"""Stream: data that are trained on while they are read, for more rows than fit into memory.

    rows        of all lanes, drawn by weight, in chunks (lanes.py)
    examples    encoded in chunks, in order (encoding.py)
    block       consecutive chunks with about a million tokens: packed by best fit, and shuffled
    batches     of consecutive sequences; a batch may reach into the next block

A thread makes the next block while the steps use the present one. A block depends on the seed and
the number of its first chunk only, so a position is a few numbers: where the block begins, and how
many of its sequences were used.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from threading import Event
from time import sleep
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from tqdm import tqdm

from fastlora.data.background import Background
from fastlora.data.encoding import RowEncoder, RowLimits
from fastlora.data.examples import Example
from fastlora.data.lanes import Place, chunks, lanes_of, start_of
from fastlora.data.left_out import LeftOut
from fastlora.data.packing import pack
from fastlora.data.row_chunks import Chunk
from fastlora.data.row_steps import RowContext
from fastlora.data.sources import Source
from fastlora.errors import CheckpointError

# Tokens that are shuffled and packed together: the buffer of the shuffling and the window of the
# packing. Two blocks are in memory: a run must not grow by more than 20 MB.
BLOCK_TOKENS = 2**20

# A block has at least as many full sequences, so that best fit has a choice.
_LEAST_SEQUENCES = 64

_REFRESH_SECONDS = 0.1

_Batch = Mapping[str, Tensor]
_Batches = Callable[..., Iterator[_Batch]]


@dataclass(frozen=True, slots=True, eq=False)
class Block(Sequence[Any]):
    """Sequences in the order in which they are used, and where the stream was before them."""

    sequences: Sequence[Any]  # Example or Packed
    order: Sequence[int]
    place: Place

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: Any) -> Any:
        return self.sequences[self.order[index]]


class Taken(Sequence[Any]):
    """Sequences of blocks. A packed one is made when it is asked for."""

    def __init__(self, places: Sequence[tuple[Block, int]]) -> None:
        self._places = places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        block, number = self._places[index]
        return block[number]


class StreamSettings(NamedTuple):
    """How the rows of a stream become sequences."""

    context: RowContext
    limits: RowLimits
    columns: Mapping[str, str] | None
    seed: int
    packing: bool
    pad_token_id: int
    check: Callable[[list[Example]], None]  # raises ValueError for examples that cannot be used


class Stream:
    """The batches of a stream. `position` is behind the last one that was taken."""

    def __init__(
        self, sources: Sequence[Source], settings: StreamSettings, name: str, progress: bool = False
    ) -> None:
        """Read and encode the first block; with `progress`, a bar on stderr shows its rows.

        Raises:
            ValueError, CheckpointError: as `reading.read_examples`, for rows of the first block;
                for other rows when they are reached.
        """
        self.sources, self.settings, self.name = sources, settings, name
        skip = settings.limits.on_bad_row == "skip"
        self._lanes = lanes_of(sources, settings.seed, skip)
        begin = start_of(self._lanes)
        self.position = {**asdict(begin), "taken": 0}
        self._background = self._blocks_from(begin)
        self.first: Block | None = None  # until it is used
        try:
            self._wait_for_first(progress)
        except BaseException:  # Ctrl-C too: no thread or process stays
            self.close()
            raise

    def _wait_for_first(self, progress: bool) -> None:
        with tqdm(desc=f"encoding {self.name}", unit="row", disable=not progress) as bar:
            while progress and not self._background.is_ready():
                sleep(_REFRESH_SECONDS)
                bar.update(self.left_out.read - bar.n)
        self.first = next(self._background)
        self._encoder.warn()

    @property
    def waited(self) -> float:
        """Seconds that steps have waited for data."""
        return self._background.waited

    def steps(
        self,
        position: Any,
        batch_size: int,
        micro_batches: int,
        batches: _Batches,
        deal: Callable[[Sequence[Any]], list[_Batch]] | None = None,
    ) -> Generator[list[_Batch], None, None]:
        """Without end, the micro-batches of each step behind a position; None is the beginning.

        Args:
            position: what `self.position` was.
            batch_size: sequences in a micro-batch.
            micro_batches: of a step.
            batches: makes them of sequences.
            deal: makes the batches of a step of its sequences, in place of `batches`.

        Raises:
            CheckpointError: `position` is not what `self.position` was.
        """
        blocks, taken = self._from_start(), 0
        if position is not None:
            place, taken = self._checked(position)
            self.close()
            blocks = self._background = self._blocks_from(place)
        try:
            stream = self._places(blocks, taken)
            take = lambda count: Taken([*islice(stream, count)])
            while True:
                if deal is not None:
                    yield deal(take(batch_size * micro_batches))
                    continue
                yield [
                    next(batches(take(batch_size), batch_size, seed=None))
                    for _ in range(micro_batches)
                ]
        finally:
            self.close()

    def close(self) -> None:
        """End the thread and the processes that encode."""
        self._stop.set()
        self._encoder.close()
        self._background.close()
        self.first = None

    def _from_start(self) -> Iterator[Block]:
        if self.first is not None:
            first, self.first = self.first, None
            yield first
        yield from self._background

    def _places(self, blocks: Iterator[Block], taken: int) -> Iterator[tuple[Block, int]]:
        """(block, number in it) of all sequences, without the first `taken`. Moves the position."""
        for block in blocks:
            for number in range(taken, len(block)):
                self.position = {**asdict(block.place), "taken": number + 1}
                yield block, number
            taken = 0

    def _blocks_from(self, place: Place) -> Background[Block]:
        s = self.settings
        self.left_out, self._stop = LeftOut(self.name), Event()
        self._encoder = RowEncoder(s.context, s.limits, self.left_out, s.columns)
        make = partial(self._blocks, self._encoder, self._stop, place)
        return Background(make, "fastlora-data")

    def _blocks(
        self, encoder: RowEncoder, stop: Event, begin: Place
    ) -> Generator[Block, None, None]:
        """The blocks from a place on."""
        most = self.settings.limits.max_seq_length
        size = max(BLOCK_TOKENS, _LEAST_SEQUENCES * most)
        ends: deque[Place] = deque()  # of the chunks that the encoder has read
        examples: list[Example] = []
        tokens = 0
        with closing(encoder):
            for encoded in encoder.chunks(self._rows(begin, stop, ends)):
                end = ends.popleft()
                examples += encoded
                tokens += sum(len(example.input_ids) for example in encoded)
                encoder.refuse()
                if not examples and min(end.passes) > max(begin.passes):
                    raise ValueError("\n".join(["no row is left:", *encoder.left_out.lines()]))
                if tokens >= size:
                    encoder.check_columns()
                    yield self._block(examples, begin)
                    begin, examples, tokens = end, [], 0

    def _rows(self, place: Place, stop: Event, ends: deque[Place]) -> Iterator[Chunk]:
        """The rows of every chunk. Appends where the chunk ends to `ends`."""
        for chunk in chunks(self._lanes, place, self.settings.seed):
            if stop.is_set():
                return
            ends.append(chunk.after)
            yield chunk.rows

    def _block(self, examples: list[Example], place: Place) -> Block:
        s = self.settings
        s.check(examples)
        sequences: Sequence[Any] = examples
        if s.packing:
            most = s.limits.max_seq_length
            sequences = pack(examples, most, pad_token_id=s.pad_token_id)
        order = np.random.default_rng([s.seed, place.chunk]).permutation(len(sequences))
        return Block(sequences, order.tolist(), place)

    def _checked(self, position: Any) -> tuple[Place, int]:
        numbers = []
        if isinstance(position, dict) and position.keys() == self.position.keys():
            passes, rows = position["passes"], position["rows"]
            if isinstance(passes, list | tuple) and isinstance(rows, list | tuple):
                numbers = [position["chunk"], position["taken"], *passes, *rows]
        right = all(type(n) is int and n >= 0 for n in numbers)
        if not right or len(numbers) != 2 + 2 * len(self._lanes):
            raise CheckpointError(
                f"the checkpoint's position in the data, {position!r:.80}, is not one of"
                f" {len(self._lanes)} sources"
            )
        place = Place(position["chunk"], tuple(position["passes"]), tuple(position["rows"]))
        return place, position["taken"]
