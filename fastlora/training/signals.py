"""StopRequest: SIGINT and SIGTERM end a run after its step instead of in the middle of one."""

import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

# Ctrl-C, and what schedulers send before they kill.
_SIGNALS = (signal.SIGINT, signal.SIGTERM)

# Written past Python's stderr, which a handler may have interrupted in the middle of a write.
_ANSWER = (
    "\nfastlora.train: {}: finishing the step; send it again to stop at once, without saving.\n"
)


class TrainingStopped(SystemExit):
    """The run was stopped by SIGTERM. Uncaught, the process exits with status 143."""


class TrainingInterrupted(TrainingStopped, KeyboardInterrupt):
    """The run was stopped by Ctrl-C. Uncaught, the process exits with status 130."""


class StopRequest:
    """The first SIGINT or SIGTERM that arrived during a `listening` block."""

    def __init__(self) -> None:
        """No signal has arrived."""
        self.signal: signal.Signals | None = None
        self.repeated = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note signals instead of obeying them, until the end of the `with` block.

        The second signal is obeyed at once, by the handler that was there before. Handlers are
        installed in the main thread only: Python refuses to do it in others. A signal that the
        process ignores stays ignored.
        """
        # None: the handler is not Python's, and could not be put back.
        previous = {
            number: handler
            for number in _SIGNALS
            if (handler := signal.getsignal(number)) not in (None, signal.SIG_IGN)
        }
        if threading.current_thread() is not threading.main_thread():
            previous = {}

        def note(number: int, _: FrameType | None) -> None:
            if self.signal is None:
                self.signal = signal.Signals(number)
                os.write(2, _ANSWER.format(self.signal.name).encode())
                return
            self.repeated = True
            _install(previous)
            signal.raise_signal(number)

        try:
            _install(dict.fromkeys(previous, note))
            yield
        finally:
            _install(previous)

    def error(self) -> TrainingStopped:
        """The exception that ends the run."""
        assert self.signal is not None
        cls = TrainingInterrupted if self.signal == signal.SIGINT else TrainingStopped
        return cls(128 + self.signal)


def _install(handlers: Mapping[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
