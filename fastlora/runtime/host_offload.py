"""recompute="offload": what a layer needs again waits elsewhere, or is made again.

What a layer keeps waits for the backward pass in pinned host memory: its input, and where there is
time for the way (`recompute.offload_levels`) what its attention kept as well. The adapters'
matrices in the products' dtype (84 MB of an 8B model at rank 16) are cast again from the ones that
are trained.

Activations travel on a stream of their own, overlapped both ways: layer i's leave while layer i + 1
computes, and return while layer i + 1's backward pass runs. 1B shapes, 8,192 tokens: 32 MiB for an
input, about 0.6 ms over PCIe 5, against more than 1.5 ms of compute.

Nothing is allocated on that stream, and no memory is given back under it: a tensor on its way out
stays referenced until the compute stream has waited for its copy, one layer later. (With
Tensor.record_stream, and returns allocated on the copy stream, the allocator held 9.8 GiB where
"full" held 4.4; H100, 1B, torch 2.11.)
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from fastlora.ops.cast import copied

# Smaller ones are not worth a copy: attention's log-sum-exp, experts' choices. Bytes.
_LEAST = 2**20

Place = tuple[int, torch.Size, tuple[int, ...], torch.dtype]


class HostStash:
    """What the layers of one forward pass keep. Lives as long as its autograd graph."""

    def __init__(self, device: torch.device) -> None:
        """An empty stash with a copy stream of its own, of CUDA; the CPU's streams do nothing."""
        self.device = device
        self.streams: Any = torch.get_device_module(device)
        self.copying = self.streams.Stream()
        self.host: list[list[Tensor]] = []  # copies, by layer
        self.leaving: deque[tuple[int, Tensor, Any]] = deque()  # layer, and when its copy is done
        self.returning: dict[tuple[int, int], tuple[Tensor, Any]] = {}
        self.called: set[int] = set()  # layers whose return has begun once

    def run(
        self, layer: Callable[[Tensor], Tensor], x: Tensor, others: Any, copies: "Copies"
    ) -> Tensor:
        """layer(x), with what it saves for the backward pass replaced: activations by host copies,
        the adapter's matrices by word of how to make them.

        Args:
            layer: the rest of its arguments bound.
            x: its input.
            others: a tree of what it is bound to, which lives on anyway and stays.
            copies: the adapter's matrices among these.
        """
        # By address: autograd keeps `pack` as long as the graph, and with it whatever it refers to.
        stay = {
            t.untyped_storage().data_ptr() for t in tree_leaves(others) if isinstance(t, Tensor)
        }
        here, sent = len(self.host), dict[Place, tuple[int, int]]()
        self.host.append([])

        def pack(saved: Tensor) -> Tensor | tuple[Any, int]:
            if (which := copies.index(saved)) is not None:
                return copies, which
            if not self._travels(saved) or saved.untyped_storage().data_ptr() in stay:
                return saved
            place = _place(saved)
            if place not in sent:
                sent[place] = here, self._send(here, saved)
            return sent[place]

        with saved_tensors_hooks(pack, self._unpack):
            return layer(x)

    def _unpack(self, packed: Tensor | tuple[Any, int]) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        home, index = packed
        return home.again(index) if isinstance(home, Copies) else self._fetch(home, index)

    def _travels(self, x: Tensor) -> bool:
        """Large, and dense: a copy of a slice would lie otherwise than its original."""
        span = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
        return x.device == self.device and x.nbytes >= _LEAST and x.numel() == span

    def _send(self, layer: int, x: Tensor) -> int:
        pin = self.device.type == "cuda"
        copy = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, pin_memory=pin)
        self.copying.wait_stream(self.streams.current_stream())
        with self.streams.stream(self.copying):
            copy.copy_(x.detach(), non_blocking=True)
            done = self.copying.record_event()
        self._settle(layer - 1)
        self.leaving.append((layer, x.detach(), done))
        self.host[layer].append(copy)
        return len(self.host[layer]) - 1

    def _settle(self, layer: int) -> None:
        """Let go of what is leaving layers below this one, the compute stream behind it."""
        while self.leaving and self.leaving[0][0] < layer:
            *_, done = self.leaving.popleft()
            self.streams.current_stream().wait_event(done)

    def _fetch(self, layer: int, index: int) -> Tensor:
        self._settle(len(self.host))
        self._call(layer)
        back, done = self.returning.pop((layer, index), None) or self._return(layer, index)
        self.streams.current_stream().wait_event(done)
        below = next((i for i in reversed(range(layer)) if self.host[i]), None)
        if below is not None:
            self._call(below)
        return back

    def _call(self, layer: int) -> None:
        """Begin the return of all that a layer keeps; once, for a graph is seldom walked again."""
        if layer not in self.called:
            self.called.add(layer)
            for i in range(len(self.host[layer])):
                self.returning[layer, i] = self._return(layer, i)

    def _return(self, layer: int, index: int) -> tuple[Tensor, Any]:
        copy = self.host[layer][index]
        back = torch.empty_strided(copy.shape, copy.stride(), dtype=copy.dtype, device=self.device)
        self.copying.wait_stream(self.streams.current_stream())
        with self.streams.stream(self.copying):
            back.copy_(copy, non_blocking=True)
            return back, self.copying.record_event()

    def __del__(self) -> None:
        """A graph that is dropped before its backward pass: what is under way must arrive first."""
        for *_, done in (*self.leaving, *self.returning.values()):
            self.streams.current_stream().wait_event(done)


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


def _place(x: Tensor) -> Place:
    """Where a tensor lies and how: its transpose has the same address."""
    return x.data_ptr(), x.shape, x.stride(), x.dtype
