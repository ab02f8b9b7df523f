"""Copies of other ranks' memory: the bytes of a gather, parts that end, and who may read whom."""

import gc
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastlora.distributed import peer_copies
from fastlora.distributed.peer_copies import PeerCopies, Place, ranks_read_peers, reads_all

CPU = torch.device("cpu")


class SharedMemory:
    """Symmetric memory of ranks that are objects of one process."""

    def __init__(self, ranks: int) -> None:
        self.of_ranks: list[Any] = [None] * ranks
        self.meetings = 0

    def of(self, rank: int) -> Any:
        def rendezvous(part: torch.Tensor, group: Any) -> Any:
            self.meetings += 1
            buffer = lambda peer, shape, dtype: self.of_ranks[peer][: shape.numel()].view(dtype)
            return SimpleNamespace(get_buffer=buffer)

        def empty(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
            self.of_ranks[rank] = torch.full((size,), 255, dtype=dtype, device=device)
            return self.of_ranks[rank]

        return SimpleNamespace(empty=empty, rendezvous=rendezvous)


def three_ranks(monkeypatch) -> tuple[SharedMemory, list[PeerCopies]]:
    memory, made = SharedMemory(3), []
    for rank in range(3):
        monkeypatch.setattr(peer_copies.dist, "get_world_size", lambda group: 3)
        monkeypatch.setattr(peer_copies.dist, "get_rank", lambda group, rank=rank: rank)
        made.append(PeerCopies(None, CPU, memory.of(rank)))
    return memory, made


def test_the_bytes_are_those_of_all_ranks_in_order(monkeypatch):
    memory, ranks = three_ranks(monkeypatch)
    bytes_ = torch.randint(0, 256, (21,), dtype=torch.uint8)
    parts = [rank.keep(part) for rank, part in zip(ranks, bytes_.split(7), strict=True)]
    for rank, part in zip(ranks, parts, strict=True):
        for _ in range(2):
            assert torch.equal(rank.begin(part, 21).wait(), bytes_)
    assert memory.meetings == 3  # of each rank one: only the first copy of a part meets


def test_a_part_that_is_dropped_ends(monkeypatch):
    memory, ranks = three_ranks(monkeypatch)
    parts = [rank.keep(torch.zeros(4, dtype=torch.uint8)) for rank in ranks]
    ranks[0].begin(parts[0], 12).wait()
    assert len(ranks[0]._of_ranks) == 1
    memory.of_ranks.clear()
    parts.clear()
    gc.collect()
    assert len(ranks[0]._of_ranks) == 0


@pytest.fixture
def four_gpus(monkeypatch):
    """GPUs g0 to g3, of which the last two cannot read g0."""
    identifier = lambda device: f"g{device.index}"
    monkeypatch.setattr(peer_copies, "_identifier", identifier)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: (a < 2) == (b < 2))


@pytest.mark.parametrize(
    ("places", "answer"),
    [
        ([Place("a", "g0"), Place("a", "g1")], True),
        ([Place("a", "g0")], True),
        ([Place("a", "g0"), Place("b", "g1")], False),  # another machine
        ([Place("a", "g0"), Place("a", "g2")], False),  # no peer access
        ([Place("a", "g0"), Place("a", "g7")], False),  # a GPU that this process does not see
        ([Place("a", "g0"), Place("a", "g0")], False),  # two ranks on one GPU
        ([Place("a", "g0"), None], False),  # a rank on the CPU
    ],
)
def test_who_may_read_whom(four_gpus, places, answer):
    assert reads_all(places, torch.device("cuda", 0)) is answer


def test_one_rank_that_cannot_read_decides_for_all(monkeypatch, four_gpus):
    def gathered(out: list[Any], own: Any, group: Any) -> None:
        out[:] = [own, Place("a", "g1")] if isinstance(own, Place) else [own, other]

    monkeypatch.setattr(peer_copies, "_process_space", lambda: "a")
    monkeypatch.setattr(peer_copies.dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(peer_copies.dist, "all_gather_object", gathered)
    for other in (True, False):
        assert ranks_read_peers(None, torch.device("cuda", 0)) is other
