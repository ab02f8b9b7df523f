"""What every request passes before the app sees it: host, origin, key and size of the body."""

import asyncio
import hashlib
import hmac
from collections.abc import Collection
from contextlib import suppress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.errors import ApiError
from serving.limits import Limits
from serving.metrics import Metrics

OPEN_PATHS = ("/", "/health")  # no key needed
_ROUTES = (*OPEN_PATHS, "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions")
LOOPBACK = ("localhost", "127.0.0.1", "::1")
# The body of a refused request is read on, and thrown away, for so long: a connection that closes
# before its client has sent everything is reset, and the client does not see the error.
_DISCARD_SECONDS = 10.0


class Guard:
    """ASGI middleware."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        limits: Limits,
        metrics: Metrics,
        key: str | None,
        hosts: Collection[str] | None,
    ) -> None:
        """`hosts` are the names in the Host header that are answered; None answers all."""
        self.app, self.limits, self.metrics = app, limits, metrics
        self.hosts = hosts
        self.key_digest = None if key is None else _digest(key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return None  # no WebSockets
        path = scope["path"]
        route = path if path in _ROUTES else "other"

        async def counting_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.metrics.responses[route, message["status"]] += 1
            await send(message)

        headers = Headers(scope=scope)
        try:
            self._check_host(headers)
            self._check_key(headers, path)
            body = await self._body(headers, receive)
        except ApiError as error:
            return await _refuse(error, headers, receive, counting_send)
        return await self.app(scope, _replaying(body, receive), counting_send)

    def _check_host(self, headers: Headers) -> None:
        """Refuse pages of other origins.

        A page can reach a server on 127.0.0.1 in two ways. With DNS rebinding, the page's name
        resolves to 127.0.0.1: then the Host header has that name. With a cross-origin request, the
        browser sends an Origin header that differs from the host.
        """
        host = headers.get("host", "")
        if self.hosts is not None and _host_name(host) not in self.hosts:
            raise ApiError(
                403,
                f"the Host header is {host!r:.80}; this server answers to "
                f"{', '.join(self.hosts)}. serve.py --allow-host NAME adds a name",
                code="wrong_host",
            )
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            raise ApiError(
                403, f"requests of pages from {origin!r:.80} are refused", code="wrong_origin"
            )

    def _check_key(self, headers: Headers, path: str) -> None:
        if self.key_digest is None or path in OPEN_PATHS:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        # Digests have one length, so the time of the comparison tells nothing about the key.
        same = hmac.compare_digest(_digest(given.strip().encode()), self.key_digest)
        if scheme.lower() != "bearer" or not same:
            raise ApiError(
                401,
                "wrong or missing key; send it as 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        """The complete body. Reading ends once the limit is exceeded."""
        declared = headers.get("content-length", "0")
        if declared.isdecimal() and int(declared) > self.limits.body_bytes:
            raise self._too_large()
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                return await self._read(receive)
        except TimeoutError:
            raise ApiError(
                408,
                f"the body was not complete after {self.limits.body_seconds:g} seconds",
                headers={"Connection": "close"},
            ) from None

    async def _read(self, receive: Receive) -> bytes:
        chunks, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ApiError(400, "the connection closed before the body was complete")
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            if size > self.limits.body_bytes:
                raise self._too_large()
            if not message.get("more_body", False):
                return b"".join(chunks)

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the body is larger than {self.limits.body_bytes} bytes",
            code="body_too_large",
            headers={"Connection": "close"},
        )


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).digest()


def _host_name(host: str) -> str:
    """A Host header without its port: "[::1]:8000" -> "::1"."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


async def _refuse(error: ApiError, headers: Headers, receive: Receive, send: Send) -> None:
    """Send an error, then read what the client is still sending."""
    response = error.response()
    start = {"type": "http.response.start", "status": error.status}
    await send({**start, "headers": response.raw_headers})
    await send({"type": "http.response.body", "body": response.body, "more_body": True})
    sends_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
    if sends_body and "expect" not in headers:  # a client that expects 100-continue waits for us
        with suppress(TimeoutError):
            async with asyncio.timeout(_DISCARD_SECONDS):
                while (message := await receive())["type"] != "http.disconnect":
                    if not message.get("more_body", False):
                        break
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def _replaying(body: bytes, receive: Receive) -> Receive:
    """`receive` for the app: the body as one message, then what comes from the client."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay
