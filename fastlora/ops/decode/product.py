"""The matrices of one decode product, copied side by side as the kernels read them.

Dense weights of one dtype and 4-bit weights are supported. linear.py has the product itself.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastlora.ops.dispatch import rank_tile
from fastlora.ops.quant.weights import (
    NestedAbsmax,
    Weight,
    Weight4bit,
    Weight8bit,
    WeightFP8,
    shape_of,
)

MAX_BATCH = 64
MAX_RANK = 512  # 256, and as much again for an initial offset


# What `low` holds where no kernel has written: float32's NaN with a payload that no arithmetic on a
# GPU returns (that is 0x7FFFFFFF).
EMPTY = 0x7FC0DEAD

# Copies of A x for one row. All programs read them, and one L2 slice answers a request in 1.3 ns:
# 25,000 requests for one copy took 40 us (H200).
COPIES = 32

# split_kernel: the most programs that share a tile, and the fewest rows of a tile. A x has as many
# parts as a tile has programs.
MOST_SPLITS, LEAST_ROWS = 4, 16


class Part(NamedTuple):
    """One matrix of a product: gain * (W x + scaling * B A x) + bias. None: without that term."""

    weight: Weight
    a: Float[Tensor, "r d_in"] | None = None
    b: Float[Tensor, "d_out r"] | None = None
    scaling: float = 1.0
    gain: Float[Tensor, "d_out"] | None = None
    bias: Float[Tensor, "d_out"] | None = None


class Product(NamedTuple):
    """The parts of one product as the kernels read them. n is the sum of the parts' d_out."""

    weights: tuple[Weight, ...]
    a: Float[Tensor, "parts*rank d_in"] | None  # each part's A, with rows of zeros up to `rank`
    b: Float[Tensor, "n rank"] | None
    scalings: tuple[float, ...]
    gain: Float[Tensor, "n"] | None  # float32
    bias: Float[Tensor, "n"] | None  # float32
    norm: Float[Tensor, "d_in"] | None  # RMSNorm's weight
    eps: float
    gated: bool
    gelu: bool  # the gate's activation is GELU's tanh form, and not SiLU
    # A x, written by the kernel (linear_kernel.py); None without low-rank terms.
    low: Int[Tensor, "words"] | None
    # Zeros between launches: how many programs of split_kernel have added to a tile of rows; None
    # if that kernel does not support the product.
    counts: Int[Tensor, "tiles"] | None
    launches: dict[Any, Any]  # of linear_launch.py: the parts that all launches of a kind share


def prepare_product(
    parts: Sequence[Part],
    b: int,
    *,
    norm: Float[Tensor, "d_in"] | None = None,
    eps: float = 0.0,
    gated: bool = False,
    gelu: bool = False,
) -> Product | None:
    """A product for `b` rows, or None if the kernels do not support it.

    Puts A, B, gains and biases side by side; weights are not copied. Supported are dense weights
    in float32, bfloat16 or float16 and 4-bit weights of one of these dtypes, all parts alike;
    adapters in the same dtype, of ranks up to 512; up to 64 rows. Synchronises with the device.

    Args:
        parts: one to three matrices of one input; two if gated.
        b: number of rows.
        norm: factor of an RMSNorm before the product, in the weights' dtype. With dense weights it
            may also be in float32; the normalised value is then multiplied before it is rounded.
        eps: of the RMSNorm.
        gated: whether the result is silu(first) * second.
        gelu: if gated, gelu(first) * second, with the tanh form of GELU.
    """
    weights = tuple(part.weight for part in parts)
    if not (_supports(weights) and 1 <= b <= MAX_BATCH):
        return None
    kind = _dtype(weights[0])
    factors = [x for part in parts for x in (part.a, part.b) if x is not None]
    if any(x.dtype != kind or x.ndim != 2 for x in factors):
        return None
    if gated and (len(parts) != 2 or shape_of(weights[0]) != shape_of(weights[1])):
        return None
    # The kernels of 4-bit weights read the norm in the dtype of x.
    if norm is not None and norm.dtype != kind and not isinstance(weights[0], Tensor):
        return None
    ranks = [part.a.shape[0] for part in parts if part.a is not None]
    if max(ranks, default=0) > MAX_RANK:
        return None
    a, matrix_b, low = _low_rank(parts, rank_tile(*ranks), b) if ranks else (None, None, None)
    ones = [(part.gain, 1.0, shape_of(w)[0]) for part, w in zip(parts, weights, strict=True)]
    zeros = [(part.bias, 0.0, shape_of(w)[0]) for part, w in zip(parts, weights, strict=True)]
    return Product(
        weights=weights,
        a=a,
        b=matrix_b,
        scalings=tuple(float(part.scaling) for part in parts),
        gain=_joined(ones, _device(weights[0])),
        bias=_joined(zeros, _device(weights[0])),
        norm=norm,
        eps=eps,
        gated=gated,
        gelu=gelu,
        low=low,
        counts=_counts(weights, b, gated),
        launches={},
    )


def _counts(weights: tuple[Weight, ...], b: int, gated: bool) -> Int[Tensor, "tiles"] | None:
    if b == 1 or gated or not isinstance(weights[0], Tensor):
        return None
    tiles = sum(-(-shape_of(w)[0] // LEAST_ROWS) for w in weights)
    return torch.zeros(tiles, dtype=torch.int32, device=weights[0].device)


def _supports(weights: tuple[Weight, ...]) -> bool:
    if len({shape_of(w)[1] for w in weights}) != 1 or len({_dtype(w) for w in weights}) != 1:
        return False
    if (
        any(isinstance(w, Weight8bit | WeightFP8) for w in weights)
        or len({type(w) for w in weights}) != 1
    ):
        return False
    if _dtype(weights[0]) not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    if isinstance(weights[0], Weight4bit):
        return _alike([w for w in weights if isinstance(w, Weight4bit)])
    return all(w.is_contiguous() for w in weights if isinstance(w, Tensor))


def _alike(weights: list[Weight4bit]) -> bool:
    """Whether one kernel can read these: blocks within rows, and equal levels and codes."""
    first, columns = weights[0], weights[0].form.shape[1]
    for w in weights:
        block = w.form.shape[2]
        if columns % block or block < 32 or block != first.form.shape[2]:
            return False
        if w.packed.data_ptr() % 16:  # one row's kernel reads words of 32 bits
            return False
        if type(w.absmax) is not type(first.absmax) or not torch.equal(w.levels, first.levels):
            return False
        if isinstance(w.absmax, NestedAbsmax) and isinstance(first.absmax, NestedAbsmax):
            if not torch.equal(w.absmax.code, first.absmax.code):
                return False
    return True


def _dtype(weight: Weight) -> torch.dtype:
    if isinstance(weight, Weight4bit):
        return weight.form.dtype
    return weight.scale.dtype if isinstance(weight, Weight8bit | WeightFP8) else weight.dtype


def _device(weight: Weight) -> torch.device:
    return weight.device if isinstance(weight, Tensor) else weight[0].device


def _low_rank(
    parts: Sequence[Part], rank: int, b: int
) -> tuple[Float[Tensor, "rows d_in"], Float[Tensor, "n rank"], Int[Tensor, "words"]]:
    """All A's and all B's with zeros up to `rank`, and a buffer for A x."""
    like = next(part.a for part in parts if part.a is not None)
    sizes = [shape_of(part.weight)[0] for part in parts]
    rows = [_padded(part.a, like, (rank, like.shape[1])) for part in parts]
    columns = [_padded(part.b, like, (n, rank)) for part, n in zip(parts, sizes, strict=True)]
    a, matrix_b = _one_after_the_other(rows), _one_after_the_other(columns)
    numbers = len(parts) * rank * max(batch_tile(b) * MOST_SPLITS, COPIES)
    low = torch.full((numbers,), EMPTY, dtype=torch.int32, device=like.device)
    return a, matrix_b, low


def _one_after_the_other(matrices: list[Tensor]) -> Float[Tensor, "_ _"]:
    # Generation prepares some hundred products before its first token: copies are avoided.
    if len(matrices) == 1 and matrices[0].is_contiguous():
        return matrices[0]
    return torch.cat(matrices)


def _padded(x: Float[Tensor, "_ _"] | None, like: Tensor, shape: tuple[int, int]) -> Tensor:
    """x with zeros behind its rows or columns up to `shape`; None counts as empty."""
    if x is not None and x.shape == shape:
        return x
    padded = like.new_zeros(shape)
    if x is not None:
        padded[: x.shape[0], : x.shape[1]] = x
    return padded


def batch_tile(b: int) -> int:
    """Rows that the kernels compute for a batch: 1, or a power of two that is at least 16."""
    return 1 if b == 1 else rank_tile(b)


def _joined(
    vectors: list[tuple[Tensor | None, float, int]], device: torch.device
) -> Float[Tensor, "n"] | None:
    """The vectors one after the other in float32; None if there are none."""
    if all(v is None for v, _, _ in vectors):
        return None
    filled = [
        torch.full((n,), fill, dtype=torch.float32, device=device) if v is None else v.float()
        for v, fill, n in vectors
    ]
    return torch.cat(filled)
