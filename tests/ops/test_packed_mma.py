"""packed_mma_kernel against the reference in float64; ptx.py executes its inline PTX."""

import pytest
import torch
import triton.language as tl

from fastlora.ops.decode.linear import product_reference
from fastlora.ops.decode.linear_launch import Tile, launch_product
from oracles.decode_products import Case, make, random
from oracles.ptx import Machine, interpret

CASES = {
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
def test_kernel_errs_no_more_than_the_reference(name, tile, monkeypatch):
    case = CASES[name]
    product = make(case, 1, torch.float16)
    x = random(1, case.columns, seed=3).half()
    residual = random(1, case.sizes[0], seed=4).half() if case.residual else None
    monkeypatch.setattr(tl, "inline_asm_elementwise", interpret(Machine()))
    ys = launch_product(x, product, residual, None, tile)
    wide = None if residual is None else residual.double()
    truth = product_reference(x.double(), product, wide)
    plain = product_reference(x, product, residual)
    error = lambda ys: max(
        float((y.double() - t).abs().max() / t.abs().max()) for y, t in zip(ys, truth, strict=True)
    )
    assert error(ys) <= 1.2 * error(plain)
