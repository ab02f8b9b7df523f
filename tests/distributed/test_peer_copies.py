"""Copies of other ranks' memory: the bytes of a gather, parts that end, and who may read whom."""

import gc
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastlora.distributed import peer_copies
from fastlora.distributed.host_shards import HostCopies
from fastlora.distributed.peer_copies import (
    PeerCopies,
    Place,
    SymmetricMemory,
    ranks_read_peers,
    reads_all,
)
from fastlora.distributed.sharded_base import Shards, shard_layers, shard_matrix
from fastlora.runtime.layer_fetching import bytes_outside_allocator

CPU = torch.device("cpu")
DISABLE_MULTICAST = "TORCH_SYMM_MEM_DISABLE_MULTICAST"


class SharedMemory:
    """Symmetric memory of ranks that are objects of one process."""

    def __init__(self, ranks: int) -> None:
        self.of_ranks: list[Any] = [None] * ranks
        self.meetings = 0
        self.multicast: set[str | None] = set()

    def of(self, rank: int) -> Any:
        def rendezvous(part: torch.Tensor, group: Any) -> Any:
            self.meetings += 1
            self.multicast.add(os.environ.get(DISABLE_MULTICAST))
            buffer = lambda peer, shape, dtype: self.of_ranks[peer][: shape.numel()].view(dtype)
            return SimpleNamespace(get_buffer=buffer)

        def empty(size: int, device: torch.device) -> torch.Tensor:
            self.of_ranks[rank] = torch.full((size,), 255, dtype=torch.uint8, device=device)
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


@pytest.mark.parametrize("before", [None, "0"])
def test_ranks_meet_without_multicast(monkeypatch, before):
    """Some machines refuse it, and the rendezvous fails. Copies do not use it."""
    monkeypatch.delenv(DISABLE_MULTICAST, raising=False)
    if before is not None:
        monkeypatch.setenv(DISABLE_MULTICAST, before)
    memory, ranks = three_ranks(monkeypatch)
    parts = [rank.keep(torch.zeros(4, dtype=torch.uint8)) for rank in ranks]
    ranks[0].begin(parts[0], 12).wait()
    assert memory.multicast == {"1"} and os.environ.get(DISABLE_MULTICAST) == before


def test_cached_memory_is_returned_if_a_part_would_not_fit(monkeypatch):
    """torch's allocator does not see that memory beside it is needed."""
    returned = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**33))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: returned.append(True))
    for device, size, expected in (("cuda", 2**29, 0), ("cpu", 2**31, 0), ("cuda", 2**30, 1)):
        peer_copies._make_room(size, torch.device(device, 0))
        assert len(returned) == expected


def test_a_part_that_is_dropped_ends(monkeypatch):
    memory, ranks = three_ranks(monkeypatch)
    parts = [rank.keep(torch.zeros(4, dtype=torch.uint8)) for rank in ranks]
    ranks[0].begin(parts[0], 12).wait()
    assert len(ranks[0]._of_ranks) == 1
    memory.of_ranks.clear()
    parts.clear()
    gc.collect()
    assert len(ranks[0]._of_ranks) == 0


def test_parts_in_symmetric_memory_are_outside_of_the_allocator(monkeypatch):
    _, (first, *_) = three_ranks(monkeypatch)
    for source, ranks in ((first, 3), (HostCopies(CPU), 1)):
        shards = Shards(source, 0, ranks)
        layers = shard_layers(shards, 2, lambda i: {"q_proj": {"weight": torch.ones(4, 100)}})
        head = shard_matrix(shards, "lm_head", torch.ones(7, 50))
        found = bytes_outside_allocator({"layers": layers, "lm_head": head, "norm": torch.ones(4)})
        assert found == (layers.kept_bytes + head.part.nbytes if source is first else 0)
        assert layers.kept_bytes >= 2 * 4 * 100 * 4 / ranks


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


def test_torch_has_the_private_functions():
    with pytest.raises(RuntimeError, match="cpu"):  # it has no symmetric memory
        SymmetricMemory().empty(4, CPU)
