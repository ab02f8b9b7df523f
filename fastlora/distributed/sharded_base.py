"""The base of a model whose layers, embedding and head are kept as flat bytes.

The bytes are sharded over ranks, in host memory, or both. `ShardedLayers` and `ShardedMatrix` take
the places of the tuple of layers and of the two matrices in a base. The final norm is a tensor on
every rank.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils._pytree import tree_map

from fastlora.distributed.flat_layer import Layout, layout_of, pack, unpack
from fastlora.models.params import LayerParams
from fastlora.models.state import StateT
from fastlora.ops.dispatch import refuse_transforms
from fastlora.runtime.layer_fetching import (
    Fetch,
    FetchedLayers,
    FetchedMatrix,
    is_sharded,
    resident,
)


@runtime_checkable
class Source(Protocol):
    """Where bytes are kept, and how they reach the device."""

    device: torch.device
    """That computes."""
    outside_allocator: bool
    """Whether kept bytes are on the device, but not in torch's figures of allocated memory."""

    def begin(self, part: UInt8[Tensor, "n"], size: int) -> Fetch:
        """Start to bring all `size` bytes to the device, of which `part` is kept here."""
        ...

    def keep(self, part: UInt8[Tensor, "n"]) -> UInt8[Tensor, "n"]:
        """The bytes where they are kept."""
        ...


# Numbers of embedding and head among what can be fetched; layers have theirs.
EDGE_NUMBERS = {"embed_tokens": -1, "lm_head": -2}


class Shards:
    """What all parts of a sharded base share: the source, and which part this rank keeps."""

    def __init__(self, source: Source, rank: int = 0, ranks: int = 1, group: Any = None) -> None:
        """Nothing is kept yet.

        Args:
            source: where bytes are kept.
            rank: number of the part that is kept here.
            ranks: number of parts.
            group: the process group of the ranks that keep parts; None: this process keeps all.
        """
        self.source, self.rank, self.ranks, self.group = source, rank, ranks, group
        # Called with the number of what is fetched next (leading.py); None: all ranks know it.
        self.announce: Callable[[int], None] | None = None

    def begin(self, number: int, part: UInt8[Tensor, "n"], size: int) -> Fetch:
        """Start to bring bytes to the device: those of layer `number`, or of EDGE_NUMBERS."""
        if self.announce is not None:
            self.announce(number)
        return self.source.begin(part, size)

    def outside_allocator(self, parts: Sequence[UInt8[Tensor, "n"]]) -> int:
        """Bytes of kept parts on the device that torch's figures of allocated memory leave out."""
        return sum(x.nbytes for x in parts) if self.source.outside_allocator else 0

    def kept(self, layout: Layout, tree: Any) -> UInt8[Tensor, "n"]:
        """This rank's part of a tree's bytes, where it is kept."""
        return self.source.keep(pack(layout, tree, self.rank, self.ranks))


class ShardedMatrix(FetchedMatrix):
    """An embedding or head of which this rank keeps a part of the bytes."""

    def __init__(self, shards: Shards, key: str, layout: Layout, part: UInt8[Tensor, "n"]) -> None:
        """A matrix over bytes that are kept already.

        Args:
            shards: the source.
            key: "embed_tokens" or "lm_head".
            layout: of the matrix.
            part: that this rank keeps.
        """
        self.shards, self.key, self.layout, self.part = shards, key, layout, part

    @property
    def described(self) -> Tensor:
        """A tensor of the same shape and dtype on the device "meta"."""
        (slot,) = self.layout.slots
        return torch.empty(slot.shape, dtype=slot.dtype, device="meta")

    @property
    def outside_allocator(self) -> int:
        """Bytes on the device that torch's figures of allocated memory leave out."""
        return self.shards.outside_allocator([self.part])

    def fetch(self) -> Tensor:
        """The matrix on the device. If it is sharded over ranks, all must call this."""
        return unpack(self.layout, self.begin().wait())

    def begin(self) -> Fetch:
        """Start to bring the matrix to the device."""
        return self.shards.begin(EDGE_NUMBERS[self.key], self.part, self.layout.size)

    def remade(self, matrix: Tensor, key: str) -> "ShardedMatrix":
        """Another matrix, of which this rank keeps a part, for a key of the base."""
        return shard_matrix(self.shards, key, matrix)


class ShardedLayers(FetchedLayers):
    """Layers of which this rank keeps a part of the bytes."""

    def __init__(
        self,
        shards: Shards,
        layouts: Sequence[Layout],
        parts: Sequence[UInt8[Tensor, "n"]],
        overlay: Sequence[LayerParams] | None = None,
        prefetch: int = 1,
    ) -> None:
        """Layers over bytes that are kept already.

        Args:
            shards: the source.
            layouts: of each layer.
            parts: this rank's part of each layer.
            overlay: for each layer, projection -> its initial offset.
            prefetch: layers that are on their way while one computes; 0, 1 or 2.
        """
        super().__init__()
        self.shards, self.layouts, self.parts = shards, tuple(layouts), tuple(parts)
        self._overlay = tuple(overlay or ({} for _ in parts))
        self.prefetch = prefetch

    def __len__(self) -> int:
        """Number of layers."""
        return len(self.parts)

    def begin(self, i: int) -> Fetch:
        """Start to bring the bytes of layer i to the device."""
        return self.shards.begin(i, self.parts[i], self.layouts[i].size)

    def first(self, n: int) -> "ShardedLayers":
        """The first n layers, over the same bytes."""
        parts = self.shards, self.layouts[:n], self.parts[:n]
        return ShardedLayers(*parts, self._overlay[:n], self.prefetch)

    @property
    def collective(self) -> bool:
        """Whether every rank must fetch the same layers in the same order."""
        return self.shards.ranks > 1

    def tree(self, i: int, flat: UInt8[Tensor, "n"]) -> LayerParams:
        """The tensors of layer i as views of its bytes, with its initial offsets."""
        params = unpack(self.layouts[i], flat)
        return params | {
            name: {**params[name], "offset": offset} for name, offset in self._overlay[i].items()
        }

    @cached_property
    def described(self) -> tuple[LayerParams, ...]:
        """All layers with tensors on the device "meta", except initial offsets."""
        blank = {
            x.size: torch.empty(x.size, dtype=torch.uint8, device="meta") for x in self.layouts
        }
        return tuple(self.tree(i, blank[x.size]) for i, x in enumerate(self.layouts))

    @property
    def overlay(self) -> tuple[LayerParams, ...]:
        """For each layer projection -> its initial offset."""
        return self._overlay

    def with_overlay(self, overlay: Sequence[LayerParams]) -> "ShardedLayers":
        """The same bytes with other initial offsets."""
        return ShardedLayers(self.shards, self.layouts, self.parts, overlay, self.prefetch)

    def rebuilt(self, make: Callable[[int], LayerParams]) -> "ShardedLayers":
        """Layers made of `make(i)`, one at a time, of which each rank keeps its part."""
        return shard_layers(self.shards, len(self), make, self.prefetch)

    @property
    def kept_bytes(self) -> int:
        """Bytes that this rank keeps."""
        return sum(x.nbytes for x in self.parts)

    @property
    def outside_allocator(self) -> int:
        """Bytes on the device that torch's figures of allocated memory leave out."""
        return self.shards.outside_allocator(self.parts)

    def as_dtensors(self, mesh: Any) -> list[Any]:
        """The bytes of each layer as a one-dimensional uint8 DTensor, Shard(0), over a mesh.

        torch.distributed.checkpoint writes these, and reads them back on another number of ranks if
        that number divides the layouts' sizes by 256. After reading, synchronize the device and
        call a barrier: other ranks may copy out of this rank's part at any time.
        """
        from torch.distributed.tensor import DTensor, Shard  # noqa: PLC0415  0.4 s

        return [DTensor.from_local(x, mesh, [Shard(0)], run_check=False) for x in self.parts]


def shard_layers(
    shards: Shards, n: int, make: Callable[[int], LayerParams], prefetch: int = 1
) -> ShardedLayers:
    """n layers made by `make(i)`. Each is dropped after its part is kept."""
    layouts, parts = [], []
    for i in range(n):
        tree = make(i)
        layouts.append(layout_of(tree, shards.ranks))
        parts.append(shards.kept(layouts[-1], tree))
    return ShardedLayers(shards, layouts, parts, prefetch=prefetch)


def shard_matrix(shards: Shards, key: str, matrix: Tensor) -> ShardedMatrix:
    """An embedding or head of which each rank keeps its part."""
    layout = layout_of(matrix, shards.ranks)
    return ShardedMatrix(shards, key, layout, shards.kept(layout, matrix))


def gathered(model: StateT) -> StateT:
    """The model with its whole base on the device of every rank; the same object if it is there.

    All ranks that hold a part must call this. Each receives all of the base: its layers one at a
    time, so nothing else is on the device besides. The given model keeps its parts.

    Raises:
        RuntimeError: a torch.func transform is active.
    """
    refuse_transforms("fastlora.gathered")
    base: Any = model.base
    if not is_sharded(base):
        return model
    layers: Any = base["layers"]
    whole: Any = {key: resident(x) for key, x in base.items() if key != "layers"}
    whole["layers"] = tuple(tree_map(lambda x: x, layers[i]) for i in range(len(layers)))
    layers.release()
    return replace(model, base={key: whole[key] for key in base})
