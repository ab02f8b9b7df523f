"""Generated ids to text while they arrive, and the search for stop strings in it."""

from collections.abc import Callable, Sequence

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
# Ids decoded again for every piece. A token's text depends on the tokens before it (spaces, bytes
# of one character), but not on those far before it.
_WINDOW = 64


class TextPieces:
    """Turns ids into pieces of text. Holds back the bytes of an unfinished character.

    The work for a new id does not grow with the length of the reply.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        """`decode` maps ids to text."""
        self._decode = decode
        self._ids: list[int] = []  # the last ids
        self._done = 0  # how many of them have become text
        self._known = ""  # the text of those

    def push(self, ids: Sequence[int]) -> str:
        """The text that became certain with these ids."""
        self._ids.extend(ids)
        text = self._decode(self._ids)
        return "" if text.endswith(_UNFINISHED) else self._advance(text)

    def finish(self) -> str:
        """The rest: bytes that did not become a character."""
        return self._advance(self._decode(self._ids))

    def _advance(self, text: str) -> str:
        piece = text[len(self._known) :]
        if len(self._ids) > _WINDOW and self._done:
            # All ids before `_done` were complete characters, so a window may begin there.
            self._ids = self._ids[self._done :]
            text = self._decode(self._ids)
        self._done, self._known = len(self._ids), text
        return piece


class StopSearch:
    """Passes text on until a stop string occurs, also one that is split over several pieces.

    Text that may be the beginning of a stop string is held back until the next piece decides.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """`stops` are not empty."""
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """The text that can be passed on. After `found`, none."""
        if self.found:
            return ""
        text = self._held + piece
        hits = [i for stop in self._stops if (i := text.find(stop)) >= 0]
        if hits:
            self.found, self._held = True, ""
            return text[: min(hits)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """The text that is still held back, after the last piece."""
        held, self._held = self._held, ""
        return "" if self.found else held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
