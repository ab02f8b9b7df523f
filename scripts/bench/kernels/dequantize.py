"""Time the dequantisation of NF4: fastlora's kernel with several tiles, and bitsandbytes.

    python scripts/bench/kernels/dequantize.py

A plain copy of the matrix is timed as well. The launches go through several matrices, so that the
L2 cache holds none of them.
"""

from collections.abc import Callable
from functools import partial

import bitsandbytes
import torch
from graph_timing import timed

from fastlora.ops.quant import dequantize_kernel
from fastlora.ops.quant.bitsandbytes import dequantize_by_bitsandbytes, quantize_4bit
from fastlora.ops.quant.weights import Weight4bit

SHAPES = {
    "8b gate": (14336, 4096),
    "8b q": (4096, 4096),
    "8b k": (1024, 4096),
    "1b gate": (8192, 2048),
}


def ours(record: Weight4bit, tile: tuple[int, int]) -> torch.Tensor:
    dequantize_kernel._BYTES, dequantize_kernel._WARPS = tile
    return dequantize_kernel.dequantize_4bit(record, torch.bfloat16)


def main() -> None:
    print(torch.__version__, bitsandbytes.__version__, torch.cuda.get_device_name())
    for name, shape in SHAPES.items():
        count = max(4, -(-(2**28) // (shape[0] * shape[1])))
        weights = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
        records = [quantize_4bit(weight) for weight in weights]
        kinds: dict[str, list[Callable[[], object]]] = {}
        kinds["bitsandbytes"] = [partial(dequantize_by_bitsandbytes, x) for x in records]
        for tile in [(1024, 4), (2048, 4), (2048, 8), (4096, 4), (4096, 8)]:
            kinds[f"ours {tile}"] = [partial(ours, x, tile) for x in records]
            assert torch.equal(ours(records[0], tile), dequantize_by_bitsandbytes(records[0]))
        kinds["copy of the matrix"] = [partial(torch.clone, weight) for weight in weights]
        for kind, calls in kinds.items():
            print(f"{name:<8} {shape!s:<14} {kind:<20} {timed(calls):8.1f} us", flush=True)


if __name__ == "__main__":
    main()
