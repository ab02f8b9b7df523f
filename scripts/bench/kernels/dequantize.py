"""Time the dequantisation of NF4: fastlora's kernel with several tiles, and bitsandbytes.

    python scripts/bench/kernels/dequantize.py

A plain copy of the matrix is timed as well. Median of 80 launches by CUDA events; before each
launch a large write empties the L2 cache.
"""

import statistics
from collections.abc import Callable
from functools import partial

import bitsandbytes
import torch

from fastlora.ops.quant import dequantize_kernel
from fastlora.ops.quant.bitsandbytes import dequantize_by_bitsandbytes, quantize_4bit
from fastlora.ops.quant.weights import Weight4bit

SHAPES = {
    "8b gate": (14336, 4096),
    "8b q": (4096, 4096),
    "8b k": (1024, 4096),
    "1b gate": (8192, 2048),
}


def timed(run: Callable[[], torch.Tensor], flush: torch.Tensor) -> float:
    """Microseconds."""
    times = []
    for _ in range(90):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end))
    return statistics.median(times[10:])


def ours(record: Weight4bit, tile: tuple[int, int]) -> torch.Tensor:
    dequantize_kernel._BYTES, dequantize_kernel._WARPS = tile
    return dequantize_kernel.dequantize_4bit(record, torch.bfloat16)


def main() -> None:
    print(torch.__version__, bitsandbytes.__version__, torch.cuda.get_device_name())
    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    for name, shape in SHAPES.items():
        weight = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        record = quantize_4bit(weight)
        theirs = dequantize_by_bitsandbytes(record)
        kinds: dict[str, Callable[[], torch.Tensor]] = {}
        kinds["bitsandbytes"] = partial(dequantize_by_bitsandbytes, record)
        for tile in [(512, 4), (1024, 4), (2048, 4), (2048, 8), (4096, 8)]:
            kinds[f"ours {tile}"] = partial(ours, record, tile)
            assert torch.equal(ours(record, tile), theirs)
        kinds["copy of the matrix"] = partial(torch.clone, weight)
        for kind, run in kinds.items():
            print(f"{name:<8} {shape!s:<14} {kind:<20} {timed(run, flush):8.1f} us")


if __name__ == "__main__":
    main()
