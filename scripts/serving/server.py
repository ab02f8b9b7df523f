"""The process: its socket, and how it stops.

The first SIGTERM or SIGINT lets the open streams end, for at most `drain_seconds`, while new
requests get 503. Then, or at a second signal, the remaining streams end with an error event. A
third signal ends the process without that.
"""

import asyncio
import logging
import socket
import time
from types import FrameType

import uvicorn
from fastapi import FastAPI

from serving.service import Service

LOG = logging.getLogger("fastlora.serving")

# Kernel memory for what one client has not read yet. Left to itself, Linux lets it grow to 4 MB.
_SEND_BUFFER = 64 * 1024
# A client that reads nothing at all for so long is disconnected by the kernel.
_STALLED_MILLISECONDS = 30_000
_LAST_SECONDS = 5  # for the responses that a stopping server has cut


def bind(host: str, port: int) -> socket.socket:
    """A bound socket, with the options that accepted connections inherit.

    Raises:
        OSError: the address is unknown or in use.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, protocol, _, address = sorted(found, key=lambda f: f[0] != socket.AF_INET)[0]
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _STALLED_MILLISECONDS)
    try:
        made.bind(address)
    except OSError as error:
        made.close()
        raise OSError(f"cannot listen on {host}, port {port}: {error.strerror}") from error
    return made


class Server(uvicorn.Server):
    """uvicorn, with the graceful stop above."""

    def __init__(self, app: FastAPI, service: Service) -> None:
        """`service` is the app's."""
        config = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="on",
            access_log=False,
            log_level="warning",
            server_header=False,
            timeout_graceful_shutdown=_LAST_SECONDS,
        )
        super().__init__(config)
        self._service, self._signals = service, 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain_task: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, then tell where."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        for made in sockets or []:
            host, port = made.getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            names = ", ".join(self._service.served.adapter_ids)
            print(f"serving {names} at http://{shown}:{port}", flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal, cut the streams at the second, exit at the third."""
        self._signals += 1
        if self._loop is None or self._signals > 2:
            self.should_exit = True
            self.force_exit = self._signals > 1
        elif self._signals == 1:
            self._loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        self._service.open.stopping = True
        self._drain_task = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        streams = self._service.open
        print(f"stopping; {streams.open} streams are open", flush=True)
        await self._until_closed(self._service.limits.drain_seconds, signals=1)
        if streams.open:
            LOG.warning("%d streams are cut", streams.open)
            await self._service.scheduler.stop()
            await self._until_closed(_LAST_SECONDS, signals=2)
        self.should_exit = True

    async def _until_closed(self, seconds: float, *, signals: int) -> None:
        """Return when no stream is open, after some seconds, or at one more signal."""
        end = time.monotonic() + seconds
        while self._service.open.open and self._signals <= signals and time.monotonic() < end:
            await asyncio.sleep(0.05)
