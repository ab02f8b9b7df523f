"""Dropout whose mask is a pure function of (key, row, column), so it is never stored.

Recomputed layers, compiled graphs, eager runs and vmapped runs draw the same mask from the same
key. There is no generator state to save or restore.

The hash is the two-round 32-bit mixing function 16-0x21f0aaad-15-0x735a2d97-15 (bias 0.107) of
C. Wellons' hash-prospector (https://github.com/skeeto/hash-prospector, public domain). We compute
in int32, whose products wrap modulo 2**32 as the algorithm requires. In int64 a mask takes five
times as long (torch 2.13, one core).

The hash takes most of the time of a masked product, so two elements share one: columns c and c + 64
of each block of 128 get 16 of its bits each. They are in different halves of a kernel's tile, so
no thread needs the bits of another.
"""

import math

import torch
from jaxtyping import Bool, Float, Int, Int32
from torch import Tensor

_WORD = 0xFFFFFFFF

# Columns c and c + HALF of each block of 2 * HALF columns share one hash.
HALF = 64


# `& _INDEX` changes no value. It keeps Inductor from turning the product of an arange into an index
# expression, whose integer type may be too narrow for the product (torch 2.11, triton 3.6).
_INDEX = 0x7FFFFFFF


def hash32(x: Int32[Tensor, "*n"]) -> Int32[Tensor, "*n"]:
    """Mix the bits of 32-bit words.

    torch's >> copies the sign bit of a negative int32; the masks clear these bits, which gives the
    unsigned shift of the algorithm.
    """
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x21F0AAAD
    x = (x ^ ((x >> 15) & 0x1FFFF)) * 0x735A2D97
    return x ^ ((x >> 15) & 0x1FFFF)


def low_word(x: Int[Tensor, "*n"]) -> Int32[Tensor, "*n"]:
    """The low 32 bits of an int64 tensor."""
    return (x & _WORD).to(torch.int32)


def fold(key: Int[Tensor, "*#k"], data: int | Int[Tensor, "*#k"]) -> Int[Tensor, "*#k"]:
    """Derive a new key from a key and a number, such as a layer's or a projection's index.

    The result is int64 in [0, 2**32). A tensor of numbers, each below 2**31, gives one key per
    number, and a tensor of keys one per key. Both 32-bit words of the key are used, so seeds that
    differ by 2**32 give different keys.
    """
    if isinstance(data, Tensor):
        data = data & _INDEX
    high = hash32(low_word((key >> 32) + 0x9E3779B9 * (data + 1)))
    return hash32(low_word(key) ^ high).to(torch.int64) & _WORD


def from_row(key: Int[Tensor, "*#k"], row: Int[Tensor, "*#k"] | None) -> Int[Tensor, "*#k"]:
    """A result of `fold` with the number of the mask's first row in its high word; None: row 0.

    If the rows of a batch run one by one, each needs its part of the batch's mask.
    """
    return key if row is None else key | (row << 32)


def key_and_row(key: Int[Tensor, "*k"]) -> tuple[Int[Tensor, "*k"], Int[Tensor, "*k"]]:
    """The inverse of `from_row`; the row is 0 in a key that is a result of `fold` itself."""
    return key & _WORD, key >> 32


def keep_mask(
    key: Int[Tensor, "*b"],
    rows: int,
    columns: int,
    p: float,
    device: torch.device,
    first_row: Int[Tensor, "*b"] | None = None,
) -> Bool[Tensor, "*b rows columns"]:
    """True with probability 1 - p, independently per element; p is rounded (`limit_of`).

    Several keys give one mask each.

    Args:
        key: only its low word is used.
        rows: number of rows.
        columns: number of columns.
        p: the share of elements that are False.
        device: of the result.
        first_row: the result is the part of a larger mask that begins at this row; None: 0.
    """
    blocks = -(-columns // (2 * HALF))
    bits = _random_bits(key, rows, HALF * blocks, device, first_row).unflatten(-1, (blocks, HALF))
    # Each half is compared as the high 16 bits of an int32. The bits below them do not change a
    # comparison with a multiple of 2**16.
    both = torch.stack((bits << 16, bits), -2).flatten(-3)
    return both[..., :columns] >= limit_of(p)


def limit_of(p: float) -> int:
    """The smallest int32 that `keep_mask` keeps, a multiple of 2**16.

    p is rounded to a multiple of 2**-16 and at most 1 - 2**-16.
    """
    return (min(round(p * 2**16), 2**16 - 1) - 2**15) << 16


def _random_bits(
    key: Int[Tensor, "*b"],
    rows: int,
    columns: int,
    device: torch.device,
    first_row: Int[Tensor, "*b"] | None,
) -> Int32[Tensor, "*b rows columns"]:
    """32 random bits for each element; the arguments are those of `keep_mask`."""
    number = torch.arange(rows, dtype=torch.int32, device=device)
    if first_row is not None:
        number = number + low_word(first_row)[..., None]
    row = hash32(number ^ low_word(key)[..., None])
    column = torch.arange(columns, dtype=torch.int32, device=device) & _INDEX
    return hash32(row[..., None] + column * (0x9E3779B1 - 2**32))


def uniform(
    key: Int[Tensor, "*b"],
    rows: int,
    columns: int,
    device: torch.device,
    first_row: Int[Tensor, "*b"] | None = None,
) -> Float[Tensor, "*b rows columns"]:
    """float32 numbers, uniform in [-1, 1]; the arguments are those of `keep_mask`."""
    return _random_bits(key, rows, columns, device, first_row).float() * 2.0**-31


def dropout(
    x: Float[Tensor, "*n d"],
    p: float,
    key: Int[Tensor, "*#k"] | None,
    first_row: Int[Tensor, "*#k"] | None = None,
) -> Float[Tensor, "*n d"]:
    """Zero a share p of x and scale the rest by 1 / (1 - p). Returns x if key is None or p is 0.

    The share is p rounded to 2**-16, the factor that of p itself. `key` and `first_row` are those
    of `keep_mask`. Several first rows are those of equal pieces of x's rows, in their order.
    """
    if key is None or p == 0.0:
        return x
    pieces = 1 if first_row is None else first_row.numel()
    if first_row is not None:
        key = key.expand(first_row.shape)
    rows, columns = math.prod(x.shape[:-1]) // pieces, x.shape[-1]
    keep = keep_mask(key, rows, columns, p, x.device, first_row).view(x.shape)
    return torch.where(keep, x / (1.0 - p), 0.0)


def row_dropout(
    x: Float[Tensor, "b t d"], p: float, keys: Int[Tensor, "b"], first_rows: Int[Tensor, "b"]
) -> Float[Tensor, "b t d"]:
    """`dropout` with a key and a first row for each row of a batch."""
    keep = keep_mask(keys, x.shape[1], x.shape[2], p, x.device, first_rows)
    return torch.where(keep, x / (1.0 - p), 0.0)
