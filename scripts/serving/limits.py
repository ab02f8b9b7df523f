"""Limits of the server, and the count of the streams that are open."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

from fastlora.arguments import number, setting, setting_problems, whole_number
from fastlora.errors import raise_problems
from serving.errors import ApiError


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds for one client, and for all clients together.

    A stream is one reply being written or waited for. A request with n=3 has three.
    """

    streams: int = setting(whole_number(1), 64)  # of all clients; one more is refused with 429
    choices: int = setting(whole_number(1), 16)  # n times prompts of one request
    new_tokens: int = setting(whole_number(1), 4096)  # of one reply
    body_bytes: int = setting(whole_number(1), 4 * 2**20)
    body_seconds: float = setting(number(above=0), 30.0)  # until a request's body is complete
    request_seconds: float = setting(number(above=0), 600.0)  # until the last token
    buffer_tokens: int = setting(whole_number(16), 1024)  # of a stream that a client leaves unread
    drain_seconds: float = setting(number(low=0), 20.0)  # for running replies when the server stops

    @classmethod
    def names(cls) -> list[str]:
        """Names of all limits."""
        return [f.name for f in fields(cls)]

    def check(self) -> "Limits":
        """The same limits.

        Raises:
            ValueError: lists every limit with a wrong value.
        """
        raise_problems(ValueError, "these limits are wrong:", setting_problems(self))
        return self


class OpenStreams:
    """Counts open streams and refuses more than the limit. Used on the event loop only."""

    def __init__(self, limit: int) -> None:
        """`limit` is the number of streams that may be open at once."""
        self.limit, self.open, self.stopping = limit, 0, False

    @contextmanager
    def reserve(self, streams: int) -> Iterator[None]:
        """Hold `streams` of the limit until the block ends.

        Raises:
            ApiError: 503 while the server stops, 429 if too many streams are open.
        """
        self.check(streams)
        self.open += streams
        try:
            yield
        finally:
            self.open -= streams

    def check(self, streams: int) -> None:
        """Raise the ApiError with which `reserve` would refuse."""
        if self.stopping:
            raise ApiError(
                503,
                "the server is stopping and takes no new requests",
                code="stopping",
                headers={"Retry-After": "5", "Connection": "close"},
            )
        if self.open + streams > self.limit:
            raise ApiError(
                429,
                f"{self.open} of {self.limit} streams are open and this request needs {streams};"
                " try again when others have ended",
                code="too_many_streams",
                headers={"Retry-After": "1"},
            )
