"""on_first_rank(): one rank works with a sharded base, and the others send it their parts.

For work that only one rank should do, such as writing a folder, or whose course the ranks might not
agree on, such as sampling. The first rank announces what it fetches next; the others take part in
each gather and drop the result.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from fastlora.distributed.sharded_base import EDGE_NUMBERS, ShardedLayers, ShardedMatrix, Shards
from fastlora.runtime.layer_fetching import is_collective

T = TypeVar("T")

_DONE = -3  # announced at the end; no layer and no matrix has this number


def on_first_rank(base: Any, work: Callable[[], T]) -> T:
    """`work()` by rank 0; every rank returns its result. `work()` itself if no base is sharded.

    All ranks must call this with the same base. The result must be picklable, and its tensors on
    the CPU.

    Raises:
        RuntimeError: on the other ranks, if the work of rank 0 raises an error.
    """
    if not is_collective(base):
        return work()
    layers: ShardedLayers = base["layers"]
    shards, first = layers.shards, dist.get_rank() == 0
    outcome: list[Any] = [None, None]
    try:
        if first:
            outcome[0] = _lead(shards, work)
    except BaseException as error:  # Ctrl-C too: the others must not take it for a result
        outcome[1] = f"{type(error).__name__}: {error}"
        raise
    finally:
        # Only ranks that keep parts of what rank 0 fetches follow; others wait for the outcome.
        if not first and 0 in dist.get_process_group_ranks(shards.group):
            _follow(base, shards)
        dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise RuntimeError(f"rank 0 could not do this: {outcome[1]}")
    return outcome[0]


def _lead(shards: Shards, work: Callable[[], T]) -> T:
    def announce(number: int) -> None:
        _broadcast(shards, number)

    shards.announce = announce
    try:
        return work()
    finally:
        announce(_DONE)
        shards.announce = None


def _follow(base: Any, shards: Shards) -> None:
    edges = {number: key for key, number in EDGE_NUMBERS.items()}
    while (number := _broadcast(shards, _DONE)) != _DONE:
        kept: Any = base[edges[number]] if number in edges else base["layers"]
        fetch = kept.begin() if isinstance(kept, ShardedMatrix) else kept.begin(number)
        fetch.wait()


def _broadcast(shards: Shards, number: int) -> int:
    """The number that rank 0 gives."""
    value = torch.tensor(number, device=shards.source.device)
    dist.broadcast(value, src=0, group=shards.group)
    return int(value)
