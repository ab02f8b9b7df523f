"""What an fp8 base would take: every product of an 8B layer, bf16 beside row-wise e4m3.

    PYTHONPATH=. python scripts/bench_results/fp8_products.py

8,192 tokens. Forward x W' (fp8: x quantised by row), backward dy W (dy, times W's scales, by row;
W transposed, as fp8 products want both operands along the sum). "pass" is the quantisation alone,
compiled by Inductor, read from memory; where it rides in a kernel that is there anyway, one write
of half the bytes is left of it.
"""

import torch
from softmax_kernel import timed
from torch import Tensor

N = 8192
PRODUCTS = {"q, o": (4096, 4096), "k, v": (1024, 4096), "gate, up": (14336, 4096),
            "down": (4096, 14336)}  # fmt: skip
TIMES = {"q, o": 2, "k, v": 2, "gate, up": 2, "down": 1}
LAYERS = 32
E4M3 = torch.float8_e4m3fn


@torch.compile
def by_row(x: Tensor) -> tuple[Tensor, Tensor]:
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448
    return (wide / scale).to(E4M3), scale


@torch.compile
def by_row_scaled(x: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """The same of x times one factor a column."""
    wide = x.float() * factors
    scale = wide.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448
    return (wide / scale).to(E4M3), scale


def product(x: tuple[Tensor, Tensor], w: tuple[Tensor, Tensor], fast: bool) -> Tensor:
    return torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
        x[0],
        w[0].t(),
        scale_a=x[1],
        scale_b=w[1].t(),
        out_dtype=torch.bfloat16,
        use_fast_accum=fast,
    )


def main() -> None:
    print(torch.cuda.get_device_name(), torch.__version__)
    sums: dict[str, float] = {}
    for name, (out, inner) in PRODUCTS.items():
        x = torch.randn(N, inner, device="cuda", dtype=torch.bfloat16)
        dy = torch.randn(N, out, device="cuda", dtype=torch.bfloat16)
        w = torch.randn(out, inner, device="cuda", dtype=torch.bfloat16) * 0.02
        w8 = by_row(w)
        # dy W = (dy * scales of W's rows) W8: those scales go into dy, W8' has scale one.
        w8_t = w8[0].t().contiguous(), torch.ones(inner, 1, device="cuda")
        x8, dy8 = by_row(x), by_row_scaled(dy, w8[1].t())
        runs = {
            "bf16 forward": lambda x=x, w=w: torch.mm(x, w.t()),
            "bf16 backward": lambda dy=dy, w=w: torch.mm(dy, w),
            "fp8 forward": lambda x8=x8, w8=w8: product(x8, w8, True),
            "fp8 forward, slow sums": lambda x8=x8, w8=w8: product(x8, w8, False),
            "fp8 backward": lambda dy8=dy8, w8_t=w8_t: product(dy8, w8_t, True),
            "pass of x": lambda x=x: by_row(x),
            "pass of dy": lambda dy=dy, w8=w8: by_row_scaled(dy, w8[1].t()),
            "transpose of W": lambda w8=w8: w8[0].t().contiguous(),
        }
        for kind, run in runs.items():
            told = timed(run, [()])
            print(f"{name:<10}{kind:<26}{told}", flush=True)
            sums[kind] = sums.get(kind, 0.0) + TIMES[name] * float(str(told).split()[0])
        exact = x.double() @ w.double().t()
        for kind, y in (("bf16", torch.mm(x, w.t())), ("fp8", product(x8, w8, True))):
            off = float((y.double() - exact).norm() / exact.norm())
            print(f"{name:<10}{kind} relative error {off:.1e}")
        del exact
    for kind, us in sums.items():
        print(f"{LAYERS} layers: {kind:<26}{LAYERS * us / 1e3:8.1f} ms")


if __name__ == "__main__":
    main()
