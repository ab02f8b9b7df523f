"""Bytes in host memory that are copied to the device before use: streaming of weights.

The memory is pinned, and copies run on a stream beside the compute stream. Memory is allocated on
the compute stream. Each copy first waits for the work that was queued when it was asked for, so it
can write to memory that the layer before used. When the compute stream is done with a layer, its
memory serves the next but one.
"""

import mmap
import weakref
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor


class HostCopies:
    """Copies from host memory to one device, in the order in which they are asked for."""

    def __init__(self, device: torch.device) -> None:
        """Make a copy stream.

        Args:
            device: that computes. On the CPU, copies are made at once.
        """
        self.device = device
        self.streams: Any = torch.get_device_module(device)
        self.copying = self.streams.Stream()

    def begin(self, part: UInt8[Tensor, "n"], size: int) -> "HostCopy":
        """Start to copy the `size` bytes of `part` to the device."""
        assert len(part) == size, (len(part), size)
        flat = torch.empty(size, dtype=torch.uint8, device=self.device)
        self.copying.wait_stream(self.streams.current_stream())
        with self.streams.stream(self.copying):
            flat.copy_(part, non_blocking=True)
            return HostCopy(flat, self.copying.record_event(), self.streams)

    def keep(self, part: UInt8[Tensor, "n"]) -> UInt8[Tensor, "n"]:
        """The bytes in host memory, pinned if the device is a GPU."""
        host = pinned(len(part)) if self.device.type == "cuda" else torch.empty_like(part)
        return host.copy_(part)


class HostCopy:
    """One copy under way."""

    def __init__(self, flat: UInt8[Tensor, "n"], done: Any, streams: Any) -> None:
        """The receiving memory, the event after the copy, and torch's module of the device."""
        self.flat, self.done, self.streams = flat, done, streams

    def wait(self) -> UInt8[Tensor, "n"]:
        """The bytes, after the compute stream has been told to wait for them."""
        self.streams.current_stream().wait_event(self.done)
        return self.flat


def pinned(size: int) -> UInt8[Tensor, "n"]:
    """New host memory that the driver has pinned, until the tensor and its views are gone.

    torch's own pinned memory is rounded up to a power of two: 512 MiB for a layer of 442 MB.

    Raises:
        RuntimeError: the driver refuses, because the host has too little memory that can be locked.
    """
    runtime: Any = torch.cuda.cudart()
    # Whole pages, because the driver pins a page only once. The array ends together with the
    # tensor's storage, which views of the tensor share.
    memory = np.frombuffer(mmap.mmap(-1, size), np.uint8)
    if (code := int(runtime.cudaHostRegister(memory.ctypes.data, size, 0))) != 0:
        raise RuntimeError(
            f"the driver cannot pin {size / 2**30:.2f} GiB of host memory (CUDA error {code}); a"
            " container may limit locked memory (ulimit -l), or the host has too little."
        )
    weakref.finalize(memory, _unpin, runtime, memory.ctypes.data).atexit = False
    return torch.from_numpy(memory)


def _unpin(runtime: Any, address: int) -> None:
    torch.cuda.synchronize()  # a copy may still read it
    runtime.cudaHostUnregister(address)
