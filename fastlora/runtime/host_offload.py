"""HostStash: activations wait for the backward pass in pinned host memory (recompute="offload").

A layer's input is sent to the host, and for as many layers as the transfer has time for
(`levels.offload_levels`) also the activations of its attention. The adapter's matrices in the
compute dtype (84 MB for an 8B model at rank 16) are not sent but cast again from the trained ones.

Activations are copied on a separate stream, overlapped with compute in both directions: those of
layer i are sent while layer i + 1 computes, and return during the backward pass of layer i + 1. For
1B shapes and 8,192 tokens an input is 32 MiB, about 0.6 ms over PCIe 5, against more than 1.5 ms of
compute.

No memory is allocated on the copy stream or freed while it is in use: a tensor that is being sent
stays referenced until the compute stream has waited for its copy, one layer later. With
Tensor.record_stream, and returning tensors allocated on the copy stream, the allocator held 9.8 GiB
where "full" held 4.4 (H100, 1B, torch 2.11).
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from fastlora.ops.cast import copied
from fastlora.runtime.copy_stream import Copy, CopyStream
from fastlora.runtime.layer_fetching import Place as WeightPlace
from fastlora.runtime.layer_fetching import Refetched
from fastlora.runtime.pinned_buffers import pinned_like

# Smaller tensors stay on the device: attention's log-sum-exp, the choice of experts.
_MIN_BYTES = 2**20

# Address, shape, strides and dtype: two live tensors with the same ones hold the same values.
Place = tuple[int, torch.Size, tuple[int, ...], torch.dtype]


class HostStash:
    """The kept activations of one forward pass. It lives as long as its autograd graph."""

    def __init__(self, device: torch.device) -> None:
        """Make an empty stash with a new copy stream.

        Args:
            device: of the activations. On the CPU streams do nothing.
        """
        self.stream = CopyStream(device)
        self.host: list[list[Tensor]] = []  # copies, by layer
        self.leaving: deque[tuple[int, Tensor, Copy]] = deque()  # (layer, tensor, its copy)
        self.returning: dict[tuple[int, int], Copy] = {}  # by (layer, index): on their way back
        self.called: set[int] = set()  # layers whose tensors have been called back once

    def run(
        self,
        layer: Callable[[Tensor], Any],
        x: Tensor,
        others: Any,
        copies: "Copies",
        weights: Refetched | None = None,
    ) -> Any:
        """layer(x), with the tensors that autograd saves replaced.

        Activations are replaced by host copies, cast matrices of the adapter by (copies, index),
        from which they are cast again, and fetched weights by (weights, place), from which they are
        fetched again. All three are here because only the innermost saved_tensors_hooks act.

        Args:
            layer: a function of x only.
            x: its input.
            others: a tree of the layer's other arguments. Their tensors stay on the device, because
                the caller keeps them anyway.
            copies: the adapter's cast matrices among these.
            weights: the layer's tensors, if they are fetched; None: they stay on the device.
        """
        # By address and not by reference: autograd keeps `pack`, and all that it refers to, as long
        # as the graph.
        stay = {
            t.untyped_storage().data_ptr() for t in tree_leaves(others) if isinstance(t, Tensor)
        }
        here, sent = len(self.host), dict[Place, tuple[int, int]]()
        self.host.append([])

        def pack(saved: Tensor) -> Tensor | tuple[Any, int | WeightPlace]:
            if weights is not None and (place := weights.place(saved)) is not None:
                return weights, place
            if (which := copies.index(saved)) is not None:
                return copies, which
            if not self._is_worth_sending(saved) or saved.untyped_storage().data_ptr() in stay:
                return saved
            place = _place(saved)
            if place not in sent:
                sent[place] = here, self._send(here, saved)
            return sent[place]

        with saved_tensors_hooks(pack, self._unpack):
            return layer(x)

    def _unpack(self, packed: Tensor | tuple[Any, Any]) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        home, index = packed
        is_activation = isinstance(home, int)
        return self._fetch(home, index) if is_activation else home.again(index)

    def _is_worth_sending(self, x: Tensor) -> bool:
        """Whether x is large and dense. A slice's copy would have other strides than the slice."""
        # A dense tensor has as many elements as the memory between its first and its last.
        span = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
        return x.device == self.stream.device and x.nbytes >= _MIN_BYTES and x.numel() == span

    def _send(self, layer: int, x: Tensor) -> int:
        x = x.detach()
        copy = self.stream.fill(pinned_like(x), lambda host: host.copy_(x, non_blocking=True))
        self._release_sent(layer - 1)
        self.leaving.append((layer, x, copy))
        self.host[layer].append(copy.target)
        return len(self.host[layer]) - 1

    def _release_sent(self, layer: int) -> None:
        """Drop sent tensors of the layers before this one, after the compute stream has waited."""
        while self.leaving and self.leaving[0][0] < layer:
            *_, copy = self.leaving.popleft()
            copy.wait()

    def _fetch(self, layer: int, index: int) -> Tensor:
        self._release_sent(len(self.host))
        self._call_back(layer)
        copy = self.returning.pop((layer, index), None) or self._return(layer, index)
        back = copy.wait()
        # Start on the next layer of the backward pass while this one computes.
        below = next((i for i in reversed(range(layer)) if self.host[i]), None)
        if below is not None:
            self._call_back(below)
        return back

    def _call_back(self, layer: int) -> None:
        """Start copying all of a layer's tensors back, once per graph.

        A second backward pass through the same graph copies each tensor when it is needed.
        """
        if layer not in self.called:
            self.called.add(layer)
            for i in range(len(self.host[layer])):
                self.returning[layer, i] = self._return(layer, i)

    def _return(self, layer: int, index: int) -> Copy:
        host = self.host[layer][index]
        device = self.stream.device
        back = torch.empty_strided(host.shape, host.stride(), dtype=host.dtype, device=device)
        return self.stream.fill(back, lambda back: back.copy_(host, non_blocking=True))

    def __del__(self) -> None:
        """Wait for copies in flight, in case the graph is dropped before its backward pass."""
        for copy in (*(copy for *_, copy in self.leaving), *self.returning.values()):
            copy.wait()


class Copies:
    """A layer's adapter matrices in the compute dtype, recognised by address and cast again."""

    def __init__(self, trained: Sequence[Tensor], copies: Sequence[Tensor]) -> None:
        """Remember the addresses of the copies. No reference to them is kept.

        Args:
            trained: the matrices in the dtype in which they are trained.
            copies: the same matrices, cast. Those that needed no cast are left to autograd.
        """
        pairs = [(m, c) for m, c in zip(trained, copies, strict=True) if m is not c]
        self.trained = [m.detach() for m, _ in pairs]
        self.versions = [m._version for m in self.trained]
        self.places = {_place(c): i for i, (_, c) in enumerate(pairs)}
        self.dtype = pairs[0][1].dtype if pairs else torch.float32
        self.made: dict[int, Tensor] = {}

    def index(self, saved: Tensor) -> int | None:
        """The number of the copy that a tensor is, or None."""
        return self.places.get(_place(saved))

    def again(self, index: int) -> Tensor:
        """Make a copy again. All are made in one launch, and each is handed out once.

        Raises:
            RuntimeError: a trained matrix was written to since the forward pass.
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
    """A tensor's address and layout. The address alone is not enough: x.t() has the same."""
    return x.data_ptr(), x.shape, x.stride(), x.dtype
