"""Time dxA and dB of low-rank terms: two products for each layer, and one pass over dy.

    python scripts/bench/kernels/low_rank_gradients.py

The layers are o (or down) and q, k and v of Llama 3.2 1B and Llama 3.1 8B: 8,192 tokens in bf16,
r = 16. Microseconds. scripts/gpu_check.sh checks the kernel's errors.
"""

import torch
from launch_timing import timed
from torch import Tensor

from fastlora.ops.linear import low_rank_gradients_kernel as kernel
from fastlora.ops.linear.low_rank_gradients import layer_gradients

N, R = 8192, 16
LAYERS = {"1b": [(2048,), (2048, 512, 512)], "8b": [(4096,), (4096, 1024, 1024)]}
# (rows, columns, warps, stages), programs
TILES = [((64, 128, 4, 3), 264), ((64, 256, 8, 3), 132), ((64, 128, 4, 3), 396)]
TILES += [((64, 256, 8, 3), 264), ((64, 256, 4, 3), 264), ((128, 128, 8, 3), 264)]


def drawn(*shape: int) -> Tensor:
    return 0.05 * torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def main() -> None:
    print(torch.cuda.get_device_name(), torch.__version__)
    for shape, layers in LAYERS.items():
        for widths in layers:
            starts = [sum(widths[:i]) for i in range(len(widths))]
            scalings = [0.5] * len(widths)
            bs = [drawn(w, R) for w in widths]
            sets = [(drawn(N, sum(widths)), drawn(N, R * len(widths))) for _ in range(4)]

            def products(dy: Tensor, x_a: Tensor, widths=widths, bs=bs, scalings=scalings):
                dys = dy.split(widths, 1)
                return layer_gradients(dys, None, widths, bs, x_a, scalings, fused=False)

            def one_pass(dy: Tensor, x_a: Tensor, bs=bs, starts=starts, scalings=scalings):
                return kernel.low_rank_gradients_fused(dy, bs, x_a, starts, scalings)

            with torch.no_grad():
                print(f"{shape} {widths} products: {timed(products, sets)}", flush=True)
                for kernel._TILE, kernel._PROGRAMS in TILES:
                    name = f"{kernel._TILE}, {kernel._PROGRAMS} programs"
                    print(f"{shape} {widths} {name}: {timed(one_pass, sets)}", flush=True)


if __name__ == "__main__":
    main()
