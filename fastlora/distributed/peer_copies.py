"""Bytes of which each rank of a machine holds a part, copied out of the other ranks' memory.

GPUs of one machine can read each other's memory over NVLink or PCIe. Copy engines do that beside
products. NCCL's all-gather instead runs on multiprocessors, which the products then lack: on two
H200s a step of 8B over a sharded base takes 1.06 times as long as over a whole one with NCCL, and
1.02 to 1.04 times with copies (`h200-x2-peer-copies-*-2026-11-30` and
`h200-x2-8b-bf16-copies-*-2026-11-30` in scripts/bench/results.jsonl).

A part is written once, before any rank reads it. So only the first copy of a part needs all ranks.

The parts are in torch's symmetric memory (torch.distributed._symmetric_memory), whose pages stay
until no rank has them mapped. torch's figures of allocated memory do not count it.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fastlora.runtime.copy_stream import Copy, CopyStream


class PeerCopies:
    """Copies of all ranks' parts to one device, in the order in which they are asked for."""

    outside_allocator = True

    def __init__(self, group: Any, device: torch.device, memory: Any = None) -> None:
        """Make a copy stream.

        Args:
            group: the process group of the ranks that hold parts, for which `ranks_read_peers`.
            device: that receives.
            memory: in the place of `SymmetricMemory`.
        """
        self.group, self.device = group, device
        self.ranks, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.stream = CopyStream(device)
        self._memory: Any = SymmetricMemory() if memory is None else memory
        # A part -> the parts of all ranks in their order, and the handle that keeps them mapped.
        self._of_ranks = WeakTensorKeyDictionary()

    def begin(self, part: UInt8[Tensor, "n"], size: int) -> Copy:
        """Start to copy `size` bytes, of which `part` is this rank's.

        When a part is asked for first, all ranks must ask for theirs.
        """
        n = len(part)
        assert n * self.ranks == size, (n, self.ranks, size)
        if part not in self._of_ranks:
            self._of_ranks[part] = self._meet(part)
        parts, _ = self._of_ranks[part]

        def fill(flat: Tensor) -> None:
            # Each rank begins with its own part, so that no two read from one rank at a time.
            for rank in (*range(self.rank, self.ranks), *range(self.rank)):
                flat[rank * n : (rank + 1) * n].copy_(parts[rank])

        return self.stream.begin(size, fill)

    def keep(self, part: UInt8[Tensor, "n"]) -> UInt8[Tensor, "n"]:
        """A rank's part in memory that the other ranks can read. It must not be written again."""
        _make_room(len(part), self.device)
        return self._memory.empty(len(part), self.device).copy_(part)

    def _meet(self, part: UInt8[Tensor, "n"]) -> tuple[list[Tensor], Any]:
        """Wait for all ranks, and map their parts."""
        # The part is written before others can read it.
        self.stream.streams.synchronize(self.device)
        with _without_multicast():
            handle = self._memory.rendezvous(part, self.group)
        # The entry must not hold `part` itself, or it would never end.
        own = part.detach()
        read = lambda rank: handle.get_buffer(rank, part.shape, part.dtype)
        return [own if rank == self.rank else read(rank) for rank in range(self.ranks)], handle


class Place(NamedTuple):
    """Where a rank computes."""

    process_space: str
    """Name of the machine, or container, in which processes can pass memory to each other."""
    gpu: str
    """Identifier of the GPU, which is the same in all processes."""


def ranks_read_peers(group: Any, device: torch.device) -> bool:
    """Whether the GPUs of all ranks of a group can read each other's memory.

    All ranks of the group must call this; all get the same answer.

    Args:
        group: of the ranks.
        device: of this rank.
    """
    own = Place(_process_space(), _identifier(device)) if device.type == "cuda" else None
    places: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(places, own, group=group)
    answers: list[Any] = [None] * len(places)
    dist.all_gather_object(answers, reads_all(places, device), group=group)
    return all(answers)


def reads_all(places: list[Place | None], device: torch.device) -> bool:
    """Whether this process's GPU can read the memory of the GPUs of all these places."""
    if None in places or len({place.process_space for place in places if place}) > 1:
        return False
    number = {_identifier(torch.device("cuda", i)): i for i in range(torch.cuda.device_count())}
    found = [number.get(place.gpu) for place in places if place]
    if None in found or len(set(found)) < len(found):
        return False  # a GPU that this process does not see, or two ranks on one
    own = device.index
    return all(i == own or torch.cuda.can_device_access_peer(own, i) for i in found)


def _identifier(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)


def _make_room(size: int, device: torch.device) -> None:
    """Have torch's allocator return cached memory if the device has too little left for a part.

    The allocator does so only when one of its allocations fails. Parts are not among them.
    """
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < size + _ROUNDED_BYTES:
        torch.cuda.empty_cache()


# More than symmetric memory adds to a part by rounding up, and for its signals.
_ROUNDED_BYTES = 16 * 2**20

_NO_MULTICAST = "TORCH_SYMM_MEM_DISABLE_MULTICAST"


@contextmanager
def _without_multicast() -> Iterator[None]:
    """A context in which torch does not make an NVLink multicast object for each part.

    Copies do not use it, and some machines refuse to make it, in which case the rendezvous fails.
    torch reads the variable in each rendezvous, and has no argument for it.
    """
    before = os.environ.get(_NO_MULTICAST)
    os.environ[_NO_MULTICAST] = "1"
    try:
        yield
    finally:
        del os.environ[_NO_MULTICAST]
        if before is not None:
            os.environ[_NO_MULTICAST] = before


def _process_space() -> str:
    """Processes of one machine whose containers differ cannot pass memory to each other.

    torch passes handles of memory through sockets that are files, named by process ids.
    """
    names = [socket.gethostname()]
    for space in ("pid", "net", "mnt"):
        try:
            names.append(os.readlink(f"/proc/self/ns/{space}"))
        except OSError:  # not Linux
            names.append("")
    return " ".join(names)


class SymmetricMemory:
    """torch's symmetric memory, an allocation for each tensor.

    `torch.distributed._symmetric_memory.empty` of torch 2.13 takes parts of larger allocations
    instead, in which `get_buffer` does not find a tensor by itself.
    """

    def __init__(self) -> None:
        """Import torch's module."""
        import torch.distributed._symmetric_memory as memory  # noqa: PLC0415  0.2 s

        self._torch: Any = memory

    def empty(self, size: int, device: torch.device) -> UInt8[Tensor, "n"]:
        """`size` bytes that other ranks can map."""
        allocate = self._torch._SymmetricMemory.empty_strided_p2p
        return allocate((size,), (1,), torch.uint8, device)

    def rendezvous(self, part: UInt8[Tensor, "n"], group: Any) -> Any:
        """Wait for all ranks of the group; torch's handle of their parts."""
        return self._torch.rendezvous(part, group)
