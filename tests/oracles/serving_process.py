"""scripts/serve.py in a separate process, and small adapters for it."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path

import httpx2
import pytest
from openai import OpenAI

import fastlora
from oracles.trees import randomised

ROOT = Path(__file__).parents[2]
START_SECONDS = 90  # a machine under load compiles nothing, but imports take a while


@cache
def forks() -> ForkServerContext:
    """Starts processes that have imported the scripts already: in less than 1 s and not in 4 s."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["serve", "chat"])
    with pytest.MonkeyPatch.context() as patch:
        # Python 3.11 imports nothing, without an error, if it finds no path to the scripts here.
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()
    return context


def save_adapter(folder: Path, seed: int, **settings) -> Path:
    """A folder with an adapter of the demo model. A and B are random."""
    base, _ = fastlora.load("demo", dtype="float32")
    model = fastlora.lora(base, **{"r": 4, "lora_alpha": 8, **settings})
    model = model.with_adapter(randomised(model.adapter, seed, std=0.1))
    model.save_pretrained(folder)
    return folder


class ServerProcess:
    """A running server."""

    def __init__(self, process: "Started", url: str, log: Path, key: str | None) -> None:
        self.process, self.url, self.log, self.key = process, url, log, key

    def client(self, **settings) -> OpenAI:
        """The official client. It repeats no request by itself."""
        key = self.key or "none"
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, **settings)

    def http(self, **settings) -> httpx2.Client:
        """A plain client, with the key."""
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return httpx2.Client(base_url=self.url, headers=headers, timeout=60, **settings)

    def metric(self, name: str) -> float:
        """A value of /metrics, 0 if it is not there yet."""
        with self.http() as http:
            lines = http.get("/metrics").text.splitlines()
        values = [line.split()[-1] for line in lines if line.startswith(f"fastlora_{name} ")]
        return float(values[0]) if values else 0.0

    def wait_idle(self, seconds: float = 20.0) -> None:
        """Wait until no stream is open and no row runs; fail if that takes too long."""
        names, end = ("open_streams", "running_rows", "waiting_rows"), time.monotonic() + seconds
        while any(values := {name: self.metric(name) for name in names}.values()):
            assert time.monotonic() < end, dict(zip(names, values, strict=True))
            time.sleep(0.1)

    def memory(self) -> int:
        """Resident bytes."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")


class Script:
    """`python scripts/serve.py ...`, as users run it."""

    def __init__(self, arguments: list[str], key: str | None, log: Path) -> None:
        command = [sys.executable, str(ROOT / "scripts/serve.py"), *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command, stdout=output, stderr=output, env=_with_key(environment, key)
            )
        self.pid, self.send_signal = self._process.pid, self._process.send_signal
        self.poll, self.wait, self.kill = self._process.poll, self._process.wait, self._process.kill


class Fork:
    """The main function of serve.py in a process that has imported it already."""

    def __init__(self, arguments: list[str], key: str | None, log: Path) -> None:
        self._process = forks().Process(target=_main, args=(arguments, key, log))
        self._process.start()
        assert self._process.pid is not None
        self.pid, self.kill = self._process.pid, self._process.kill

    def send_signal(self, number: int) -> None:
        """As subprocess.Popen's."""
        if self._process.exitcode is None:
            os.kill(self.pid, number)

    def poll(self) -> int | None:
        """As subprocess.Popen's."""
        return self._process.exitcode

    def wait(self, timeout: float) -> int:
        """As subprocess.Popen's."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise TimeoutError(f"the server runs on after {timeout} seconds")
        return self._process.exitcode


Started = Script | Fork


def _main(arguments: list[str], key: str | None, log: Path) -> None:
    assert "serve" in sys.modules, "the script was not imported before the fork"
    import serve

    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(_with_key(dict(os.environ), key))
    sys.argv = ["serve.py", *arguments]
    serve.main()


def _with_key(environment: dict[str, str], key: str | None) -> dict[str, str]:
    environment.pop("FASTLORA_API_KEY", None)
    return environment if key is None else environment | {"FASTLORA_API_KEY": key}


@contextmanager
def serve(
    log: Path, *arguments: str, key: str | None = None, kind: type[Started] = Fork
) -> Iterator[ServerProcess]:
    """A server of these arguments on a free port, until the block ends."""
    log.touch()
    process = kind([*arguments, "--port", "0"], key, log)
    try:
        yield ServerProcess(process, _address(process, log), log, key)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        finally:
            process.kill()


def _address(process: Started, log: Path) -> str:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        for line in log.read_text().splitlines():
            if line.startswith("serving "):
                return line.split()[-1]
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    raise AssertionError(f"no server after {START_SECONDS} s: {log.read_text()}")
