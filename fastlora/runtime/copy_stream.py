"""Copies between the device and the host, or other devices, beside the compute stream."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastlora.runtime.devices import as_current


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
        with as_current(device):
            self.copying = self.streams.Stream()

    def fill(self, target: Tensor, fill: Callable[[Tensor], object]) -> "Copy":
        """Start to fill a tensor.

        Args:
            target: of the device or in pinned host memory. It, and what it is filled from, must
                live until the compute stream has waited for the copy.
            fill: queues the copies to `target`.
        """
        self.copying.wait_stream(self.computing())
        with self.streams.stream(self.copying):
            fill(target)
            return Copy(self, target, self.copying.record_event())

    def begin(self, size: int, fill: Callable[[Tensor], object]) -> "Copy":
        """Start to fill `size` bytes of new memory of the device, a tensor [size] of uint8."""
        return self.fill(torch.empty(size, dtype=torch.uint8, device=self.device), fill)

    def computing(self) -> Any:
        """The compute stream: the device's current one."""
        return self.streams.current_stream(self.device)


class Copy:
    """One copy under way."""

    def __init__(self, stream: CopyStream, target: Tensor, done: Any) -> None:
        """The stream that copies, the receiving memory, and the event after the copy."""
        self.stream, self.target, self.done = stream, target, done

    def wait(self) -> Tensor:
        """The receiving memory, after the compute stream has been told to wait for the copy."""
        self.stream.computing().wait_event(self.done)
        return self.target
