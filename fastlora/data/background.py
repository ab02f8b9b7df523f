"""Background: an iterator whose next item is made by a thread while the last one is used."""

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from queue import SimpleQueue
from threading import Semaphore, Thread
from time import perf_counter
from typing import Generic, TypeVar

T = TypeVar("T")

# A thread that waits for a source, such as a network, is not waited for: it ends with the process.
_JOIN_SECONDS = 2.0


class Background(Iterator[T], Generic[T]):
    """The items of a generator, in order. At most one is ready ahead of the one that is in use."""

    def __init__(self, make: Callable[[], Generator[T, None, None]], name: str) -> None:
        """`make` is called in the thread, and its generator is closed there."""
        self.waited = 0.0  # seconds that `next` has waited
        self._ready: SimpleQueue[tuple[T] | BaseException | None] = SimpleQueue()
        self._wanted = Semaphore(1)
        self._closed = False
        self._thread = Thread(target=self._run, args=(make,), name=name, daemon=True)
        self._thread.start()

    def __next__(self) -> T:
        started = perf_counter()
        item = self._ready.get()
        self.waited += perf_counter() - started
        if isinstance(item, tuple):
            self._wanted.release()
            return item[0]
        self._ready.put(item)  # it stays ended
        if item is None:
            raise StopIteration
        raise item

    def is_ready(self) -> bool:
        """Whether `next` would not wait."""
        return not self._ready.empty()

    def close(self) -> None:
        """End the thread behind the item that it is making."""
        self._closed = True
        self._wanted.release()
        self._thread.join(_JOIN_SECONDS)

    def _run(self, make: Callable[[], Generator[T, None, None]]) -> None:
        try:
            with closing(make()) as items:
                while self._wanted.acquire() and not self._closed:
                    self._ready.put((next(items),))
        except StopIteration:
            self._ready.put(None)
        # Raised where the item is asked for.
        except BaseException as error:  # noqa: BLE001
            self._ready.put(error)
