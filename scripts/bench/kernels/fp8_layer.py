"""Time all that an fp8 base adds to and takes from a layer of 8B, and the sum of 32 layers.

    python scripts/bench/kernels/fp8_layer.py [TILES]

8,192 tokens. (1) one-pass quantisation of rows, with a factor for each column (the scales of W's
rows, for gradients) and without; (2) W's transposition into the scratch matrix of the input
gradient; (3) products with one scale per row beside bf16; (4) the sum and the step's estimate.
With TILES, other tiles of the two kernels are timed too. Errors are relative, against float64.
"""

import sys
from collections.abc import Callable
from functools import partial

import torch
from graph_timing import timed
from torch import Tensor

from fastlora.ops.quant.e4m3_kernel import quantize_rows, side_by_side

N, LAYERS, STEP_MS, SETS = 8192, 32, 470.7, 3
ROWS = 1024  # of which errors are computed
CALLS = 12  # in a CUDA graph
E4M3, BF16 = torch.float8_e4m3fn, torch.bfloat16
# Forward: (name, number in a layer, d_out, d_in).
FORWARD = [("q, o", 2, 4096, 4096), ("k, v", 2, 1024, 4096), ("gate, up", 2, 14336, 4096),
           ("down", 1, 4096, 14336)]  # fmt: skip
# Input gradients: (name, rows of the matrices stacked along the summed dimension, d_in).
BACKWARD = [("q, k, v", (4096, 1024, 1024), 4096), ("o", (4096,), 4096),
            ("gate, up", (14336, 14336), 4096), ("down", (4096,), 14336)]  # fmt: skip
ROW_TILES = [(1024, 2), (1024, 4), (2048, 4), (2048, 8), (4096, 4), (4096, 8), (8192, 8)]
TRANSPOSE_TILES = [(64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 128, 4), (128, 128, 8),
                   (256, 64, 8), (64, 256, 8)]  # fmt: skip


def over(fn: Callable, sets: list[tuple]) -> float:
    """Microseconds per call; the sets of inputs alternate, so that the L2 cache holds none."""
    return timed([partial(fn, *sets[i % len(sets)]) for i in range(CALLS)])


def row(*cells: object) -> None:
    print(
        "".join(f"{c!s:<26}" if i == 0 else f"{c!s:>13}" for i, c in enumerate(cells)), flush=True
    )


def rate(bytes_moved: float, us: float) -> str:
    return f"{bytes_moved / us / 1e6:.2f} TB/s"


def power_of_two_scales(w: Tensor) -> Tensor:
    return torch.exp2(torch.ceil(torch.log2(w.float().abs().amax(1) / 448)))


def product(fast: bool, x8: Tensor, scale: Tensor, w8: Tensor, w_scale: Tensor) -> Tensor:
    return torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
        x8, w8.t(), scale_a=scale[:, None], scale_b=w_scale[None, :], out_dtype=BF16,
        use_fast_accum=fast,
    )  # fmt: skip


def passes(sums: dict[str, float], tiles: bool) -> None:
    row("quantise rows of", "us", "", "error")
    # (widths, factors, number in a layer): x of q k v and of gate up, attention's, h; gradients.
    cases = [((4096,), False, 3), ((14336,), False, 1), ((4096,), True, 2),
             ((4096, 1024, 1024), True, 1), ((14336, 14336), True, 1)]  # fmt: skip
    for widths, scaled, number in cases:
        sets = []
        for _ in range(SETS):
            ys = [torch.randn(N, w, device="cuda", dtype=BF16) for w in widths]
            f = torch.randint(-9, -5, (sum(widths),), device="cuda").float().exp2()
            sets.append((ys, f.split(widths) if scaled else None))
        kind = "gradients" if scaled else "inputs"
        us = over(quantize_rows, sets)
        ys, f = sets[0]
        whole = torch.cat(ys, 1).double() * (1 if f is None else torch.cat(f).double())
        q, s = quantize_rows(ys, f)
        error = float((q.double() * s.double()[:, None] - whole).norm() / whole.norm())
        named = f"{'+'.join(map(str, widths))}{' x factors' if scaled else ''}"
        row(named, f"{us:.1f}", rate(3 * N * sum(widths), us), f"{error:.2e}")
        sums[f"quantise {kind}"] = sums.get(f"quantise {kind}", 0) + number * us
        if tiles:
            for tile in ROW_TILES:
                us = over(lambda ys, f, t=tile: quantize_rows(ys, f, E4M3, t), sets)
                row(f"  tile {tile}", f"{us:.1f}", rate(3 * N * sum(widths), us))
        del sets, ys, whole, q, s


def transpositions(sums: dict[str, float], tiles: bool) -> None:
    row("transpose", "us")
    for name, parts, d_in in BACKWARD:
        sets = []
        for _ in range(SETS):
            ws = [torch.randint(0, 200, (p, d_in), device="cuda", dtype=torch.uint8) for p in parts]
            sets.append((ws,))
        us, size = over(side_by_side, sets), 2 * sum(parts) * d_in
        (ws,) = sets[0]
        right = "right" if torch.equal(side_by_side(ws)[0], torch.cat(ws).t()) else "WRONG"
        row(name, f"{us:.1f}", rate(size, us), right)
        sums["transpose W"] = sums.get("transpose W", 0) + us
        for tile in TRANSPOSE_TILES if tiles else ():
            us = over(lambda ws, t=tile: side_by_side(ws, t), sets)
            row(f"  tile {tile}", f"{us:.1f}", rate(size, us))


def products(sums: dict[str, float]) -> None:
    row("products", "bf16 us", "fp8 fast", "fp8 slow", "bf16 error", "fast", "slow", "emulated")
    cases = [(f"{n} forward", number, d_out, d_in) for n, number, d_out, d_in in FORWARD]
    cases += [(f"{n} gradient", 1, d_in, sum(parts)) for n, parts, d_in in BACKWARD]
    for name, number, d_out, d_in in cases:
        sets, exact, emulated = [], None, None
        for _ in range(SETS):
            x = torch.randn(N, d_in, device="cuda", dtype=BF16)
            w = torch.randn(d_out, d_in, device="cuda", dtype=BF16) * 0.02
            w_scale = power_of_two_scales(w)
            w8 = (w.float() / w_scale[:, None]).to(E4M3)
            x8, scale = quantize_rows([x], None)
            sets.append((x, w, x8, scale, w8, w_scale))
        x, w, x8, scale, w8, w_scale = sets[0]
        exact = x[:ROWS].double() @ w.double().t()
        emulated = x8[:ROWS].float() * scale[:ROWS, None] @ (w8.float() * w_scale[:, None]).t()
        of = lambda y, e=exact: f"{float((y[:ROWS].double() - e).norm() / e.norm()):.2e}"
        plain = over(lambda x, w, *_: torch.mm(x, w.t()), sets)
        fast = over(lambda x, w, *q: product(True, *q), sets)
        slow = over(lambda x, w, *q: product(False, *q), sets)
        q = (x8, scale, w8, w_scale)
        errors = [of(torch.mm(x, w.t())), of(product(True, *q)), of(product(False, *q))]
        # Of the product alone: against the same rounded operands multiplied in float64.
        rounded = (
            x8[:ROWS].double()
            * scale[:ROWS, None].double()
            @ (w8.double() * w_scale.double()[:, None]).t()
        )
        row(name, f"{plain:.1f}", f"{fast:.1f}", f"{slow:.1f}", *errors, of(emulated.to(BF16)))
        alone = [of(product(f, *q), rounded) for f in (True, False)]
        row("  beyond the rounding", "", "", "", "", *alone, of(emulated.to(BF16), rounded))
        way = "forward" if "forward" in name else "gradient"
        for kind, us in (("bf16", plain), ("fp8 fast", fast), ("fp8 slow", slow)):
            key = f"{kind} {way}"
            sums[key] = sums.get(key, 0) + number * us
        del sets, exact, emulated, rounded, x, w, x8, w8


def main() -> None:
    print(torch.cuda.get_device_name(), torch.__version__)
    sums: dict[str, float] = {}
    tiles = len(sys.argv) > 1
    passes(sums, tiles)
    transpositions(sums, tiles)
    products(sums)
    ms = {kind: LAYERS * us / 1e3 for kind, us in sums.items()}
    row(f"{LAYERS} layers", "ms")
    for kind, value in ms.items():
        row(kind, f"{value:.1f}")
    plain = ms["bf16 forward"] + ms["bf16 gradient"]
    added = ms["quantise inputs"] + ms["quantise gradients"] + ms["transpose W"]
    for kind in ("fp8 fast", "fp8 slow"):
        step = STEP_MS - plain + ms[f"{kind} forward"] + ms[f"{kind} gradient"] + added
        row(f"step with {kind}", f"{step:.1f}", f"bf16 {STEP_MS}")
    print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


if __name__ == "__main__":
    main()
