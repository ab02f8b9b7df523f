"""Bytes of which each rank holds a part, gathered from all ranks before use.

This is the only file of the wing that calls collectives of sharded bytes.
"""

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import UInt8
from torch import Tensor

from fastlora.distributed.host_shards import HostCopies
from fastlora.distributed.process_group import start_all_gather


class Gathers:
    """All-gathers over one dimension of a mesh, in the order in which they are asked for.

    NCCL's stream waits for the compute stream when a gather is asked for, so the receiving memory
    may be what the layer before used.
    """

    outside_allocator = False

    def __init__(self, group: Any, device: torch.device, host: HostCopies | None = None) -> None:
        """Nothing is sent.

        Args:
            group: the process group of the ranks that hold parts.
            device: that receives.
            host: copies a rank's part to the device first, if parts are in host memory.
        """
        self.group, self.device, self.host = group, device, host
        self.ranks, self.rank = dist.get_world_size(group), dist.get_rank(group)

    def begin(self, part: UInt8[Tensor, "n"], size: int) -> "Gather":
        """Start to gather `size` bytes, of which `part` is this rank's."""
        assert len(part) * self.ranks == size, (len(part), self.ranks, size)
        flat = torch.empty(size, dtype=torch.uint8, device=self.device)
        if self.host is None:
            return Gather(flat, start_all_gather(flat, part, self.group), None)
        copy, stream = self.host.begin(part, len(part)), self.host.stream
        with stream.streams.stream(stream.copying):
            # On the copy stream, which NCCL's then waits for.
            work = start_all_gather(flat, copy.target, self.group)
        return Gather(flat, work, copy.target)

    def keep(self, part: UInt8[Tensor, "n"]) -> UInt8[Tensor, "n"]:
        """A rank's part where it is kept between uses."""
        return part.to(self.device) if self.host is None else self.host.keep(part)


class Gather:
    """One all-gather under way."""

    def __init__(self, flat: UInt8[Tensor, "n"], work: Any, part: Tensor | None) -> None:
        """The receiving memory, torch's handle, and a part that is sent from, until then."""
        self.flat, self.work, self.part = flat, work, part

    def wait(self) -> UInt8[Tensor, "n"]:
        """The bytes, after the compute stream has been told to wait for them."""
        if self.work is not None:
            self.work.wait()
            self.work = self.part = None
        return self.flat


def summed_parts(whole: UInt8[Tensor, "n"], group: Any) -> UInt8[Tensor, "m"]:
    """This rank's part of the bytes of all ranks, of which one has written a byte, the others 0."""
    ranks = dist.get_world_size(group)
    part = whole.new_empty(len(whole) // ranks)
    # torch 2.13 renamed the function.
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    scatter(part, whole, group=group)
    return part
