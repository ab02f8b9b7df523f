"""Launches the kernels of `decode_product`, with tiles measured on one H200."""

from typing import Any, NamedTuple

import torch
import triton
from jaxtyping import Float, Int
from torch import Tensor

from fastlora.ops.decode.linear_kernel import matrix_kernel, vector_kernel
from fastlora.ops.decode.packed_matrix_kernel import packed_matrix_kernel
from fastlora.ops.decode.packed_mma_kernel import packed_mma_kernel
from fastlora.ops.decode.packed_mma_ptx import READ, READ_FLOATS, READ_NUMBERS, fill, step
from fastlora.ops.decode.packed_ptx import DOT8, LOAD8
from fastlora.ops.decode.packed_vector_kernel import packed_vector_kernel
from fastlora.ops.decode.product import COPIES, EMPTY, MOST_SPLITS, Product, batch_tile
from fastlora.ops.decode.split_kernel import split_kernel
from fastlora.ops.dispatch import precision
from fastlora.ops.launch import launch, pdl_options
from fastlora.ops.quant.dequantize_kernel import _TRITON
from fastlora.ops.quant.levels_ptx import SHUFFLE, TABLE
from fastlora.ops.quant.weights import NestedAbsmax, Weight, Weight4bit, shape_of


class Tile(NamedTuple):
    """Rows and columns of W for one program and one step, warps, and pipeline stages."""

    rows: int
    columns: int
    warps: int
    stages: int = 1
    # One row of x and 4-bit weights only: packed_mma_kernel, whose rows are a multiple of 16; its
    # stages are the groups of blocks that it reads in advance.
    mma: bool = False
    # 2 to 64 rows and dense weights only: programs of split_kernel that share a tile.
    splits: int = 1
    # Most registers of a thread; 0: as many as the compiler takes.
    registers: int = 0


# Beside one row of x and 4-bit weights: rows of A for one program, and columns that each of its
# warps reads at once. Other programs wait for A x, so a program reads one row in few steps.
_A_ROWS, _A_COLUMNS = 1, 1024

# EMPTY is stored in blocks of this many elements, by different programs.
_CLEARED = 1024


def choose_tile(product: Product, x: Float[Tensor, "b d_in"]) -> Tile:
    """The tile for a product of x.

    Microseconds for one launch with r = 16, for 1B's and 8B's shapes (H200, triton 3.6,
    scripts/bench/kernels/decode_linear.py):

                        qkv             o               gate and up     down
        1 row           4.9   16.9      3.9    9.8      21.7  61.3       9.7  30.4
        1 row, NF4            10.0             6.4            36.3             19.0
        32 rows         10.8  21.4      7.7   14.0      21.5  64.8      14.4  35.4
        32 rows, NF4          54.4            36.6            98.8            100.0
    """
    columns, several = shape_of(product.weights[0])[1], len(product.weights) > 1
    if isinstance(product.weights[0], Weight4bit):
        if x.shape[0] > 1:
            return Tile(64, 128, 8, 3)
        # It rounds x * norm before it divides by the root mean square, which float16 may not hold.
        overflows = product.norm is not None and x.dtype == torch.float16
        # The interpreter knows no inline PTX.
        if x.is_cuda and not overflows and mma_supports(x, product):
            if several:
                return Tile(16, 1024, 4, 1, mma=True, registers=128)
            return Tile(16, 1024, 8 if columns > 4096 else 4, 2, mma=True)
        return Tile(8, 2048, 4)
    if x.shape[0] > 1:
        return _tile_of_rows(product, columns, several)
    if product.gated:
        return Tile(4, 1024, 2)
    return Tile(8, 1024, 4) if several or 2048 < columns <= 4096 else Tile(4, 2048, 4)


def _tile_of_rows(product: Product, columns: int, several: bool) -> Tile:
    """The tile of several rows and dense weights."""
    # A head has a tile of rows for every multiprocessor, and more.
    if product.counts is None or shape_of(product.weights[0])[0] > 16384:
        return Tile(64, 64, 4, 4 if product.gated and columns >= 4096 else 6)
    if several:
        return Tile(64, 64, 4, 6, splits=4)
    return Tile(64, 128, 4, 4, splits=4 if 4096 < columns <= 8192 else 2)


class _Launch(NamedTuple):
    """What all launches of one product with the same arguments have in common."""

    kernel: Any
    programs: int
    weights: list[Tensor]
    numbers: list[Any]  # eps and scalings
    sums: int  # elements that the programs of split_kernel share
    fixed: dict[str, Any]  # compiled into the kernel


def launch_product(
    x: Float[Tensor, "b d_in"],
    product: Product,
    residual: Float[Tensor, "b d_out"] | None,
    clear: Int[Tensor, "words"] | None,
    tile: Tile | None = None,
    pdl: bool | None = None,
) -> tuple[Float[Tensor, "b _"], ...]:
    """One launch on the current stream; see `decode_product`.

    Args:
        x: contiguous.
        product: what to compute.
        residual: contiguous, or None.
        clear: filled with EMPTY.
        tile: None: `choose_tile`'s.
        pdl: whether the kernel may start before the one before it ends; None: if the GPU can.
    """
    b, outputs = x.shape[0], [w.shape[0] for w in map(_form, product.weights)]
    outputs = outputs[:1] if product.gated else outputs
    assert x.is_contiguous() and (residual is None or residual.is_contiguous())
    assert product.low is None or clear is not product.low, "a launch must not clear its own low"
    cleared = 0 if clear is None else clear.numel()
    # Computed once: the host needs longer for a launch than the GPU.
    key = b, x.dtype, x.data_ptr() % 16, residual is None, cleared, tile, pdl
    if key not in product.launches:
        product.launches[key] = _launch(x, product, residual is not None, cleared, tile, pdl)
    made: _Launch = product.launches[key]
    out = torch.empty(b * sum(outputs), dtype=x.dtype, device=x.device)
    tensors = [product.a, product.b, product.gain, product.bias, residual, out, product.low, clear]
    arguments: list[Any] = [x, x if product.norm is None else product.norm, *made.weights]
    arguments += [x if t is None else t for t in tensors]  # absent tensors are never read
    if made.sums:
        sums = torch.empty(made.sums, dtype=torch.float32, device=x.device)
        arguments += [sums, product.counts]
    arguments += [] if b == 1 else [b]
    launch(made.kernel, (made.programs,), *arguments, *made.numbers, **made.fixed)
    parts = zip(out.split([b * n for n in outputs]), outputs, strict=True)
    return tuple(y.view(b, n) for y, n in parts)


def _form(weight: Weight) -> Any:
    """What has the weight's shape in its first two axes."""
    return weight.form if isinstance(weight, Weight4bit) else weight


def _launch(
    x: Float[Tensor, "b d_in"],
    product: Product,
    residual: bool,
    cleared: int,
    tile: Tile | None,
    pdl: bool | None,
) -> _Launch:
    b, sizes = x.shape[0], [shape_of(w)[0] for w in product.weights]
    outputs = sizes[:1] if product.gated else sizes
    tile = choose_tile(product, x) if tile is None else tile
    fixed = _constants(x, product, sizes, residual, cleared, tile) | pdl_options(x, pdl)
    # Programs: for the rows of A, then for the rows of each part.
    rows = tile.rows * (2 if product.gated else 1)
    kernel: Any = vector_kernel if b == 1 else matrix_kernel
    if isinstance(product.weights[0], Weight4bit):
        kernel = packed_vector_kernel if b == 1 else packed_matrix_kernel
        kernel = packed_mma_kernel if tile.mma else kernel
        rows = _A_ROWS if b == 1 else tile.rows
    tiles = sum(triton.cdiv(n, tile.rows) for n in outputs)
    programs, sums = tiles + triton.cdiv(fixed["A_ROWS"], rows), 0
    if tile.splits > 1:
        assert product.counts is not None and product.counts.numel() >= tiles
        assert tile.splits <= MOST_SPLITS
        kernel, programs = split_kernel, programs * tile.splits
        sums = tiles * tile.splits * (tile.rows + 1) * batch_tile(b)
    numbers = [product.eps, *[*product.scalings, 1.0, 1.0][:3]]
    return _Launch(kernel, programs, _weights(product, b), numbers, sums, fixed)


def _constants(
    x: Float[Tensor, "b d_in"],
    product: Product,
    sizes: list[int],
    residual: bool,
    cleared: int,
    tile: Tile,
) -> dict[str, Any]:
    """The arguments that are compiled into a kernel."""
    (b, columns), first = x.shape, product.weights[0]
    rank = 0 if product.b is None else product.b.shape[1]
    n0, n1, n2 = [*sizes, 0, 0][:3]
    bk = min(tile.columns, max(triton.next_power_of_2(columns), 16))
    fixed: dict[str, Any] = dict(
        K=columns, N0=n0, N1=n1, N2=n2, R=rank, A_ROWS=rank * len(sizes),
        CLEAR=cleared, EMPTY=EMPTY, NORM=product.norm is not None,
        GATED=product.gated, GELU=product.gelu, GAIN=product.gain is not None,
        BIAS=product.bias is not None, RESIDUAL=residual, BN=tile.rows, BK=bk, BC=_CLEARED,
        num_warps=tile.warps,
    )  # fmt: skip
    if tile.registers:
        fixed["maxnreg"] = tile.registers
    if b == 1:
        fixed |= dict(COPIES=COPIES)
    else:
        stages = _stages(x, product, tile)
        fixed |= dict(BATCH=batch_tile(b), STAGES=stages, PRECISION=precision(x.dtype))
        fixed |= dict(SPLITS=tile.splits) if tile.splits > 1 else {}
    if isinstance(first, Weight4bit):
        block = first.form.shape[2]
        fixed |= dict(BLOCK=block, NESTED=isinstance(first.absmax, NestedAbsmax), TABLE=TABLE)
        fixed["BK"] = max(bk, block)
        if b == 1:
            every = max(triton.next_power_of_2(columns), 16)
            fixed |= dict(BA=_A_ROWS, KA=min(_A_COLUMNS * tile.warps, every))
        if tile.mma:
            return _mma_constants(x, product, fixed, tile)
        if b == 1:
            load = LOAD8[str(x.dtype).removeprefix("torch.")]
            fixed |= dict(DOT8=DOT8 if x.is_cuda else None, LOAD8=load)
        else:
            fixed |= dict(ROUND=_TRITON[first.form.dtype], SHUFFLE=SHUFFLE if x.is_cuda else None)
    return fixed


def _mma_constants(
    x: Float[Tensor, "b d_in"], product: Product, fixed: dict[str, Any], tile: Tile
) -> dict[str, Any]:
    """Those of packed_mma_kernel."""
    assert mma_supports(x, product) and tile.rows % 16 == 0 and tile.stages in (1, 2)
    kind = "bf16" if x.dtype == torch.bfloat16 else "f16"
    nested = isinstance(product.weights[0], Weight4bit) and fixed["NESTED"]
    kept = {name: v for name, v in fixed.items() if name not in ("BN", "BK", "TABLE")}
    return kept | dict(
        FILL=fill(kind, tile.warps), READ=READ, READ_NUMBERS=READ_NUMBERS, READ_FLOATS=READ_FLOATS,
        STEP=step(kind, norm=product.norm is not None, nested=nested), WARPS=tile.warps,
        AHEAD=tile.stages, TILES=tile.rows // 16,
        PLACES=triton.next_power_of_2(x.shape[1]),
    )  # fmt: skip


def mma_supports(x: Float[Tensor, "b d_in"], product: Product) -> bool:
    """Whether packed_mma_kernel computes this product of x."""
    first = product.weights[0]
    if not isinstance(first, Weight4bit) or first.form.shape[2] != 64 or x.shape[0] > 1:
        return False
    norm = x if product.norm is None else product.norm
    absmax = [w.absmax for w in product.weights if isinstance(w, Weight4bit)]
    read = [m.values if isinstance(m, NestedAbsmax) else m for m in absmax]
    if any(t.data_ptr() % 16 for t in (x, norm, *read)) or norm.dtype != x.dtype:
        return False
    return x.shape[1] % 256 == 0 and x.dtype in (torch.bfloat16, torch.float16)


def _stages(x: Float[Tensor, "b d_in"], product: Product, tile: Tile) -> int:
    """tile.stages, or fewer if the GPU's shared memory does not hold their tiles."""
    if not x.is_cuda:
        return tile.stages
    limit = torch.cuda.get_device_properties(x.device).shared_memory_per_block_optin
    return stages_within(limit, x, product, tile)


def stages_within(limit: int, x: Float[Tensor, "b d_in"], product: Product, tile: Tile) -> int:
    """At most tile.stages, so that their tiles of W and x fit into `limit` bytes."""
    rows = tile.rows * (2 if product.gated else 1) + batch_tile(x.shape[0])
    return max(1, min(tile.stages, limit // (rows * tile.columns * x.element_size())))


def _weights(product: Product, b: int) -> list[Tensor]:
    """The arguments that describe the weights, with copies of the first for absent parts."""
    dense = [w for w in product.weights if isinstance(w, Tensor)]
    if dense:
        return [*dense, dense[0], dense[0]][:3]
    packed = [w for w in product.weights if isinstance(w, Weight4bit)]
    packed = [*packed, packed[0], packed[0]][:3]
    first, code = packed[0], packed[0].levels
    absmax = [w.absmax for w in packed]
    nested = [x for x in absmax if isinstance(x, NestedAbsmax)]
    if nested:
        values, scales = [x.values for x in nested], [x.scale for x in nested]
        offsets, code = [x.offset for x in nested], nested[0].code
    else:  # the kernel does not read scales and offsets
        values = scales = offsets = [x for x in absmax if isinstance(x, Tensor)]
    data = [w.packed.view(torch.int32) if b == 1 else w.packed for w in packed]
    return [*data, *values, *scales, *offsets, first.levels, code]
