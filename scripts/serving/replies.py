"""The replies of one request while they are generated: tokens of its rows to pieces of text."""

import asyncio
import math
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

from fastlora.generation.engine import RowSettings
from serving.errors import ApiError
from serving.limits import Limits
from serving.scheduler import Row, RowEvent, Scheduler
from serving.text import StopSearch, TextPieces


class Token(NamedTuple):
    """A token of a reply, for requests with `logprobs`."""

    id: int
    logprob: float
    offset: int  # characters of the reply before it
    alternatives: Sequence[tuple[int, float]] = ()  # ids and log-probabilities, likeliest first


class Piece(NamedTuple):
    """The newest part of one choice."""

    choice: int
    text: str
    tokens: list[Token]  # empty without logprobs
    finish_reason: Literal["stop", "length"] | None


class Choice:
    """One reply: from its row's tokens to text that ends at a stop string."""

    def __init__(
        self, index: int, decode: Callable[[list[int]], str], stops: Sequence[str]
    ) -> None:
        """`decode` maps ids to text without special tokens."""
        self.index = index
        self._pieces, self._stops = TextPieces(decode), StopSearch(stops)
        self._read = 0  # characters decoded, with those that are held back
        self._sent = 0  # characters of all pieces
        self._tokens: deque[Token] = deque()  # not sent yet
        self.count = 0
        self.ended = False

    def push(self, event: RowEvent, stop_ids: Sequence[int]) -> Piece:
        """The piece of text that became certain with these tokens."""
        ids = list(event.ids)
        self.count += len(ids)
        if event.finish_reason == "stop" and ids and ids[-1] in stop_ids:
            ids.pop()  # an end-of-text token is not a part of the text
        if event.logprobs is None:
            text = self._take(self._pieces.push(ids))
        else:
            text = ""
            alternatives = event.alternatives or [[]] * len(ids)
            for i, logprob, others in zip(ids, event.logprobs, alternatives, strict=False):
                self._tokens.append(Token(i, logprob, self._read, others))
                text += self._take(self._pieces.push([i]))
        if event.finish_reason is not None:
            text += self._take(self._pieces.finish()) + self._stops.finish()
        reason = "stop" if self._stops.found else event.finish_reason
        self.ended = reason is not None
        self._sent += len(text)
        return Piece(self.index, text, self._certain_tokens(), reason)

    def _take(self, text: str) -> str:
        self._read += len(text)
        return self._stops.push(text)

    def _certain_tokens(self) -> list[Token]:
        """Tokens that begin in the text sent so far; at the end of a reply without stop, all."""
        everything = self.ended and not self._stops.found
        tokens = []
        while self._tokens and (everything or self._tokens[0].offset < self._sent):
            tokens.append(self._tokens.popleft())
        return tokens


class Replies:
    """All choices of one request. `close` must be called in the end: it frees their slots."""

    def __init__(
        self,
        scheduler: Scheduler,
        rows: Sequence[tuple[list[int], RowSettings]],
        decode: Callable[[list[int]], str],
        stops: Sequence[str],
        limits: Limits,
        *,
        bounded: bool,
    ) -> None:
        """Submit the rows.

        Args:
            scheduler: runs them.
            rows: the prompt and the settings of each choice.
            decode: maps ids to text without special tokens.
            stops: stop strings.
            limits: of the server.
            bounded: set `overflow` if the client reads too slowly. A complete reply is collected
                before the client reads anything, so it needs no bound.
        """
        self._scheduler, self._limits = scheduler, limits
        self._most_unread = limits.buffer_tokens * len(rows) if bounded else math.inf
        self.rows = [
            Row(prompt, settings, partial(self._receive, i))
            for i, (prompt, settings) in enumerate(rows)
        ]
        self.choices = [Choice(i, decode, stops) for i in range(len(rows))]
        self._inbox: deque[tuple[int, RowEvent]] = deque()
        self._arrived = asyncio.Event()
        self._unread = 0  # tokens in the inbox
        self.overflow = asyncio.Event()  # then `pieces` gives nothing more
        self._deadline = asyncio.get_running_loop().time() + limits.request_seconds
        scheduler.submit(self.rows)

    def _receive(self, choice: int, event: RowEvent) -> None:
        if self.overflow.is_set():
            return
        self._inbox.append((choice, event))
        self._unread += len(event.ids)
        self._arrived.set()
        if self._unread > self._most_unread:
            self._inbox.clear()
            self.overflow.set()
            self.close()

    def close(self) -> None:
        """Give up choices that have not ended."""
        self._scheduler.cancel([row for row in self.rows if not row.ended])

    async def pieces(self) -> AsyncIterator[Piece]:
        """Pieces of all choices in the order in which they come.

        Raises:
            ApiError: the engine failed, the server stops, or the request took too long.
        """
        while not all(choice.ended for choice in self.choices):
            await self._wait()
            while self._inbox:
                number, event = self._inbox.popleft()
                self._unread -= len(event.ids)
                if event.error is not None:
                    raise ApiError(503, event.error, code="generation_failed")
                choice, row = self.choices[number], self.rows[number]
                if choice.ended:  # at a stop string, and the row has gone on until it was cancelled
                    continue
                piece = choice.push(event, row.settings.stop)
                if choice.ended and event.finish_reason is None:
                    self._scheduler.cancel([row])
                yield piece
            self._arrived.clear()

    async def _wait(self) -> None:
        left = self._deadline - asyncio.get_running_loop().time()
        try:
            await asyncio.wait_for(self._arrived.wait(), max(0.0, left))
        except TimeoutError:
            raise ApiError(
                504,
                f"the reply was not complete after {self._limits.request_seconds:g} seconds",
                code="timeout",
            ) from None

    @property
    def new_tokens(self) -> int:
        """Tokens of all choices, with those that end them."""
        return sum(choice.count for choice in self.choices)
