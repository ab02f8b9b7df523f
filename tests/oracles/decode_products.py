"""Random products for the tests of `decode_product`."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastlora.ops.decode.product import Part, Product, prepare_product
from fastlora.ops.quant.weights import LEVELS, NestedAbsmax, Weight, Weight4bit, empty_form

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
    gelu: bool = False
    wide_norm: bool = False  # the norm is in float32
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
    norm_dtype = torch.float32 if case.wide_norm else dtype
    norm = random(case.columns, seed=7).to(DEVICE, norm_dtype) if case.norm else None
    product = prepare_product(parts, b, norm=norm, eps=1e-5, gated=case.gated, gelu=case.gelu)
    assert product is not None
    return product
