"""decode_product: the kernels against the reference in float64, in Triton's interpreter."""

import pytest
import torch

from fastlora.ops.decode.linear import decode_product, product_reference, prompt_product
from fastlora.ops.decode.linear_launch import Tile, launch_product
from fastlora.ops.decode.product import EMPTY
from oracles.decode_products import DEVICE, HALF, Case, make, random

CASES = {
    "plain": Case(ranks=(0,)),
    "lora": Case(),
    "norm and three parts": Case(sizes=(48, 16, 24), ranks=(16, 3, 5), norm=True, bias=True),
    "gated": Case(sizes=(40, 40), ranks=(4, 16), norm=True, gated=True, gain=True),
    "GeGLU and a norm in float32": Case(sizes=(40, 40), ranks=(4, 16), norm=True, wide_norm=True,
                                        gated=True, gelu=True, gain=True),
    "gated without adapter": Case(sizes=(40, 40), ranks=(0, 0), gated=True, bias=True),
    "residual, odd columns": Case(columns=72, residual=True, gain=True, bias=True),
    "two steps of columns": Case(columns=2304, ranks=(40,), residual=True, norm=True),
    "nested nf4": Case(sizes=(48, 16, 24), columns=192, ranks=(16, 0, 5), norm=True,
                       bits="nested nf4"),
    "nested nf4, gated": Case(sizes=(40, 40), columns=128, ranks=(16, 8), gated=True, gain=True,
                              bits="nested nf4"),
    "nf4, GeGLU": Case(sizes=(40, 40), columns=128, ranks=(16, 0), gated=True, gelu=True,
                       bits="nf4"),
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


@pytest.mark.parametrize("name", CASES)
def test_product_of_prompts_errs_no_more_than_the_reference(name):
    case, b = CASES[name], 40
    residual = random(b, case.sizes[0], seed=4).to(DEVICE) if case.residual else None
    for dtype in (torch.float32, torch.bfloat16):
        product, x = make(case, b, dtype), random(b, case.columns, seed=3).to(DEVICE, dtype)
        added = None if residual is None else residual.to(dtype)
        truth = product_reference(x.double(), product, None if added is None else added.double())
        # Norms, because the largest of 1,600 errors varies twofold with the input.
        error = lambda ys, truth=truth: sum(
            float((y.double() - t).norm() / t.norm()) for y, t in zip(ys, truth, strict=True)
        )
        ys = prompt_product(x, product, added)
        assert {y.dtype for y in ys} == {dtype}
        assert error(ys) <= max(1.2 * error(product_reference(x, product, added)), 1e-6)


SPLIT = {
    "norm and three parts": ("norm and three parts", Tile(16, 16, 4, 1, splits=2)),
    "columns that no part divides": ("two steps of columns", Tile(16, 256, 4, 1, splits=4)),
    "more parts than steps": ("residual, odd columns", Tile(16, 64, 4, 1, splits=3)),
}


@pytest.mark.parametrize("name", SPLIT)
def test_split_kernel_equals_the_reference_and_counts_from_0_again(name):
    case, tile = CASES[SPLIT[name][0]], SPLIT[name][1]
    product = make(case, 5, torch.float32)
    assert product.low is not None and product.counts is not None
    x = random(5, case.columns, seed=3).to(DEVICE)
    residual = random(5, case.sizes[0], seed=4).to(DEVICE) if case.residual else None
    wide = None if residual is None else residual.double()
    truth = product_reference(x.double(), product, wide)
    for _ in range(2):
        product.low.fill_(EMPTY)
        ys = launch_product(x, product, residual, None, tile)
        for y, t in zip(ys, truth, strict=True):
            assert float((y.double() - t).abs().max() / t.abs().max()) < 1e-5
    assert not product.counts.any()


@pytest.mark.parametrize("b", [1, 3])
@pytest.mark.parametrize("name", ["lora", "gated", "nested nf4", "nested nf4, gated"])
def test_a_launch_empties_all_of_the_buffer_of_the_launch_before(name, b):
    case = CASES[name]
    product, before = (make(case, b, torch.float32) for _ in range(2))
    assert before.low is not None
    before.low.zero_()
    decode_product(random(b, case.columns, seed=3).to(DEVICE), product, clear=before.low,
                   kernels="triton")  # fmt: skip
    assert (before.low == EMPTY).all()
