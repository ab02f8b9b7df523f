"""Pinned host memory for a function that is recorded in a CUDA graph.

torch never frees pinned memory that is allocated and used while a graph is recorded, even if the
graph is deleted (CachingHostAllocator.h of torch 2.13, pytorch#161583): each recording of a step
with recompute="offload" would keep about 1 GB of an 8B model for 2 x 2048 tokens until the process
ends. So the first call, which runs without a recording, notes the sizes that it asks for, and
recordings take buffers of these sizes that were allocated before.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import zip_longest

import torch
from torch import Tensor


class PinnedBuffers:
    """Buffers of bytes, taken one after the other, and the sizes that were asked for."""

    def __init__(self, buffers: Sequence[Tensor] = ()) -> None:
        """Hand out these buffers.

        Args:
            buffers: uint8 tensors, in the order of the requests.
        """
        self.buffers = buffers
        self.sizes: list[int] = []

    def take(self, size: int) -> Tensor | None:
        """The next buffer's first `size` bytes; None if there is none or it is too small."""
        number = len(self.sizes)
        self.sizes.append(size)
        if number >= len(self.buffers) or self.buffers[number].nbytes < size:
            return None
        return self.buffers[number][:size]


_CURRENT: ContextVar[PinnedBuffers | None] = ContextVar("pinned_buffers", default=None)


@contextmanager
def pinned_from(buffers: PinnedBuffers) -> Iterator[None]:
    """Let `pinned_like` take memory from these buffers, in this thread."""
    token = _CURRENT.set(buffers)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def pinned_like(x: Tensor) -> Tensor:
    """An uninitialised host tensor of x's shape, strides and dtype, pinned if x is on a GPU.

    x must be dense: its elements fill the memory between the first and the last.
    """
    current = _CURRENT.get()
    buffer = None if current is None else current.take(x.nbytes)
    if buffer is not None:
        return buffer.view(x.dtype).as_strided(x.shape, x.stride())
    pin = x.device.type == "cuda"  # copies to pageable memory are not asynchronous
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cpu", pin_memory=pin)


def fitting(buffers: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
    """Pinned buffers of at least these sizes: the given ones where they are large enough, and the
    given ones beyond the last size."""
    pin = torch.cuda.is_available()
    new = lambda size: torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=pin)
    pairs = zip_longest(buffers, sizes, fillvalue=None)
    return [
        new(n or 0) if old is None or (n is not None and old.nbytes < n) else old
        for old, n in pairs
    ]


def hold_until_replayed(buffers: Sequence[Tensor], device: torch.device) -> None:
    """Keep the memory of buffers, once they are dropped, until replays on this stream have ended.

    torch gives dropped pinned memory to others when the streams that have copied from or to it are
    done. It does not see the copies of a replayed graph, so this copies a byte of each buffer on
    the current stream.

    Args:
        buffers: that a graph was recorded with.
        device: of the graph.
    """
    for buffer in buffers:
        buffer[:1].to(device, non_blocking=True)
