"""Bytes in host memory that are copied to the device before use: streaming of weights.

The memory is pinned, so that copy engines read it while the device computes.
"""

import mmap
import weakref
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from fastlora.runtime.copy_stream import Copy, CopyStream


class HostCopies:
    """Copies from host memory to one device, in the order in which they are asked for."""

    outside_allocator = False  # kept bytes are not on the device

    def __init__(self, device: torch.device) -> None:
        """Make a copy stream to the device that computes."""
        self.device, self.stream = device, CopyStream(device)

    def begin(self, part: UInt8[Tensor, "n"], size: int) -> Copy:
        """Start to copy the `size` bytes of `part` to the device."""
        assert len(part) == size, (len(part), size)
        return self.stream.begin(size, lambda flat: flat.copy_(part, non_blocking=True))

    def keep(self, part: UInt8[Tensor, "n"]) -> UInt8[Tensor, "n"]:
        """The bytes in host memory, pinned if the device is a GPU."""
        on_gpu = self.device.type == "cuda"
        host = pinned(len(part), self.device) if on_gpu else torch.empty_like(part)
        return host.copy_(part)


def pinned(size: int, device: torch.device) -> UInt8[Tensor, "n"]:
    """New host memory that the driver has pinned, until the tensor and its views are gone.

    torch's own pinned memory is rounded up to a power of two: 512 MiB for a layer of 442 MB.

    Args:
        size: in bytes.
        device: the GPU whose copies read it.

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
    weakref.finalize(memory, _unpin, runtime, memory.ctypes.data, device).atexit = False
    return torch.from_numpy(memory)


def _unpin(runtime: Any, address: int, device: torch.device) -> None:
    torch.cuda.synchronize(device)  # a copy may still read it
    runtime.cudaHostUnregister(address)
