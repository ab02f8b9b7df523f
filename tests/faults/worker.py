"""Worker: the client of server.py, and the runner of many cases in processes that may die."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]  # of the repository


class Worker:
    """A server process. One job at a time; close it at the end."""

    def __init__(self, scratch: Path):
        """Start the server, whose children write under `scratch`."""
        self.scratch = scratch
        home, temporary = scratch / "home", scratch / "tmp"
        for folder in (home, temporary):
            folder.mkdir(parents=True, exist_ok=True)
        path = os.pathsep.join(
            [str(ROOT), str(HERE.parent), *filter(None, [os.getenv("PYTHONPATH")])]
        )
        settings = dict(HOME=home, TMPDIR=temporary, PYTHONPATH=path, OMP_NUM_THREADS=1)
        settings |= dict(HF_HUB_OFFLINE=1, HF_HOME=home / "hf", PYTHONDONTWRITEBYTECODE=1)
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {k: str(v) for k, v in settings.items()},
            bufsize=0,
        )
        self._unread = b""
        self.pid = 0

    def start(self, function: str, output: Path, **arguments: Any) -> int:
        """Fork a child that runs "module:name"; gives its process id."""
        job = {"function": function, "arguments": arguments, "output": str(output)}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job).encode() + b"\n")
        self.pid = self._reply(300)["pid"]
        return self.pid

    def wait(self, seconds: float) -> int | None:
        """The child's exit status (negative: killed by that signal), or None if it still runs."""
        reply = self._reply(seconds)
        return None if reply is None else reply["exit"]

    def kill(self, number: int = signal.SIGKILL) -> int:
        """Send the child a signal and wait for its end."""
        os.kill(self.pid, number)
        code = self.wait(60)
        if code is None:
            os.kill(self.pid, signal.SIGKILL)
            code = self.wait(60)
        assert code is not None
        return code

    def close(self) -> None:
        """End the server."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)

    def _reply(self, seconds: float) -> Any:
        assert self.process.stdout is not None
        end = time.monotonic() + seconds
        while b"\n" not in self._unread:
            left = max(0.0, end - time.monotonic())
            if not select.select([self.process.stdout], [], [], left)[0]:
                return None
            data = self.process.stdout.read(65536)
            if not data:
                raise RuntimeError("the fault server has ended; its error is on stderr")
            self._unread += data
        line, self._unread = self._unread.split(b"\n", 1)
        return json.loads(line)


def run_cases(
    worker: Worker, names: Sequence[str], hang_seconds: float = 10.0
) -> dict[str, dict[str, Any]]:
    """Name -> result of every case, each run in a child that runs on to the next case.

    If the child dies, the case that it had begun is "crashed". If its log does not grow for
    `hang_seconds`, that case is "hung". Both times a new child goes on behind it.
    """
    log, output = worker.scratch / "cases.log", worker.scratch / "cases.out"
    results: dict[str, dict[str, Any]] = {}
    todo = list(names)
    while todo:
        log.unlink(missing_ok=True)
        output.unlink(missing_ok=True)
        arguments = dict(names=todo, log=str(log), scratch=str(worker.scratch))
        worker.start("faults.cases:run", output, **arguments)
        code = _watch(worker, log, hang_seconds)
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        results |= {line["name"]: line for line in lines if "outcome" in line}
        begun = [line for line in lines if line["name"] not in results]
        if begun:
            outcome = "hung" if code is None else "crashed"
            text = f"over {hang_seconds:g} s" if code is None else f"exit status {code}"
            tail = output.read_text(errors="replace")[-500:]
            results[begun[0]["name"]] = begun[0] | dict(outcome=outcome, detail=f"{text}: {tail}")
        elif code != 0:
            raise RuntimeError(f"no case was begun: {output.read_text(errors='replace')[-3000:]}")
        todo = [name for name in todo if name not in results]
    return results


def _watch(worker: Worker, log: Path, hang_seconds: float) -> int | None:
    """The child's exit status, or None if a case hung and the child was killed.

    Seconds are those of the CPU, so that a busy machine makes no case hang; a child that waits
    gets five times as long.
    """
    size, since, used = -1, time.monotonic(), 0.0
    while (code := worker.wait(0.1)) is None:
        now = log.stat().st_size if log.exists() else 0
        if now != size:
            size, since, used = now, time.monotonic(), _cpu_seconds(worker.pid)
        waited = time.monotonic() - since
        if _cpu_seconds(worker.pid) - used > hang_seconds or waited > 5 * hang_seconds:
            worker.kill()
            return None
    return code


def _cpu_seconds(pid: int) -> float:
    """CPU time of a process so far; 0 if it has just ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
