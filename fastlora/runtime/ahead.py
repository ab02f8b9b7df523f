"""Work that is done in a thread before it is needed, such as slow imports.

The threads need no lock of ours: Python lets every other thread that imports the same module wait,
and gives the error of an import that failed to the next one that asks.
"""

import os
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache, partial
from importlib import import_module


def imports(names: Iterable[str]) -> list[Callable[[], object]]:
    """Tasks of `ahead` that import modules."""
    return [partial(import_module, name) for name in names]


def ahead(tasks: Iterable[Callable[[], object]]) -> "Ahead":
    """Start a thread that runs tasks one after the other.

    An error ends its task only: the code that needs the result will do the work itself, and then
    the error is raised where it can be handled. If the process ends, because the main thread has
    returned or raised, the thread ends after the task that it is in. os.fork waits for the thread,
    because a child would wait forever for the locks of modules that are being imported.
    """
    _register_fork()
    thread = Ahead(tasks)
    thread.start()
    return thread


class Ahead(threading.Thread):
    """A thread that `ahead` starts."""

    def __init__(self, tasks: Iterable[Callable[[], object]]) -> None:
        super().__init__(name="fastlora-ahead")
        self._tasks, self._done, self._stopped = list(tasks), threading.Event(), False

    def run(self) -> None:
        """Run the tasks."""
        try:
            for task in self._tasks:
                if self._stopped or not threading.main_thread().is_alive():
                    return
                with suppress(Exception):
                    task()
        finally:
            self._done.set()

    def stop(self) -> None:
        """End the thread after the task that it is in. Does not wait."""
        self._stopped = True

    def is_done(self) -> bool:
        """Whether no further task will run."""
        return self._done.is_set()

    def wait(self) -> None:
        """Wait until the tasks are done.

        After a Ctrl-C in `join`, Python 3.11 believes that the thread has ended, and tears down the
        interpreter while it runs.
        """
        self._done.wait()


@cache
def _register_fork() -> None:
    if hasattr(os, "register_at_fork"):  # not on Windows
        os.register_at_fork(before=_wait_for_all)


def _wait_for_all() -> None:
    while running := _running():  # a task may have started another thread meanwhile
        for thread in running:
            thread.wait()


def _running() -> list[Ahead]:
    """The threads other than the current one whose tasks are not done."""
    threads = [thread for thread in threading.enumerate() if isinstance(thread, Ahead)]
    return [t for t in threads if t is not threading.current_thread() and not t.is_done()]
