"""Time the low-rank products of an input under dropout, with several tile sizes.

    python scripts/bench/kernels/masked_lora_kernel.py

The inputs are those of q, k and v, of gate and up, and of down in Llama 3.2 1B: 8,192 tokens in
bf16, r = 16. scripts/gpu_check.sh checks the kernels' errors.
"""

from itertools import product

import torch
from launch_timing import timed

from fastlora.ops.linear import masked_lora_kernel

N, R = 8192, 16
INPUTS = {"q, k, v": (2048, 3), "gate, up": (2048, 2), "down": (8192, 1)}
# (rows, hashes, pairs, warps), chunks
BACKWARD = [((32, 64, False, 4), 32), ((32, 32, True, 4), 32), ((32, 32, True, 4), 16)]
BACKWARD += [((32, 64, True, 8), 32), ((32, 64, True, 4), 32), ((64, 32, True, 8), 32)]
FORWARD = [(32, 4), (64, 4), (64, 8), (128, 8)]  # (rows, warps)


def main() -> None:
    print(torch.cuda.get_device_name(), torch.__version__)
    for name, (d, segments) in INPUTS.items():
        new = lambda *s: torch.randn(*s, device="cuda", dtype=torch.bfloat16)
        x, a = new(N, d), new(R * segments, d)
        dx_a, keys = new(N, R * segments), torch.arange(segments, device="cuda")
        static = ([R] * segments, [*range(segments)], 0.05)
        for tile in FORWARD:
            masked_lora_kernel._FORWARD = tile
            run = lambda x=x, a=a, keys=keys, s=static: masked_lora_kernel.masked_x_a_fused(
                x, a, keys, *s
            )
            print(f"{name:<10}forward  {tile}: {timed(run, [()])}", flush=True)
    for tile, (name, (d, segments)) in product(BACKWARD, INPUTS.items()):
        kind, shape = "one" if segments == 1 else "several", (R * segments, d)
        masked_lora_kernel._BACKWARD[kind], masked_lora_kernel._CHUNKS = tile
        x, a, dx = new(N, d), new(*shape), new(N, d)
        dx_a, keys = new(N, R * segments), torch.arange(segments, device="cuda")
        static = ([R] * segments, [*range(segments)], 0.05)
        run = lambda dx=dx, x=x, dx_a=dx_a, a=a, keys=keys, s=static: (
            masked_lora_kernel.masked_x_a_backward_(dx, x, dx_a, a, keys, *s, needs_a=True)
        )
        print(f"{name:<10}backward {tile}: {timed(run, [()])}", flush=True)


if __name__ == "__main__":
    main()
