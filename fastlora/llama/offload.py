"""recompute="offload": what a layer needs again waits elsewhere, or is made again.

Layer inputs wait for the backward pass in pinned host memory; the adapters' matrices in the
products' dtype (84 MB of an 8B model at rank 16) are cast again from the ones that are trained.

Inputs travel on a stream of their own, overlapped both ways: layer i's leaves while layer i
computes, and returns while layer i + 1's backward pass runs. 1B shapes, 8,192 tokens: 32 MiB a
layer, about 0.6 ms over PCIe 5, against more than 1.5 ms of compute.

Nothing is allocated on that stream, and no memory is given back under it: a tensor on its way out
stays referenced until the compute stream has waited for its copy, one layer later. (With
Tensor.record_stream, and returns allocated on the copy stream, the allocator held 9.8 GiB where
"full" held 4.4; H100, 1B, torch 2.11.)
"""

from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from fastlora.ops.cast import copied


class HostStash:
    """The layer inputs of one forward pass. Lives as long as its autograd graph."""

    def __init__(self) -> None:
        """An empty stash with a copy stream of its own."""
        self.stream = torch.cuda.Stream()
        self.host: list[Tensor] = []  # pinned copies, one per layer
        self.leaving: deque[tuple[Tensor, torch.Event]] = deque()  # and when each copy is done
        self.returning: dict[int, tuple[Tensor, torch.Event]] = {}

    def run(self, layer: Callable[[Tensor], Tensor], x: Tensor, copies: "Copies") -> Tensor:
        """layer(x), with x replaced by its host copy among the tensors saved for backward, and the
        adapter's matrices by word of how to make them."""
        # By address: autograd keeps `pack` as long as the graph, and with it whatever it refers to.
        address, shape = x.data_ptr(), x.shape
        index: int | None = None

        def pack(saved: Tensor) -> Tensor | int | tuple["Copies", int]:
            nonlocal index
            if (which := copies.index(saved)) is not None:
                return copies, which
            if saved.data_ptr() != address or saved.shape != shape:
                return saved
            index = self._send(saved) if index is None else index
            return index

        with saved_tensors_hooks(pack, self._unpack):
            return layer(x)

    def _unpack(self, packed: Tensor | int | tuple["Copies", int]) -> Tensor:
        if isinstance(packed, tuple):
            return packed[0].again(packed[1])
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


class Copies:
    """A layer's matrices in the products' dtype: found again by address, made again by a cast."""

    def __init__(self, trained: Sequence[Tensor], copies: Sequence[Tensor]) -> None:
        """No reference to the copies is kept.

        Args:
            trained: the matrices in their own dtype.
            copies: the same, cast; those that are no copies are left to autograd.
        """
        pairs = [(m, c) for m, c in zip(trained, copies, strict=True) if m is not c]
        self.trained = [m.detach() for m, _ in pairs]
        self.versions = [m._version for m in self.trained]
        self.places = {_place(c): i for i, (_, c) in enumerate(pairs)}
        self.dtype = pairs[0][1].dtype if pairs else torch.float32
        self.made: dict[int, Tensor] = {}

    def index(self, saved: Tensor) -> int | None:
        """Which of the copies a tensor is, or None."""
        return self.places.get(_place(saved))

    def again(self, index: int) -> Tensor:
        """That copy; all are made in one launch, and each is given out once.

        Raises:
            RuntimeError: if what they are made from was written to since.
        """
        if index not in self.made:
            if self.versions != [m._version for m in self.trained]:
                raise RuntimeError(
                    "the adapter was written to between the forward and the backward pass; with"
                    ' recompute="offload" its matrices are read again there.'
                )
            self.made = dict(enumerate(copied(self.trained, [self.dtype] * len(self.trained))))
        return self.made.pop(index)


def _place(x: Tensor) -> tuple:
    """Where a tensor lies and how: its transpose has the same address."""
    return x.data_ptr(), x.shape, x.stride(), x.dtype
