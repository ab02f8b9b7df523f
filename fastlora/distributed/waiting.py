"""Waits: waiting for other ranks without hanging, and saying which rank the others wait for.

Each rank that waits longer than a second says so in the process group's store. When a wait takes
too long, the ranks that have not said so are the ones that hang. A rank that raises an error writes
it to the store, so that the others stop within a second instead of at the end of their patience.
"""

import json
from collections.abc import Callable, Sequence
from datetime import timedelta
from time import monotonic, sleep
from typing import Any

_MARK_AFTER_SECONDS = 1.0

# Seconds between two looks: a share of the time waited so far, because a read from the device
# follows every step and its latency is that of the step; but no less than Python can sleep, and no
# more than a person would notice.
_SHARE, _SHORTEST, _LONGEST = 0.002, 5e-5, 2e-2

_FAILED = "failed"


class Waits:
    """Waits of one rank for the others. All ranks must wait for the same things in one order."""

    def __init__(self, store: Any, rank: int, count: int) -> None:
        """Nothing is waited for yet.

        Args:
            store: a c10d store that only these ranks write to, and only for this object.
            rank: of this process.
            count: of ranks.
        """
        self._store, self._rank, self._count = store, rank, count
        self._number = 0
        self.who: Sequence[str] = [f"rank {i}" for i in range(count)]

    def work(self, work: Any, what: str, seconds: float) -> None:
        """Wait for a collective that was started with async_op=True.

        Raises:
            TimeoutError: it took more than `seconds`; names the ranks that have not started it.
            RuntimeError: another rank raised an error or has ended.
        """
        self.until(work.is_completed, what, seconds)
        try:
            work.wait()
        except RuntimeError as error:  # gloo closes the connections of a process that has ended
            sleep(_MARK_AFTER_SECONDS)  # so that the rank that failed can say why
            self._raise_failure()
            raise RuntimeError(
                f"rank {self._rank} could not go on with {what}: another rank has ended. Its own"
                f" error is in the launcher's output. ({str(error).splitlines()[0]:.200})"
            ) from error

    def until(self, done: Callable[[], bool], what: str, seconds: float) -> None:
        """Wait until `done()`. Errors are those of `work`."""
        self._number += 1
        started, checked, event = monotonic(), 0.0, f"{self._number} {what}"
        while not done():
            waited = monotonic() - started
            if waited > seconds:
                raise self._timeout(event, what, waited)
            if waited > _MARK_AFTER_SECONDS and waited - checked > _MARK_AFTER_SECONDS:
                self._mark(event)
                self._raise_failure()
                checked = waited
            sleep(min(max(_SHARE * waited, _SHORTEST), _LONGEST))

    def arrive(self, what: str, seconds: float) -> None:
        """Wait until all ranks have called this, through the store alone.

        Raises:
            TimeoutError: names the ranks that have not.
        """
        name = f"arrived/{what}"
        self._store.set(f"{name}/{self._rank}", "")
        missing = [i for i in range(self._count) if i != self._rank]
        started = monotonic()
        while missing := [i for i in missing if not self._store.check([f"{name}/{i}"])]:
            self._raise_failure()
            if monotonic() - started > seconds:
                raise TimeoutError(
                    f"{self._names(missing)} did not come to {what} within {seconds:.0f} s; every"
                    " rank has to call the same functions in the same order"
                )
            sleep(_LONGEST)

    def first(self, name: str, is_first: bool, seconds: float) -> Callable[[], None]:
        """On the first rank returns at once; on others waits until it has called the result."""
        key = f"first/{name}"
        if is_first:
            return lambda: self._store.set(key, "")
        self.until(lambda: self._store.check([key]), f"the first rank of the node: {name}", seconds)
        return lambda: None

    def failed(self, error: BaseException) -> None:
        """Tell the other ranks why this one stops."""
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0][:500]
        content = json.dumps({"rank": self._rank, "reason": reason})
        try:
            self._store.compare_set(_FAILED, "", content)  # the first error stays
        except RuntimeError:  # the process that holds the store has ended
            return

    def _raise_failure(self) -> None:
        try:
            if not self._store.check([_FAILED]):
                return
            failure = json.loads(self._store.get(_FAILED))
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {self._rank} has lost the connection to the process that started the ranks"
            ) from error
        raise RuntimeError(
            f"{self.who[failure['rank']]} stopped, so this rank (rank {self._rank}) stops too:"
            f" {failure['reason']}"
        )

    def _mark(self, event: str) -> None:
        self._store.set(f"waits/{self._rank}", event)

    def _timeout(self, event: str, what: str, waited: float) -> TimeoutError:
        self._mark(event)
        # Every rank that waits has said so after this time.
        sleep(2 * _MARK_AFTER_SECONDS)
        missing = [i for i in range(self._count) if i != self._rank and not self._waits(i, event)]
        if not missing:
            return TimeoutError(
                f"all ranks have waited {waited:.0f} s for {what}: the network between them, or"
                " NCCL, has failed. NCCL_DEBUG=INFO shows what it does."
            )
        return TimeoutError(
            f"{self._names(missing)} did not come to {what} within {waited:.0f} s, and the other"
            " ranks wait. `py-spy dump --pid PROCESS` on that machine shows where it is."
        )

    def _waits(self, rank: int, event: str) -> bool:
        key = f"waits/{rank}"
        return self._store.check([key]) and self._store.get(key).decode() == event

    def _names(self, ranks: Sequence[int]) -> str:
        return ", ".join(self.who[i] for i in ranks)


FOREVER = timedelta(days=1)  # of torch's own timeouts, which do not name a rank
