"""A response of server-sent events that ends at once when its client is gone or reads too slowly.

https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

DONE = "data: [DONE]\n\n"


def event(content: dict[str, Any]) -> str:
    """One event. JSON has no line break, so one line of data is enough."""
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def client_is_gone(receive: Receive) -> None:
    """Return when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends events until they end, the client is gone, or `cut` is set."""

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncIterator[str], cut: asyncio.Event, close: Callable[[str], None]
    ) -> None:
        """`close` is called in any case, with "done", "disconnected" or "too slow"."""
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events, self._cut, self._close = events, cut, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response. If it is cut, uvicorn closes the connection without an end mark."""
        tasks = {
            asyncio.create_task(self._send(send)): "done",
            asyncio.create_task(client_is_gone(receive)): "disconnected",
            asyncio.create_task(self._cut.wait()): "too slow",
        }
        end = "disconnected"
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            end = next(tasks[task] for task in tasks if task in done)
            await next(task for task in tasks if task in done)  # raises what the task raised
        finally:
            self._close(end)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for text in self._events:
            # This waits while the buffers of the connection are full.
            await send(_body(text.encode(), more=True))
        await send(_body(b"", more=False))


def _body(data: bytes, *, more: bool) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}
