"""One thread that owns the engine. Rows join and leave between two calls of `Engine.advance`.

The event loop and this thread share no state: rows and cancellations come in through a queue, and
new tokens go out through `loop.call_soon_threadsafe`, one call for all rows.
"""

import asyncio
import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch

from fastlora.generation.cache import slot_bytes
from fastlora.generation.engine import Engine, NewTokens, NonFiniteLogits, RowSettings
from fastlora.generation.sampling import Sampling
from fastlora.models.state import ModelState
from serving.metrics import Metrics

LOG = logging.getLogger("fastlora.serving")

# A prefill makes the running rows wait, so prompts are admitted in groups of this many tokens.
_PREFILL_TOKENS = 4096
_SHARE = {"cuda": 0.8, "cpu": 0.25}  # of the free GPU memory or of all host memory, for the cache

_STOPPED = "the server has stopped"


class RowEvent(NamedTuple):
    """New tokens of a row, its end, or the failure of the engine."""

    ids: Sequence[int] = ()
    logprobs: Sequence[float] | None = None
    finish_reason: Literal["stop", "length"] | None = None  # None: the row goes on
    alternatives: Sequence[list[tuple[int, float]]] | None = None  # of each id, the likeliest ones
    error: str | None = None


@dataclass(eq=False, slots=True)
class Row:
    """A reply to generate. Its fields belong to the scheduler's thread."""

    prompt: list[int]
    settings: RowSettings
    receive: Callable[[RowEvent], None]  # called on the event loop
    submitted: float = field(default_factory=time.monotonic)
    slot: int | None = None
    tokens: int = 0
    ended: bool = False


class Scheduler:
    """Admits waiting rows into free slots of the engine, and advances all running rows."""

    def __init__(self, model: ModelState, *, slots: int, metrics: Metrics) -> None:
        """`slots` is how many rows run at once; more rows wait in the order of their arrival."""
        self.model, self.slots, self.metrics = model, slots, metrics
        on_cuda = model.base["norm"].is_cuda
        # On a GPU the host waits for results once every 16 steps. On a CPU it waits for every
        # step anyway, and shorter turns admit new rows and send text sooner.
        self._steps = 16 if on_cuda else 4
        self._inbox: queue.SimpleQueue[tuple[Literal["submit", "cancel", "stop"], Row | None]]
        self._inbox = queue.SimpleQueue()
        self._waiting: deque[Row] = deque()
        self._running: dict[int, Row] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._ready: asyncio.Future[None] | None = None
        self.alive = False

    # ── called on the event loop ──────────────────────────────────────────────────────────

    async def start(self) -> None:
        """Start the thread and wait until its engine has generated a first token."""
        self._loop = asyncio.get_running_loop()
        self._ready = self._loop.create_future()
        self._thread.start()
        await self._ready

    def submit(self, rows: Sequence[Row]) -> None:
        """Let these rows wait for slots."""
        for row in rows:
            self._inbox.put(("submit", row))
        if not self.alive:  # asked after `put`: the thread may have ended in between
            for row in rows:
                row.receive(RowEvent(error=_STOPPED))

    def cancel(self, rows: Sequence[Row]) -> None:
        """Give up rows. A row that has ended already is ignored."""
        for row in rows:
            self._inbox.put(("cancel", row))

    async def stop(self) -> None:
        """End the thread. Rows that run or wait receive an error."""
        self._inbox.put(("stop", None))
        await asyncio.to_thread(self._thread.join, 30)

    @property
    def running(self) -> int:
        """Rows in the engine."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Rows without a slot."""
        return len(self._waiting)

    # ── the thread ────────────────────────────────────────────────────────────────────────

    @torch.no_grad()
    def _run(self) -> None:
        assert self._loop is not None and self._ready is not None
        try:
            engine = self._new_engine()
        except Exception as error:  # noqa: BLE001  raised by `start` instead
            self._loop.call_soon_threadsafe(self._ready.set_exception, error)
            return
        self.alive = True
        self._loop.call_soon_threadsafe(self._ready.set_result, None)
        try:
            while self._take_commands(engine):
                if not self._turn(engine):  # its state is unknown now, so another one replaces it
                    engine.close()
                    engine = self._new_engine()
        finally:
            self.alive = False
            self._fail([*self._running.values(), *self._waiting, *self._unread()], _STOPPED)
            self._waiting.clear()
            engine.close()

    def _turn(self, engine: Engine) -> bool:
        """Admit and advance rows. False: the engine failed, and its rows are given up.

        The error and the tensors that its traceback holds are freed before another engine is made.
        """
        try:
            self._admit(engine)
            self._advance(engine)
        except Exception:
            LOG.exception("the engine failed; its %d rows are given up", self.running)
            self._fail(list(self._running.values()), "generation failed")
            return False
        return True

    def _unread(self) -> list[Row]:
        """Rows that were submitted while the thread ended."""
        rows = []
        while not self._inbox.empty():
            command, row = self._inbox.get()
            if command == "submit" and row is not None:
                rows.append(row)
        return rows

    def _new_engine(self) -> Engine:
        """An engine that has generated two tokens, so that no client waits for compilation."""
        length = self.model.spec.max_seq_length
        engine = Engine(self.model, slots=self.slots, max_length=length)
        greedy = RowSettings(max_new_tokens=2, sampling=Sampling(), seed=None, stop=())
        engine.admit([([0, 0], greedy)])
        engine.advance(2)
        return engine

    def _take_commands(self, engine: Engine) -> bool:
        """Do what the event loop has sent; wait for it if no row runs or waits. False: stop."""
        idle = not self._running and not self._waiting
        while idle or not self._inbox.empty():
            command, row = self._inbox.get()
            idle = False
            if row is None:
                return False
            if command == "submit":
                self._waiting.append(row)
            elif not row.ended:
                self._end(row)
                if row.slot is None:
                    self._waiting.remove(row)
                else:
                    engine.release(row.slot)
        return True

    def _admit(self, engine: Engine) -> None:
        """Move waiting rows into free slots, up to a number of prompt tokens (with padding)."""
        rows: list[Row] = []
        longest = 0
        while self._waiting and len(rows) < engine.free_slots:
            longest = max(longest, len(self._waiting[0].prompt))
            if rows and longest * (len(rows) + 1) > _PREFILL_TOKENS:
                break
            rows.append(self._waiting.popleft())
        if not rows:
            return
        # The rows count as running before the engine sees them, so that its failure ends them.
        self._running |= {-1 - i: row for i, row in enumerate(rows)}
        slots = engine.admit([(row.prompt, row.settings) for row in rows])
        for i, (slot, row) in enumerate(zip(slots, rows, strict=True)):
            del self._running[-1 - i]
            self._running[slot], row.slot = row, slot
            self.metrics.prompt_tokens += len(row.prompt)

    def _advance(self, engine: Engine) -> None:
        if not self._running:
            return
        news: list[tuple[Row, RowEvent]] = []
        for new in self._new_tokens(engine):
            row, now = self._running[new.slot], time.monotonic()
            if not row.tokens and new.ids:
                self.metrics.first_token_seconds.observe(now - row.submitted)
            row.tokens += len(new.ids)
            self.metrics.new_tokens += len(new.ids)
            event = RowEvent(new.ids, new.logprobs, new.finish_reason, new.alternatives)
            news.append((row, event))
            if new.finish_reason is not None:
                self._end(row)
                self.metrics.reply_seconds.observe(now - row.submitted)
        self._send(news)

    def _new_tokens(self, engine: Engine) -> list[NewTokens]:
        """The new tokens of all rows. A row with NaN or infinite logits fails alone."""
        while True:
            try:
                return engine.advance(self._steps)
            except NonFiniteLogits as error:
                LOG.error("%s", error)
                row = self._running[error.slot]
                self._end(row)
                self._send([(row, RowEvent(error="the model gave no finite score"))])

    def _end(self, row: Row) -> None:
        row.ended = True
        if row.slot is not None:
            del self._running[row.slot]

    def _fail(self, rows: Sequence[Row], reason: str) -> None:
        """Tell these rows that they get no more tokens."""
        for row in rows:
            row.ended = True
        self._running.clear()
        self._send([(row, RowEvent(error=reason)) for row in rows])

    def _send(self, news: list[tuple[Row, RowEvent]]) -> None:
        assert self._loop is not None
        with suppress(RuntimeError):  # the loop is closed: no client is left
            self._loop.call_soon_threadsafe(_receive_all, news)


def _receive_all(news: list[tuple[Row, RowEvent]]) -> None:
    for row, event in news:
        row.receive(event)


def default_slots(model: ModelState, streams: int) -> int:
    """How many rows fit into the memory for keys and values; at most `streams`, at least 1."""
    config, norm = model.spec.config, model.base["norm"]
    each = slot_bytes(config, norm.dtype, model.spec.max_seq_length)
    if norm.is_cuda:
        free = _SHARE["cuda"] * torch.cuda.mem_get_info(norm.device)[0]
    else:
        free = _SHARE["cpu"] * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(streams, int(free / each)))
