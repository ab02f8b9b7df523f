"""Failures of the engine reach the rows that they concern, and the scheduler goes on."""

import asyncio
import math
from collections.abc import Awaitable, Callable

import pytest
from serving.metrics import Metrics
from serving.scheduler import Row, RowEvent, Scheduler
from serving.stacking import stack

import fastlora
from fastlora.generation.engine import Engine, RowSettings
from fastlora.generation.sampling import Sampling


@pytest.fixture(scope="module")
def model():
    return fastlora.load("demo", dtype="float32")[0]


def settings(tokens: int, adapter: int) -> RowSettings:
    return RowSettings(
        max_new_tokens=tokens, sampling=Sampling(), seed=None, stop=(), adapter_id=adapter
    )


class Client:
    """A row and its events."""

    def __init__(self, tokens: int, *, adapter: int = 0) -> None:
        self.events: list[RowEvent] = []
        self.ended = asyncio.Event()
        self.row = Row([5, 6, 7], settings(tokens, adapter), self.receive)

    def receive(self, event: RowEvent) -> None:
        self.events.append(event)
        if event.error or event.finish_reason:
            self.ended.set()

    async def ids(self) -> list[int]:
        await asyncio.wait_for(self.ended.wait(), 30)
        assert self.events[-1].error is None, self.events[-1]
        return [i for event in self.events for i in event.ids]

    async def error(self) -> str | None:
        await asyncio.wait_for(self.ended.wait(), 30)
        return self.events[-1].error


def run(model, use: Callable[[Scheduler], Awaitable[None]], slots: int = 2) -> None:
    async def main() -> None:
        scheduler = Scheduler(model, slots=slots, metrics=Metrics())
        await scheduler.start()
        try:
            await use(scheduler)
        finally:
            await scheduler.stop()
        assert scheduler.running == scheduler.waiting == 0

    asyncio.run(main())


def test_rows_that_join_later_or_wait_get_the_same_tokens(model):
    async def use(scheduler: Scheduler) -> None:
        alone = Client(12)
        scheduler.submit([alone.row])
        expected = await alone.ids()
        clients = [Client(12) for _ in range(5)]
        for client in clients:
            scheduler.submit([client.row])
            await asyncio.sleep(0.01)
        assert [await client.ids() for client in clients] == [expected] * 5

    run(model, use)


def test_a_cancelled_row_leaves_its_slot_to_the_next(model):
    async def use(scheduler: Scheduler) -> None:
        first, second, third = Client(400), Client(400), Client(3)
        scheduler.submit([first.row, second.row, third.row])
        while not first.events:
            await asyncio.sleep(0.01)
        scheduler.cancel([second.row])  # waits
        scheduler.cancel([first.row, first.row])  # runs
        assert len(await third.ids()) == 3
        assert not second.events

    run(model, use, slots=1)


def test_rows_without_finite_scores_fail_alone(model):
    """Two at once, beside a good row; later rows get their slots."""
    broken = fastlora.lora(model, r=2)
    layers = broken.adapter["layers"]
    layers[0]["v_proj"].a.fill_(math.nan)
    served = stack(model, {"broken": broken})

    async def use(scheduler: Scheduler) -> None:
        alone = Client(8)
        scheduler.submit([alone.row])
        expected = await alone.ids()
        clients = [Client(8, adapter=i) for i in (1, 0, 1, 0, 0)]
        scheduler.submit([client.row for client in clients])
        for i, client in enumerate(clients):
            if i in (0, 2):
                assert await client.error() == "the model gave no finite score"
            else:
                assert await client.ids() == expected

    run(served, use, slots=3)


@pytest.mark.parametrize("method", ["advance", "admit"])
def test_another_engine_replaces_one_that_failed(model, monkeypatch, method):
    real, calls = getattr(Engine, method), []

    def fail_once(self, *arguments):
        calls.append(method)
        if len(calls) == 2:  # the first call is the warm-up's
            raise RuntimeError("out of memory")
        return real(self, *arguments)

    monkeypatch.setattr(Engine, method, fail_once)

    async def use(scheduler: Scheduler) -> None:
        lost, next_one = Client(8), Client(8)
        scheduler.submit([lost.row])
        assert await lost.error() == "generation failed"
        scheduler.submit([next_one.row])
        assert len(await next_one.ids()) == 8
        assert scheduler.alive

    run(model, use)


def test_rows_submitted_after_the_end_fail_at_once(model):
    late = []

    async def use(scheduler: Scheduler) -> None:
        await scheduler.stop()
        client = Client(3)
        scheduler.submit([client.row])
        late.append(await client.error())

    run(model, use)
    assert late == ["the server has stopped"]


def test_an_engine_that_cannot_start_is_reported(model, monkeypatch):
    monkeypatch.setattr(Engine, "__init__", lambda *a, **k: (_ for _ in ()).throw(MemoryError("x")))
    with pytest.raises(MemoryError):
        run(model, lambda scheduler: asyncio.sleep(0))
