"""Workers: chunks of rows encoded in order, on all cores once that is worth starting processes.

Half of the time or more goes to Python, which renders the chat template, and the rest to the
tokenizers library, which alone uses several cores. So data that take longer than half a second are
encoded by one process per core. The examples do not depend on it.

The processes are started as commands, not with multiprocessing: fork is unsafe once CUDA is
initialised, and spawn would run the user's script again.
"""

import os
import pickle
import subprocess
import sys
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from queue import Empty, SimpleQueue
from subprocess import PIPE
from threading import Lock
from time import perf_counter
from typing import Any, BinaryIO, cast

from fastlora.data.row_chunks import Chunk, EncodedRow, encode_chunk
from fastlora.data.row_steps import RowContext
from fastlora.data.worker_process import main, receive, send_pickle
from fastlora.runtime.cores import usable_cores

# A worker takes about 0.2 seconds to start: it does without torch.
START_AFTER_SECONDS = 0.5

_MOST_WORKERS = 16  # each takes about 80 MB, part of it shared

Process = subprocess.Popen[bytes]

# Raised for a worker that ended and for a row that no process can send.
_FAILURES = (OSError, EOFError, ValueError, TypeError, AttributeError, pickle.PickleError)


class Workers:
    """Encodes chunks: in this process at first, and then also in others."""

    def __init__(self, context: RowContext, columns: Mapping[str, str] | None = None) -> None:
        self._context, self._columns = context, columns
        self._seconds = 0.0  # spent on encoding in this process
        self._pool: _Pool | None = None
        self._most = max_workers()

    def encoded(self, chunks: Iterable[Chunk]) -> Iterator[tuple[Chunk, list[EncodedRow]]]:
        """Every chunk with its results, in order.

        With processes, two chunks for each are read ahead of the one that is due.
        """
        waiting: deque[tuple[Chunk, Future[list[EncodedRow]]]] = deque()
        for chunk in chunks:
            pool = self._ready_pool()
            if pool is None and not waiting:
                yield chunk, self._here(chunk)
                continue
            assert self._pool is not None
            waiting.append((chunk, self._pool.submit([row for _, row in chunk])))
            while len(waiting) > 2 * self._pool.size:
                first, future = waiting.popleft()
                yield first, future.result()
        for chunk, future in waiting:
            yield chunk, future.result()

    def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.close()

    def _here(self, chunk: Chunk) -> list[EncodedRow]:
        started = perf_counter()
        results = encode_chunk([row for _, row in chunk], self._context, self._columns)
        self._seconds += perf_counter() - started
        return results

    def _ready_pool(self) -> "_Pool | None":
        """The processes, if one has started. Starts them when that is due."""
        if self._pool is None and self._most > 1 and self._seconds >= START_AFTER_SECONDS:
            self._pool = _Pool(self._most, self._context, self._columns)
        return self._pool if self._pool is not None and self._pool.size else None


def max_workers() -> int:
    """Processes that may encode at once: one for each core that this process may use."""
    return min(usable_cores(), _MOST_WORKERS) if sys.executable else 1


class _Pool:
    """Worker processes, each driven by a thread that waits for its pipe."""

    def __init__(self, most: int, context: RowContext, columns: Mapping[str, str] | None) -> None:
        self.size = 0  # processes that encode
        self._context, self._columns = context, columns
        self._processes: list[Process] = []
        self._idle: SimpleQueue[Process] = SimpleQueue()
        self._threads = ThreadPoolExecutor(most, thread_name_prefix="fastlora-encode")
        self._lock = Lock()
        self._closed = self._warned = False
        for _ in range(most):
            self._threads.submit(self._start)

    def submit(self, rows: list[Any]) -> Future[list[EncodedRow]]:
        """Encode rows in one of the processes, or here if none is left."""
        return self._threads.submit(self._encode, rows)

    def close(self) -> None:
        """End the processes. Rows that are being encoded are lost."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for process in self._processes:
                process.kill()
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.communicate()

    def _start(self) -> None:
        # The path of this process, because scripts change sys.path.
        path = os.pathsep.join(filter(None, sys.path))
        quiet = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        quiet |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
        command = [sys.executable, "-c", f"from {main.__module__} import main; main()"]
        try:
            with self._lock:
                if self._closed:
                    return
                # In another session, so that Ctrl-C reaches this process only.
                process = subprocess.Popen(
                    command, stdin=PIPE, stdout=PIPE, env=os.environ | quiet, start_new_session=True
                )
                self._processes.append(process)
            special = self._context.tokenizer.backend.encode_special_tokens
            _ask(process, pickle.dumps((self._context, self._columns, special)))
        except _FAILURES as error:
            self._lost(error)
        else:
            with self._lock:
                self.size += 1
            self._idle.put(process)

    def _encode(self, rows: list[Any]) -> list[EncodedRow]:
        answer = None
        try:
            data = pickle.dumps(rows)
        except _FAILURES:  # rows of a class that no process can send
            data = b""
        if data and (process := self._next_idle()) is not None:
            try:
                answer = _ask(process, data)
                self._idle.put(process)
            except _FAILURES as error:
                with self._lock:
                    self.size -= 1
                self._lost(error)
        if isinstance(answer, list) or self._closed:
            return answer or []
        return encode_chunk(rows, self._context, self._columns)

    def _next_idle(self) -> Process | None:
        while self.size and not self._closed:
            try:
                return self._idle.get(timeout=0.2)
            except Empty:
                continue
        return None

    def _lost(self, error: BaseException) -> None:
        if not (self._warned or self._closed):
            self._warned = True
            warnings.warn(
                f"a process that encodes rows has ended ({error!r:.200}). Its rows are encoded in"
                " this process, which takes longer.",
                stacklevel=2,
            )


def _ask(process: Process, data: bytes) -> Any:
    """The answer to a message."""
    send_pickle(cast(BinaryIO, process.stdin), data)
    return receive(cast(BinaryIO, process.stdout))
