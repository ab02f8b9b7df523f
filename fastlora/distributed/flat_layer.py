"""A layer as one run of bytes: the place of each tensor, and conversions in both directions.

Tensors follow each other, each at a multiple of 256 bytes, so weights in 4 bits, their scales and
norms travel in one transfer. The tensors of a layer are views of the bytes that were received:
nothing is copied in or out. The total is a multiple of 256 times the number of ranks; rank r holds
the r-th part.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from fastlora.models.fused_qkv import QKV, fused_qkv

ALIGN = 256  # bytes; the widest load of a kernel is 16, and 128 bytes are a line of the cache


@dataclass(frozen=True, slots=True)
class Slot:
    """One tensor."""

    begin: int  # its first byte
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Layout:
    """The slots of a tree's tensors. Leaves that are one tensor share a slot."""

    slots: tuple[Slot, ...]
    slot_of_leaf: tuple[int, ...]
    structure: TreeSpec
    size: int  # bytes, with padding


def layout_of(tree: Any, ranks: int = 1, *, fused: bool | None = None) -> Layout:
    """The layout of a tree of tensors, which may be on the device "meta".

    q, k and v are side by side only if `fused`, because compiled layers then compute their joint
    gradient in one product (models/fused_qkv.py), which rounds differently.

    Args:
        tree: of tensors.
        ranks: number of parts.
        fused: whether q, k and v are one matrix; None: if they are in the tree.
    """
    leaves, structure = tree_flatten(tree)
    distinct = {id(x): x for x in leaves}
    if fused is None:
        fused = isinstance(tree, dict) and "q_proj" in tree and fused_qkv(tree) is not None
    together = [id(tree[name]["weight"]) for name in QKV] if fused else []
    # In reversed order q, k and v are never adjacent by chance. `fused_qkv` would take them for one
    # matrix if they were.
    order = [*together, *(k for k in reversed(distinct) if k not in together)]
    slots, end = dict[int, Slot](), 0
    for key in order:
        x = distinct[key]
        slots[key] = Slot(end, tuple(x.shape), x.dtype)
        end += slots[key].nbytes
        if key not in together[:-1]:
            end = _up(end, ALIGN)
    numbers = {key: i for i, key in enumerate(order)}
    places = tuple(numbers[id(x)] for x in leaves)
    return Layout(tuple(slots.values()), places, structure, _up(max(end, 1), ALIGN * ranks))


def _up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def pack(layout: Layout, tree: Any, part: int = 0, parts: int = 1) -> UInt8[Tensor, "n"]:
    """The bytes of one part of a tree, a new tensor on the device of the tree's tensors."""
    leaves = tree_flatten(tree)[0]
    size = layout.size // parts
    begin = part * size
    out = torch.zeros(size, dtype=torch.uint8, device=leaves[0].device)
    tensors = dict(zip(layout.slot_of_leaf, leaves, strict=True))
    for number, slot in enumerate(layout.slots):
        write(out, begin, slot.begin, as_bytes(tensors[number]))
    return out


def as_bytes(x: Tensor) -> UInt8[Tensor, "n"]:
    """The elements of a tensor as bytes, without a copy if it is contiguous."""
    return x.detach().contiguous().reshape(-1).view(torch.uint8)


def write(out: UInt8[Tensor, "n"], begin: int, at: int, data: UInt8[Tensor, "m"]) -> None:
    """Write `data`, whose first byte is number `at`, to `out`, whose first byte is number `begin`.

    Bytes outside of `out` are left out.
    """
    low, high = max(begin, at), min(begin + len(out), at + len(data))
    if low < high:
        out[low - begin : high - begin] = data[low - at : high - at].to(out.device)


def unpack(layout: Layout, flat: UInt8[Tensor, "n"]) -> Any:
    """The tree over its bytes. All tensors are views of `flat`."""
    typed = {dtype: flat.view(dtype) for dtype in {slot.dtype for slot in layout.slots}}
    tensors = [
        typed[x.dtype].as_strided(x.shape, _strides(x.shape), x.begin // x.dtype.itemsize)
        for x in layout.slots
    ]
    return tree_unflatten([tensors[i] for i in layout.slot_of_leaf], layout.structure)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a contiguous tensor, as torch gives them to an empty one too."""
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= max(n, 1)
    return tuple(reversed(strides))
