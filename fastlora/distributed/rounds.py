"""agree_on_round(): a name for this start of the ranks, which no earlier start had.

torchrun keeps one store when it starts the ranks again, and torch 2.13 finds the addresses of dead
processes there ("Gloo connectFullMesh failed ... Connection refused"). torchrun's count of restarts
cannot serve as a name, because each machine's agent has its own count.
"""

import hashlib
import secrets
from time import monotonic, sleep
from typing import Any

_PAUSE_SECONDS = 0.01


def agree_on_round(store: Any, rank: int, count: int, seconds: float) -> str:
    """A name that all ranks of this start have, and that depends on all of them.

    Each rank writes a new random word. Rank 0 proposes the list of all words. A rank whose own word
    is in the proposal accepts it. When all have accepted one proposal, it holds no word of a dead
    process, because a dead process accepts nothing.

    Args:
        store: of the ranks, which may hold what earlier starts wrote.
        rank: of this process.
        count: of ranks.
        seconds: to wait for the others.

    Raises:
        TimeoutError: names the ranks that do not answer.
    """
    own, started = secrets.token_hex(8), monotonic()
    store.set(f"word/{rank}", own)
    while True:
        if rank == 0:
            words = [_read(store, f"word/{i}") for i in range(count)]
            if all(words) and _read(store, "proposal") != (proposal := ",".join(words)):
                store.set("proposal", proposal)
        proposal = _read(store, "proposal")
        name = hashlib.sha256(proposal.encode()).hexdigest()[:16]
        words = proposal.split(",")
        if len(words) == count and words[rank] == own:
            store.set(f"accepted/{rank}", name)
            if rank == 0 and not _missing(store, name, count):
                store.set(f"agreed/{name}", "yes")
            if _read(store, f"agreed/{name}"):
                return name
        if monotonic() - started > seconds:
            ranks = ", ".join(str(i) for i in _missing(store, name, count) if i != rank)
            raise TimeoutError(f"ranks {ranks} did not start within {seconds:.0f} s")
        sleep(_PAUSE_SECONDS)


def _missing(store: Any, name: str, count: int) -> list[int]:
    """The ranks that have not accepted a proposal."""
    return [i for i in range(count) if _read(store, f"accepted/{i}") != name]


def _read(store: Any, key: str) -> str:
    """A value of the store; "" if there is none."""
    return store.get(key).decode() if store.check([key]) else ""
