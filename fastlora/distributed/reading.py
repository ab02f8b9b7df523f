"""Reads a sharded base: each rank reads the bytes that it keeps, and no others.

A rank reads the rows of each stored tensor that its part of a layer overlaps, so no tensor is whole
anywhere. Only matrices that are quantised now are read whole, because double quantisation subtracts
the mean of all scales of a matrix. Matrix k is read and quantised by rank k mod S, and its bytes
are sent to the ranks that keep them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import UInt8
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastlora.checkpoints.bnb_reading import described_weights, read_quantized
from fastlora.checkpoints.reading import CheckedBase, check_base, read_checked, with_loaded_dtype
from fastlora.checkpoints.tensors import Entry, RowReader, read_entries
from fastlora.distributed.flat_layer import Layout, as_bytes, layout_of, write
from fastlora.distributed.gathered_bytes import summed_parts
from fastlora.distributed.mesh import keeps_whole, shards_for
from fastlora.distributed.sharded_base import (
    ShardedLayers,
    ShardedMatrix,
    Shards,
    shard_matrix,
)
from fastlora.errors import CheckpointError, raise_problems
from fastlora.models.config import LlamaConfig
from fastlora.models.names import EDGE_WEIGHTS, NORM, base_tensors, layer_tensors
from fastlora.models.params import Base, LayerParams
from fastlora.ops.quant.dequantize import dequantize
from fastlora.ops.quant.weights import NESTED_BLOCK, NestedAbsmax, Weight4bit, WeightFP8, empty_form


class Stored(NamedTuple):
    """Where the elements of a tensor come from, and the dtype that they get."""

    entry: Entry
    dtype: torch.dtype | None  # None: the stored bytes, unchanged


# id of a tensor on the device "meta" -> the file's tensor, or a small tensor with its values. The
# tensors of `to_quantize` have none.
Sources = dict[int, Stored | Tensor]


def load_sharded(
    folder: Path, shard: Any, device: torch.device, **how: Any
) -> tuple[LlamaConfig, Base]:
    """`read_base` for a base that is kept as `load`'s argument `shard` says.

    Args:
        folder: as `read_base`.
        shard: not None, and without a `mesh.shard_problem`.
        device: that computes.
        how: dtype, rope_scaling and quantize of `read_base`.

    Raises:
        ValueError: a mixture of experts; and as `read_base`.
        CheckpointError: as `read_base`.
    """
    checked = check_base(folder, **how)
    if keeps_whole(shard, device, base_bytes(checked)):
        return read_checked(checked, device)
    if any(checked.config.sparse_layers):
        raise ValueError(
            f"shard={shard!r}: {checked.config.model_type} is a mixture of experts, whose layers"
            " would be gathered with all experts for every batch; load it with shard=None."
        )
    return read_sharded(checked, shards_for(shard, device, base_bytes(checked)))


def base_bytes(checked: CheckedBase) -> int:
    """Bytes of a whole base, from shapes alone."""
    total, in_4bit = 0, 0.516
    for name, shape in base_tensors(checked.config).items():
        numel = torch.Size(shape).numel()
        if name in checked.to_quantize:
            item = 1.0 if checked.precision == "fp8" else in_4bit
        elif name in checked.stored:
            item = 1.0 if checked.stored[name].format == "int8" else in_4bit
        else:
            item = checked.dtype_of(name).itemsize
        total += round(numel * item)
    return total


def read_sharded(checked: CheckedBase, shards: Shards) -> tuple[LlamaConfig, Base]:
    """Config and base of a folder, of whose layers, embedding and head this rank keeps its part.

    Args:
        checked: of `check_base`; no mixture of experts.
        shards: where parts are kept.

    Raises:
        CheckpointError: on all ranks, if any finds NaN or infinity in a matrix to be quantised.
    """
    reader = _Reader(checked, shards)
    with reader.rows:
        layers = [reader.layer(i) for i in range(checked.config.num_hidden_layers)]
        layouts, parts = [x for x, _ in layers], [x for _, x in layers]
        base: Any = {
            "embed_tokens": reader.matrix("embed_tokens"),
            "layers": ShardedLayers(shards, layouts, parts),
            "norm": reader.whole(NORM),
        }
        if not checked.config.tie_word_embeddings:
            base["lm_head"] = reader.matrix("lm_head")
    reader.raise_problems()
    return with_loaded_dtype(checked.config, base["embed_tokens"].described.dtype), base


class _Reader:
    """One load of a sharded base."""

    def __init__(self, checked: CheckedBase, shards: Shards) -> None:
        self.checked, self.shards, self.group = checked, shards, shards.group
        self.device = shards.source.device
        self.described = described_weights(checked.stored)
        self.rows = RowReader()
        self.dealt = 0  # matrices that were dealt to ranks so far
        self.problems: list[str] = []

    def layer(self, i: int) -> tuple[Layout, UInt8[Tensor, "n"]]:
        """(layout, this rank's part where it is kept) of layer i."""
        tree, sources, to_quantize = self._described_layer(i)
        fused = self.device.type == "cuda" and not (self.described or to_quantize)
        layout = layout_of(tree, self.shards.ranks, fused=fused)
        part = self._quantized(layout, tree, to_quantize) if to_quantize else None
        return layout, self._part(layout, tree, sources, part)

    def matrix(self, key: str) -> ShardedMatrix:
        """The embedding or the head, by its key in the base."""
        name = EDGE_WEIGHTS[key]
        if name in self.checked.stored:  # a quantised head is dequantised whole
            stored = {name: self.checked.stored[name]}
            dtype = self.checked.dtype_of(EDGE_WEIGHTS["embed_tokens"])
            whole = dequantize(read_quantized(stored, device=self.device)[name], dtype)
            return shard_matrix(self.shards, key, whole)
        tensor, source = self._described_tensor(name)
        layout = layout_of(tensor, self.shards.ranks)
        part = self._part(layout, tensor, {id(tensor): source}, None)
        return ShardedMatrix(self.shards, key, layout, part)

    def whole(self, name: str) -> Tensor:
        """A tensor that every rank has."""
        entry = self.checked.dense[name]
        read = read_entries({name: entry}, device=self.device, dtype=self.checked.dtype_of(name))
        return read[name]

    def raise_problems(self) -> None:
        """Raise on all ranks what any of them has found."""
        problems = [self.problems]
        if self.group is not None:
            problems = [[] for _ in range(self.shards.ranks)]
            dist.all_gather_object(problems, self.problems, group=self.group)
        found = [line for lines in problems for line in lines]
        raise_problems(CheckpointError, f"{self.checked.folder} cannot be quantised:", found)

    def _described_tensor(self, name: str) -> tuple[Tensor, Stored]:
        entry, dtype = self.checked.dense[name], self.checked.dtype_of(name)
        return torch.empty(entry.shape, dtype=dtype, device="meta"), Stored(entry, dtype)

    def _described_layer(self, i: int) -> tuple[LayerParams, Sources, dict[str, Any]]:
        """(the layer on the device "meta", its sources, the weights to be quantised by name)."""
        tree, sources, to_quantize = LayerParams(), Sources(), dict[str, Any]()
        for path, (name, shape) in layer_tensors(self.checked.config, i).items():
            if name in self.checked.to_quantize:
                leaf: Any = self._described_quantized(shape, self.checked.to_quantize[name])
                to_quantize[name] = leaf
            elif name in self.checked.stored:
                leaf, of_parts = self.described[name]
                sources |= {
                    k: x if isinstance(x, Tensor) else Stored(x, None) for k, x in of_parts.items()
                }
            else:
                leaf, source = self._described_tensor(name)
                sources[id(leaf)] = source
            if len(path) == 1:
                tree[path[0]] = leaf
            else:
                tree.setdefault(path[0], {})[path[1]] = leaf
        return tree, sources, to_quantize

    def _described_quantized(self, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
        """What `CheckedBase.quantized` makes of a matrix, on the device "meta"."""
        if self.checked.precision == "nf4":
            return described_nf4(shape, dtype)
        values = torch.empty(shape, dtype=torch.uint8, device="meta")
        scale = torch.empty(shape[0], dtype=torch.float32, device="meta")
        return WeightFP8(values, scale)

    def _part(
        self, layout: Layout, tree: Any, sources: Sources, part: UInt8[Tensor, "n"] | None
    ) -> UInt8[Tensor, "n"]:
        """This rank's part of a tree, read from its sources, where it is kept.

        Args:
            layout: of the tree.
            tree: on the device "meta".
            sources: of its tensors.
            part: the part with what was quantised already; None: nothing was.
        """
        size = layout.size // self.shards.ranks
        begin = self.shards.rank * size
        if part is None:
            part = torch.zeros(size, dtype=torch.uint8, device="cpu")
        leaves = dict(zip(layout.slot_of_leaf, tree_leaves(tree), strict=True))
        for number, leaf in leaves.items():
            source, slot = sources.get(id(leaf)), layout.slots[number]
            if isinstance(source, Tensor):
                write(part, begin, slot.begin, as_bytes(source))
            elif source is not None:
                self._read_into(part, begin, slot.begin, slot.nbytes, source)
        return self.shards.source.keep(part)

    def _read_into(
        self, part: UInt8[Tensor, "n"], begin: int, at: int, nbytes: int, source: Stored
    ) -> None:
        """Read the rows of a stored tensor, whose slot begins at byte `at`, that overlap `part`."""
        low, high = max(begin, at) - at, min(begin + len(part), at + nbytes) - at
        if low >= high:
            return
        rows = source.entry.shape[0] or 1
        row = self._row_bytes(source)
        first, last = low // row, min(-(-high // row), rows)
        read = self.rows.rows(source.entry, first, last)
        data = as_bytes(read if source.dtype is None else read.to(source.dtype))
        # The padding of bytes that are stored in a wider dtype is not part of the slot.
        write(part, begin, at + first * row, data[: nbytes - first * row])

    def _row_bytes(self, source: Stored) -> int:
        """Bytes of one row of a stored tensor in the dtype that it gets."""
        one = self.rows.rows(source.entry, 0, 0)  # reads nothing
        dtype = one.dtype if source.dtype is None else source.dtype
        per_row = 1
        for n in source.entry.shape[1:]:
            per_row *= n
        return per_row * dtype.itemsize

    def _quantized(
        self, layout: Layout, tree: LayerParams, to_quantize: Mapping[str, Any]
    ) -> UInt8[Tensor, "n"]:
        """This rank's part of a layer with the weights of `to_quantize`; all other bytes are 0."""
        whole = torch.zeros(layout.size, dtype=torch.uint8, device=self.device)
        pairs = zip(layout.slot_of_leaf, tree_leaves(tree), strict=True)
        places = {id(x): layout.slots[n] for n, x in pairs}
        for name, blank in to_quantize.items():
            mine = self.dealt % self.shards.ranks == self.shards.rank
            self.dealt += 1
            if not mine:
                continue
            try:
                weight = self.checked.quantized(name, self.whole(name))
            except CheckpointError as error:
                self.problems.append(str(error))  # the other ranks wait for this one's bytes
                continue
            for described, x in zip(tree_leaves(blank), tree_leaves(weight), strict=True):
                write(whole, 0, places[id(described)].begin, as_bytes(x))
        return whole if self.group is None else summed_parts(whole, self.group)


def described_nf4(shape: tuple[int, ...], dtype: torch.dtype) -> Weight4bit:
    """What `quantize_4bit` makes of a matrix, on the device "meta"."""
    new = lambda *n, dtype=torch.uint8: torch.empty(n, dtype=dtype, device="meta")
    rows, columns = shape
    numbers = rows * columns
    form = empty_form((rows, columns), dtype, "meta")
    blocks = -(-numbers // form.shape[2])
    wide = torch.float32
    absmax = NestedAbsmax(
        new(blocks),
        new(-(-blocks // NESTED_BLOCK), dtype=wide),
        new(256, dtype=wide),
        new(dtype=wide),
    )
    return Weight4bit(new(-(-numbers // 2)), new(16, dtype=wide), form, absmax)
