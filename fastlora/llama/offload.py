"""recompute="offload": layer inputs wait for the backward pass in pinned host memory.

Overlapped both ways on a stream of its own: layer i's input leaves while layer i computes, and
returns while layer i + 1's backward pass runs. 1B shapes, 8,192 tokens: 32 MiB a layer, about
0.6 ms over PCIe 5, against more than 1.5 ms of compute.

Nothing is allocated on that stream, and no memory is given back under it: a tensor on its way out
stays referenced until the compute stream has waited for its copy, one layer later. (With
Tensor.record_stream, and returns allocated on the copy stream, the allocator held 9.8 GiB where
"full" held 4.4; H100, 1B, torch 2.11.)
"""

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class HostStash:
    """The layer inputs of one forward pass. Lives as long as its autograd graph."""

    def __init__(self) -> None:
        """An empty stash with a copy stream of its own."""
        self.stream = torch.cuda.Stream()
        self.host: list[Tensor] = []  # pinned copies, one per layer
        self.leaving: deque[tuple[Tensor, torch.Event]] = deque()  # and when each copy is done
        self.returning: dict[int, tuple[Tensor, torch.Event]] = {}

    def run(self, layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """layer(x), with x replaced by its host copy among the tensors saved for backward."""
        # By address: autograd keeps `pack` as long as the graph, and with it whatever it refers to.
        address, shape = x.data_ptr(), x.shape
        index: int | None = None

        def pack(saved: Tensor) -> Tensor | int:
            nonlocal index
            if saved.data_ptr() != address or saved.shape != shape:
                return saved
            index = self._send(saved) if index is None else index
            return index

        with saved_tensors_hooks(pack, self._unpack):
            return layer(x)

    def _unpack(self, packed: Tensor | int) -> Tensor:
        return self._fetch(packed) if isinstance(packed, int) else packed

    def _send(self, x: Tensor) -> int:
        copy = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            copy.copy_(x.detach(), non_blocking=True)
            done = self.stream.record_event()
        self._settle(1)
        self.leaving.append((x.detach(), done))
        self.host.append(copy)
        return len(self.host) - 1

    def _settle(self, left: int) -> None:
        """Let go of all but `left` of what is leaving, once the compute stream is behind it."""
        while len(self.leaving) > left:
            _, done = self.leaving.popleft()
            torch.cuda.current_stream().wait_event(done)

    def _fetch(self, index: int) -> Tensor:
        self._settle(0)
        back, done = self.returning.pop(index, None) or self._start_return(index)
        torch.cuda.current_stream().wait_event(done)
        if index > 0 and index - 1 not in self.returning:
            self.returning[index - 1] = self._start_return(index - 1)
        return back

    def _start_return(self, index: int) -> tuple[Tensor, torch.Event]:
        back = torch.empty_like(self.host[index], device="cuda")
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            back.copy_(self.host[index], non_blocking=True)
            return back, self.stream.record_event()

    def __del__(self) -> None:
        """A graph that is dropped before its backward pass: what is under way must arrive first."""
        for _, done in (*self.leaving, *self.returning.values()):
            torch.cuda.current_stream().wait_event(done)
