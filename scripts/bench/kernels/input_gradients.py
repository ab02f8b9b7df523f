"""Time ways to compute the gradient of the input shared by q, k and v, or by gate and up.

    python scripts/bench/kernels/input_gradients.py

"today": one product per weight, each of which adds to one buffer. "stacked": one product over the
stacked weights. The others change the order. 8,192 tokens in bf16, r = 16; dx_a is the gradient of
x times all A matrices. Times are in microseconds.
"""

from collections.abc import Callable

import torch
from launch_timing import timed
from torch import Tensor

N, R = 8192, 16
# shape -> width, and the rows of the weights that read it
SHAPES = {
    "8b q, k, v": (4096, (4096, 1024, 1024)),
    "8b gate, up": (4096, (14336, 14336)),
    "1b q, k, v": (2048, (2048, 512, 512)),
    "1b gate, up": (2048, (8192, 8192)),
}


def drawn(*shape: int) -> Tensor:
    return 0.05 * torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def ways(d: int, rows: tuple[int, ...]) -> dict[str, Callable[[], Tensor]]:
    """Name -> function that computes dx_a A + sum of dy_i W_i."""
    dx_a, a, stacked = drawn(N, R * len(rows)), drawn(R * len(rows), d), drawn(sum(rows), d)
    weights = [w.clone() for w in stacked.split(rows)]
    dys = [drawn(N, n) for n in rows]
    dy = torch.cat(dys, 1)

    def added(first: Tensor, terms: list[tuple[Tensor, Tensor]]) -> Tensor:
        for y, weight in terms:
            first.addmm_(y, weight)
        return first

    terms = list(zip(dys, weights, strict=True))
    views = list(zip(dy.split(rows, 1), weights, strict=True))
    return {
        "today": lambda: added(dx_a @ a, terms),
        "low-rank last": lambda: added(dys[0] @ weights[0], [*terms[1:], (dx_a, a)]),
        "reversed": lambda: added(dx_a @ a, terms[::-1]),
        "dy one buffer": lambda: added(dx_a @ a, views),
        "stacked": lambda: added(dx_a @ a, [(dy, stacked)]),
        "stacked, low-rank last": lambda: added(dy @ stacked, [(dx_a, a)]),
    }


def main() -> None:
    print(torch.cuda.get_device_name(), torch.__version__)
    for shape, (d, rows) in SHAPES.items():
        for name, way in ways(d, rows).items():
            print(f"{shape:<12} {name:<24} {timed(way, [()])}", flush=True)


if __name__ == "__main__":
    main()
