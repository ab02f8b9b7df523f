"""Copies between the device and the host, or other devices, beside the compute stream."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class CopyStream:
    """A stream that copies in the order in which it is asked to.

    Memory of the device is allocated on the compute stream. Each copy first waits for the work that
    was queued when it was asked for, so it can write to memory that the layer before used, and read
    what that layer computed.
    """

    def __init__(self, device: torch.device) -> None:
        """Make the stream.

        Args:
            device: that computes. On the CPU, copies are made at once.
        """
        self.device = device
        self.streams: Any = torch.get_device_module(device)
        self.copying = self.streams.Stream()

    def fill(self, target: Tensor, fill: Callable[[Tensor], object]) -> "Copy":
        """Start to fill a tensor.

        Args:
            target: of the device or in pinned host memory. It, and what it is filled from, must
                live until the compute stream has waited for the copy.
            fill: queues the copies to `target`.
        """
        self.copying.wait_stream(self.streams.current_stream())
        with self.streams.stream(self.copying):
            fill(target)
            return Copy(target, self.copying.record_event(), self.streams)

    def begin(self, size: int, fill: Callable[[Tensor], object]) -> "Copy":
        """Start to fill `size` bytes of new memory of the device, a tensor [size] of uint8."""
        return self.fill(torch.empty(size, dtype=torch.uint8, device=self.device), fill)


class Copy:
    """One copy under way."""

    def __init__(self, target: Tensor, done: Any, streams: Any) -> None:
        """The receiving memory, the event after the copy, and torch's module of the device."""
        self.target, self.done, self.streams = target, done, streams

    def wait(self) -> Tensor:
        """The receiving memory, after the compute stream has been told to wait for the copy."""
        self.streams.current_stream().wait_event(self.done)
        return self.target
