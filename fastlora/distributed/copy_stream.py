"""Copies to the device on a stream beside the compute stream."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor


class CopyStream:
    """A stream that fills memory of one device, in the order in which it is asked to.

    Memory is allocated on the compute stream. Each copy first waits for the work that was queued
    when it was asked for, so it can write to memory that the layer before used. When the compute
    stream is done with a layer, its memory serves the next but one.
    """

    def __init__(self, device: torch.device) -> None:
        """Make the stream.

        Args:
            device: that computes. On the CPU, copies are made at once.
        """
        self.device = device
        self.streams: Any = torch.get_device_module(device)
        self.copying = self.streams.Stream()

    def begin(self, size: int, fill: Callable[[Tensor], object]) -> "Copy":
        """Start to fill `size` bytes of new memory.

        Args:
            size: number of bytes.
            fill: queues the copies to a tensor [size] of uint8.
        """
        flat = torch.empty(size, dtype=torch.uint8, device=self.device)
        self.copying.wait_stream(self.streams.current_stream())
        with self.streams.stream(self.copying):
            fill(flat)
            return Copy(flat, self.copying.record_event(), self.streams)


class Copy:
    """One copy under way."""

    def __init__(self, flat: UInt8[Tensor, "n"], done: Any, streams: Any) -> None:
        """The receiving memory, the event after the copy, and torch's module of the device."""
        self.flat, self.done, self.streams = flat, done, streams

    def wait(self) -> UInt8[Tensor, "n"]:
        """The bytes, after the compute stream has been told to wait for them."""
        self.streams.current_stream().wait_event(self.done)
        return self.flat
