"""Time every matrix product of an 8B layer in bf16 and in fp8 (e4m3, one scale per row).

    python scripts/bench/kernels/fp8_products.py

8,192 tokens. Forward is x W', with x quantised by row in fp8. Backward is dy W: dy times W's scales
is quantised by row, and W is transposed, because fp8 products need both operands contiguous along
the summed dimension. "pass" is the quantisation alone, compiled by Inductor. Fused into an existing
kernel, it would cost only one write of half the bytes.
"""

import torch
from launch_timing import timed
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
    """Multiply x by one factor per column, then quantise as in by_row."""
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
        # dy W = (dy * scales of W's rows) W8: fold those scales into dy, so that W8' has scale one.
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
