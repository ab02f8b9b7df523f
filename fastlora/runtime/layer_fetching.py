"""Layers that are brought to the device just before they run: from other ranks or from host memory.

A `LayerPass` serves one forward pass and its backward pass. It holds the tensors of the layer that
runs, and starts to fetch the next layer meanwhile: layer i + 1 in the forward pass, layer i - 1 in
the backward pass. Autograd keeps none of a layer's tensors. `saved_tensors_hooks` replace each by
its position in the layer's bytes (`Refetched`), and the backward pass fetches the layer again. The
layer's function is not changed: compiled, it is the graph of a model whose layers are on the
device.

torch.func refuses these hooks. Under its transforms all layers that ran stay on the device.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

LayerParams = dict[str, Any]

# The place of a tensor in a layer's bytes: offset in elements, shape, strides, dtype.
Place = tuple[Any, torch.Size, tuple[int, ...], torch.dtype]


@runtime_checkable
class Fetch(Protocol):
    """Bytes that are on their way to the device."""

    def wait(self) -> UInt8[Tensor, "n"]:
        """The bytes. The compute stream waits for them; the host does so on the CPU only."""
        ...


class FetchedMatrix(ABC):
    """An embedding or head that is not on the device, in the place of its tensor in a base."""

    outside_allocator: int = 0
    """Bytes on the device that torch's figures of allocated memory leave out."""

    @property
    @abstractmethod
    def described(self) -> Tensor:
        """A tensor of the same shape and dtype on the device "meta"."""

    @abstractmethod
    def fetch(self) -> Tensor:
        """The matrix on the device. Nothing keeps it."""

    @abstractmethod
    def remade(self, matrix: Tensor, key: str) -> "FetchedMatrix":
        """Another matrix, kept in the same way under this key of the base."""


class FetchedLayers(ABC, Sequence):
    """The layers of a base that are not on the device, in the place of its tuple of layers.

    Indexing fetches a layer, and keeps it until another layer or a forward pass is asked for. If
    the bytes come from other ranks, every rank must do so in the same order.
    """

    prefetch: int = 1
    """How many layers are on their way while one computes."""
    outside_allocator: int = 0
    """Bytes on the device that torch's figures of allocated memory leave out."""

    def __init__(self) -> None:
        """Layers of which none is fetched."""
        self._latest: tuple[int, LayerParams] | None = None

    @abstractmethod
    def begin(self, i: int) -> Fetch:
        """Start to fetch the bytes of layer i."""

    @abstractmethod
    def tree(self, i: int, flat: UInt8[Tensor, "n"]) -> LayerParams:
        """The tensors of layer i as views of its bytes."""

    @property
    @abstractmethod
    def described(self) -> tuple[LayerParams, ...]:
        """All layers with tensors on the device "meta", except initial offsets, which are real."""

    @property
    @abstractmethod
    def overlay(self) -> tuple[LayerParams, ...]:
        """For each layer tensors of its projections that are on the device: initial offsets."""

    @abstractmethod
    def with_overlay(self, overlay: Sequence[LayerParams]) -> "FetchedLayers":
        """The same layers with another overlay; empty dicts remove it."""

    @abstractmethod
    def rebuilt(self, make: Callable[[int], LayerParams]) -> "FetchedLayers":
        """Layers made of `make(i)`, one at a time, kept in the same way and without an overlay."""

    @property
    @abstractmethod
    def collective(self) -> bool:
        """Whether every rank must fetch the same layers in the same order."""

    @abstractmethod
    def first(self, n: int) -> "FetchedLayers":
        """The first n layers, over the same bytes."""

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            assert i.start is None and i.step is None, i
            return self.first(i.indices(len(self))[1])
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        i %= len(self)
        if self._latest is None or self._latest[0] != i:
            self.release()
            self._latest = i, self.tree(i, self.begin(i).wait())
        return self._latest[1]

    def release(self) -> None:
        """Drop the layer that indexing has kept."""
        self._latest = None


class LayerPass:
    """The layers of one forward pass and its backward pass. It lives as long as their graph."""

    def __init__(self, layers: FetchedLayers, *, cyclic: bool = False) -> None:
        """Nothing is fetched yet.

        Args:
            layers: of the model.
            cyclic: whether layer 0 follows the last layer, as in generation.
        """
        layers.release()
        self.layers, self.cyclic = layers, cyclic
        self.here: Any = None  # None, or (i, bytes, params) of the layer that is on the device
        self.coming: dict[int, Fetch] = {}
        self.fetches = 0
        self.most = 0  # layers on the device at once, those on their way included

    def params(self, i: int, step: int = 1) -> LayerParams:
        """The tensors of layer i.

        Args:
            i: the layer's number.
            step: direction of the layers that are needed next: 1, -1, or 0 if none is.
        """
        following = self._following(i, step)
        if self.here is None or self.here[0] != i:
            # First let go of the previous layer, so that its memory can receive the next one.
            self.here = None
            for k in [*self.coming]:
                if k not in (i, *following):  # the direction has changed
                    self.coming.pop(k).wait()
            flat = (self.coming.pop(i, None) or self._begin(i)).wait()
            self.here = i, flat, self.layers.tree(i, flat)
        for k in following:
            if k not in self.coming:
                self.coming[k] = self._begin(k)
        self.most = max(self.most, 1 + len(self.coming))
        return self.here[2]

    def _following(self, i: int, step: int) -> list[int]:
        """The layers that should be on their way while layer i runs."""
        n, ahead = len(self.layers), self.layers.prefetch if step else 0
        numbers = [i + step * k for k in range(1, ahead + 1)]
        if self.cyclic:
            return [k % n for k in numbers if k % n != i]
        return [k for k in numbers if 0 <= k < n]

    def _begin(self, i: int) -> Fetch:
        self.fetches += 1
        return self.layers.begin(i)

    def params_again(self, i: int) -> LayerParams:
        """The tensors of layer i, if it is not sure whether they are here.

        A checkpoint runs a layer in the forward pass, when they are, and in the backward pass.
        """
        return self.params(i, 0 if self.here is not None and self.here[0] == i else -1)

    def flat_again(self, i: int) -> UInt8[Tensor, "n"]:
        """The bytes of layer i in the backward pass."""
        self.params(i, -1)
        return self.here[1]

    def refetched(self, i: int) -> "Refetched":
        """The record that recognises layer i's tensors among those that autograd saves. The layer
        must be here."""
        assert self.here is not None and self.here[0] == i
        return Refetched(self, i, self.here[1].untyped_storage().data_ptr())

    def __del__(self) -> None:
        """Wait for fetches that were not used, so that their memory is not reused too early."""
        for fetch in self.coming.values():
            fetch.wait()


class Refetched(NamedTuple):
    """Replaces views of a layer's bytes by their places, and fetches the layer again for them."""

    layers: LayerPass
    layer: int
    address: int  # of the bytes in the forward pass; no reference to them is kept

    def place(self, saved: Tensor) -> Place | None:
        """The place of a tensor in the layer's bytes; None if it is not there."""
        if saved.untyped_storage().data_ptr() != self.address:
            return None
        return saved.storage_offset(), saved.shape, saved.stride(), saved.dtype

    def again(self, place: Place) -> Tensor:
        """The tensor at a place, fetched again."""
        offset, shape, stride, dtype = place
        flat = self.layers.flat_again(self.layer)
        return flat.view(dtype).as_strided(shape, stride, offset)

    def hooks(self) -> Any:
        """A context in which autograd saves places instead of the layer's tensors."""

        def pack(saved: Tensor) -> Tensor | Place:
            place = self.place(saved)
            return saved if place is None else place

        def unpack(packed: Tensor | Place) -> Tensor:
            return packed if isinstance(packed, Tensor) else self.again(packed)

        return saved_tensors_hooks(pack, unpack)


def open_pass(layers: Any) -> LayerPass | None:
    """The pass of a forward pass over layers that must be fetched; None if they are there.

    Args:
        layers: of the base. No annotation of a sequence: checkers of types would fetch an item.

    Raises:
        RuntimeError: inside the caller's own torch.compile.
    """
    if not isinstance(layers, FetchedLayers):
        return None
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "a sharded base does not run inside your own torch.compile, which would trace the"
            " transfers; its layers are compiled already (compile=True or 'auto')."
        )
    return LayerPass(layers)


def resident(matrix: Any) -> Tensor:
    """A matrix of the base on the device: `matrix` itself if it is a tensor."""
    return matrix.fetch() if isinstance(matrix, FetchedMatrix) else matrix


def with_resident_edges(base: Any) -> Any:
    """The base with embedding and head on the device; the same object if they are there already."""
    brought = {key: x.fetch() for key, x in base.items() if isinstance(x, FetchedMatrix)}
    return {**base, **brought} if brought else base


def with_edges_of(base: Any, like: Any) -> Any:
    """The base with embedding and head kept as those of `like` are."""
    kept = {
        key: like[key].remade(x, key)
        for key, x in base.items()
        if isinstance(like.get(key), FetchedMatrix) and isinstance(x, Tensor)
    }
    return {**base, **kept} if kept else base


def taken(params: LayerParams | Callable[[], LayerParams]) -> LayerParams:
    """A layer's params, fetched if `params` is a function."""
    return params if isinstance(params, dict) else params()


def described(base: Any) -> Any:
    """A base whose tensors that are elsewhere are replaced by tensors on the device "meta".

    For questions about shapes, dtypes and offsets, which need no transfer. The same object if all
    tensors are on the device.
    """
    changed = {
        k: x.described for k, x in base.items() if isinstance(x, FetchedMatrix | FetchedLayers)
    }
    return {**base, **changed} if changed else base


def bytes_outside_allocator(base: Any) -> int:
    """Bytes of a base on its device that torch's figures of allocated memory leave out."""
    return sum(
        x.outside_allocator for x in base.values() if isinstance(x, FetchedLayers | FetchedMatrix)
    )


def is_sharded(base: Any) -> bool:
    """Whether the layers of a base are fetched when they are needed."""
    return isinstance(base["layers"], FetchedLayers)


def is_collective(base: Any) -> bool:
    """Whether every rank must run the same passes over a base, because each holds a part."""
    return is_sharded(base) and base["layers"].collective
