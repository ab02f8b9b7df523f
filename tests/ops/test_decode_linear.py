"""decode_product: the kernels against the reference in float64, in Triton's interpreter."""

from dataclasses import dataclass

import pytest
import torch
import triton.language as tl
from torch import Tensor

from fastlora.ops.decode.linear import decode_product, product_reference
from fastlora.ops.decode.linear_kernel import EMPTY
from fastlora.ops.decode.linear_launch import Tile, launch_product, split_workspace
from fastlora.ops.decode.product import Part, Product, prepare_product
from fastlora.ops.quant.weights import LEVELS, NestedAbsmax, Weight, Weight4bit, empty_form
from oracles.ptx import Machine, interpret

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Triton's interpreter truncates to bfloat16 and multiplies its bits in tl.dot (triton 3.9).
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    sizes: tuple[int, ...] = (48,)
    columns: int = 64
    ranks: tuple[int, ...] = (16,)  # 0: that part has no adapter
    norm: bool = False
    gated: bool = False
    residual: bool = False
    gain: bool = False
    bias: bool = False
    bits: str = "dense"  # or "nf4", "fp4"; "nested" in front: double quantisation


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packed(rows: int, columns: int, kind: str, dtype: torch.dtype, seed: int) -> Weight4bit:
    """Random bytes with random absmax."""
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 256, (rows * columns // 2,), generator=generator, dtype=torch.uint8)
    blocks = rows * columns // 64
    absmax = torch.rand(blocks, generator=generator) + 0.5
    if kind.startswith("nested"):
        values = torch.randint(0, 256, (blocks,), generator=generator, dtype=torch.uint8)
        scale = torch.rand(-(-blocks // 256), generator=generator) + 0.5
        code = torch.linspace(-1, 1, 256)
        absmax = NestedAbsmax(*(t.to(DEVICE) for t in (values, scale, code, torch.tensor(1.5))))
    else:
        absmax = absmax.to(DEVICE)
    levels = torch.tensor(LEVELS[kind.removeprefix("nested ")], device=DEVICE)
    form = empty_form((rows, columns), dtype, DEVICE)
    return Weight4bit(data.to(DEVICE), levels, form, absmax)


def make(case: Case, b: int, dtype: torch.dtype) -> Product:
    parts = []
    for i, (n, r) in enumerate(zip(case.sizes, case.ranks, strict=True)):
        on = lambda t: t.to(DEVICE, dtype)
        weight: Weight = on(random(n, case.columns, seed=10 * i + 1))
        if case.bits != "dense":
            weight = packed(n, case.columns, case.bits, dtype, seed=10 * i + 1)
        parts.append(
            Part(
                weight,
                on(random(r, case.columns, seed=10 * i + 2)) if r else None,
                on(random(n, r, seed=10 * i + 3)) if r else None,
                scaling=0.5 + i,
                gain=random(n, seed=10 * i + 4).to(DEVICE) if case.gain else None,
                bias=random(n, seed=10 * i + 5).to(DEVICE) if case.bias and i != 1 else None,
            )
        )
    norm = random(case.columns, seed=7).to(DEVICE, dtype) if case.norm else None
    product = prepare_product(parts, b, norm=norm, eps=1e-5, gated=case.gated)
    assert product is not None
    return product


CASES = {
    "plain": Case(ranks=(0,)),
    "lora": Case(),
    "norm and three parts": Case(sizes=(48, 16, 24), ranks=(16, 3, 5), norm=True, bias=True),
    "gated": Case(sizes=(40, 40), ranks=(4, 16), norm=True, gated=True, gain=True),
    "gated without adapter": Case(sizes=(40, 40), ranks=(0, 0), gated=True, bias=True),
    "residual, odd columns": Case(columns=72, residual=True, gain=True, bias=True),
    "two steps of columns": Case(columns=2304, ranks=(40,), residual=True, norm=True),
    "nested nf4": Case(sizes=(48, 16, 24), columns=192, ranks=(16, 0, 5), norm=True,
                       bits="nested nf4"),
    "nested nf4, gated": Case(sizes=(40, 40), columns=128, ranks=(16, 8), gated=True, gain=True,
                              bits="nested nf4"),
    "fp4, residual": Case(columns=2304, residual=True, bits="fp4"),
}  # fmt: skip


def errors(case: Case, b: int, dtype: torch.dtype) -> tuple[float, float]:
    """(of the kernels, of the reference in `dtype`), each the largest against float64."""
    product = make(case, b, dtype)
    x = random(b, case.columns, seed=3).to(DEVICE, dtype)
    n = case.sizes[0]
    residual = random(b, n, seed=4).to(DEVICE, dtype) if case.residual else None
    wide = None if residual is None else residual.double()
    truth = product_reference(x.double(), product, wide)
    worst = []
    for kernels in ("triton", "torch"):
        ys = decode_product(x, product, residual, kernels=kernels)
        largest = 0.0
        for y, t in zip(ys, truth, strict=True):
            assert y.dtype == dtype
            largest = max(largest, float((y.double() - t).abs().max() / t.abs().max()))
        worst.append(largest)
    return worst[0], worst[1]


@pytest.mark.parametrize("b", [1, 3, 17])
@pytest.mark.parametrize("name", CASES)
def test_kernel_equals_the_reference_in_float32(name, b):
    kernel, _ = errors(CASES[name], b, torch.float32)
    assert kernel < 1e-5


@pytest.mark.parametrize("b", [1, 4])
@pytest.mark.parametrize("name", CASES)
def test_kernel_errs_no_more_than_the_reference_in_16_bits(name, b):
    kernel, reference = errors(CASES[name], b, HALF)
    assert kernel <= 1.2 * reference


SPLIT = {
    "norm and three parts": ("norm and three parts", Tile(16, 16, 4, 1, splits=2)),
    "columns that no part divides": ("two steps of columns", Tile(16, 256, 4, 1, splits=4)),
    "more parts than steps": ("residual, odd columns", Tile(16, 64, 4, 1, splits=3)),
}


@pytest.mark.parametrize("name", SPLIT)
def test_split_kernel_equals_the_reference_and_counts_from_0_again(name):
    case, tile = CASES[SPLIT[name][0]], SPLIT[name][1]
    product = make(case, 5, torch.float32)
    assert product.low is not None
    low = [torch.full((4 * product.low.numel(),), EMPTY, dtype=torch.int32) for _ in range(2)]
    x = random(5, case.columns, seed=3).to(DEVICE)
    residual = random(5, case.sizes[0], seed=4).to(DEVICE) if case.residual else None
    workspace = split_workspace(product, 5, tile)
    wide = None if residual is None else residual.double()
    truth = product_reference(x.double(), product, wide)
    for i in range(2):
        one = product._replace(low=low[i].to(DEVICE))
        ys = launch_product(x, one, residual, None, tile, workspace=workspace)
        for y, t in zip(ys, truth, strict=True):
            assert float((y.double() - t).abs().max() / t.abs().max()) < 1e-5
    assert not workspace.counts.any()


MMA = {
    "nested nf4": Case(sizes=(48, 16, 24), columns=512, ranks=(16, 0, 5), norm=True,
                       bits="nested nf4"),
    "nested nf4, gated": Case(sizes=(40, 40), columns=256, ranks=(16, 8), norm=True, gated=True,
                              gain=True, bits="nested nf4"),
    "fp4, residual": Case(columns=2304, residual=True, bias=True, bits="fp4"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "tile"),
    [
        ("nested nf4", Tile(16, 256, 4, 2, mma=True)),
        ("nested nf4", Tile(32, 256, 4, 1, mma=True)),
        ("nested nf4, gated", Tile(16, 256, 4, 1, mma=True)),
        ("nested nf4, gated", Tile(32, 256, 4, 2, mma=True)),
        ("fp4, residual", Tile(16, 1024, 8, 2, mma=True)),
    ],
)
def test_tensor_cores_err_no_more_than_the_reference(name, tile, monkeypatch):
    case = MMA[name]
    product = make(case, 1, torch.float16)
    x = random(1, case.columns, seed=3).to(DEVICE, torch.float16)
    residual = random(1, case.sizes[0], seed=4).to(x) if case.residual else None
    if DEVICE == "cpu":  # the interpreter does not execute inline PTX
        monkeypatch.setattr(tl, "inline_asm_elementwise", interpret(Machine()))
    ys = launch_product(x, product, residual, None, tile)
    wide = None if residual is None else residual.double()
    truth = product_reference(x.double(), product, wide)
    plain = product_reference(x, product, residual)
    error = lambda ys: max(
        float((y.double() - t).abs().max() / t.abs().max()) for y, t in zip(ys, truth, strict=True)
    )
    assert error(ys) <= 1.2 * error(plain)
