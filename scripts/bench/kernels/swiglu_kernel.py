"""Time the fused SwiGLU with several tile sizes, beside the kernels that it replaces.

    python scripts/bench/kernels/swiglu_kernel.py

8,192 rows, r = 16 on gate, up and down. scripts/gpu_check.sh checks the kernel's error.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from launch_timing import timed
from torch import Tensor

from fastlora.ops.swiglu import swiglu_kernel

# The sets of inputs alternate so that the L2 cache holds none of them.
N, R, SETS = 8192, 16, 3
WIDTHS = {"1b": 8192, "8b": 14336}
FORWARD = [(64, 64, 4), (64, 128, 8), (32, 128, 4), (128, 64, 8)]
# (rows, columns, warps, iterations in flight), chunks
BACKWARD = [((32, 64, 4, 1), 8), ((32, 64, 4, 2), 8), ((32, 64, 4, 3), 8), ((64, 64, 4, 2), 8)]
BACKWARD += [((32, 128, 4, 2), 8), ((32, 128, 8, 2), 8), ((64, 64, 8, 2), 8), ((32, 64, 4, 2), 16)]


def drawn(f: int) -> tuple[Tensor, ...]:
    """(dh, dh_a, a, g, u, gate_x_a, up_x_a, b_g, b_u)."""
    shapes = ((N, f), (N, R), (R, f), (N, f), (N, f), (N, R), (N, R), (f, R), (f, R))
    return tuple(torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in shapes)


def low_rank_term(x_a: Tensor, b: Tensor) -> Tensor:
    """x A' times B'. lora_linear writes it, and the base product then adds to it."""
    return torch.addmm(x_a.new_empty(1), x_a, b.t(), beta=0)


@torch.compile
def plain(g: Tensor, u: Tensor) -> Tensor:
    return F.silu(g) * u


@torch.compile
def plain_backward(dh: Tensor, part: Tensor, g: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    dh, sigmoid = dh + part, g.float().sigmoid()
    return (dh * u * sigmoid * (1 + g * (1 - sigmoid))).to(g.dtype), (dh * g * sigmoid).to(g.dtype)


def before(*given: Any) -> Tensor:
    _, _, _, g, u, gate_x_a, up_x_a, b_g, b_u = given
    low_rank_term(gate_x_a, b_g)
    low_rank_term(up_x_a, b_u)
    return plain(g, u)


def before_backward(*given: Any) -> tuple[Tensor, ...]:
    dh, dh_a, a, g, u, gate_x_a, up_x_a, _, _ = given
    dg, du = plain_backward(dh, dh_a @ a, g, u)
    # g replaces h in the last product; it has the same shape.
    return dg.t() @ gate_x_a, du.t() @ up_x_a, dh_a.t() @ g


def now(*given: Any) -> Tensor:
    run: Any = swiglu_kernel.swiglu
    return run(*given[3:], None, 1.0, 1.0)


def now_backward(*given: Any) -> tuple[Tensor, ...]:
    run: Any = swiglu_kernel.swiglu_backward_  # overwrites dh
    return run(*given, None, 1.0, 1.0)


def main() -> None:
    print(torch.__version__, torch.cuda.get_device_name())
    for shape, f in WIDTHS.items():
        sets = [drawn(f) for _ in range(SETS)]
        show: Callable = lambda what, fn, shape=shape, sets=sets: print(
            f"{shape} {what}: {timed(fn, sets)}", flush=True
        )
        show("forward, two low-rank terms and Inductor's SwiGLU", before)
        for swiglu_kernel._FORWARD in FORWARD:
            show(f"forward, kernel {swiglu_kernel._FORWARD}", now)
        show("backward, Inductor's and the products", before_backward)
        for swiglu_kernel._BACKWARD, swiglu_kernel._CHUNKS in BACKWARD:
            tile = f"{swiglu_kernel._BACKWARD}, {swiglu_kernel._CHUNKS} chunks"
            show(f"backward, kernel {tile}", now_backward)


if __name__ == "__main__":
    main()
