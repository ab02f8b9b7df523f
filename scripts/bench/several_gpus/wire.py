"""The parts without a model: bandwidth by message size, and products beside collectives."""

from typing import Any

import torch
import torch.distributed as dist

from fastlora.distributed.process_group import start_all_gather
from several_gpus.bench import Bench

MIB = 2**20
# Bytes that all ranks have afterwards. The last three are layers: 8B in NF4 and bf16, 70B in bf16.
SIZES = (MIB, 8 * MIB, 28 * MIB, 113 * MIB, 436 * MIB, 1711 * MIB)


def bandwidth(bench: Bench, tiny: bool) -> None:
    """all_gather of bytes, as a sharded base has them, and all_reduce of float32, as adapters."""
    sizes = (MIB // 8, MIB) if tiny else SIZES
    n = bench.ranks
    for size in sizes:
        part = -(-size // (256 * n)) * 256

        def gather(part: int = part) -> dict[str, Any]:
            own = torch.zeros(part, dtype=torch.uint8, device=bench.device)
            out = torch.empty(part * n, dtype=torch.uint8, device=bench.device)
            found = bench.timed(lambda: start_all_gather(out, own, None).wait(), 10)
            moved = part * (n - 1)
            return {"bytes": part * n, **found, "gb_s": round(moved / found["ms"] / 1e6, 2)}

        def reduce(size: int = size) -> dict[str, Any]:
            flat = torch.zeros(size // 4, device=bench.device)
            found = bench.timed(lambda: dist.all_reduce(flat), 10)
            moved = 2 * size * (n - 1) / n
            return {"bytes": size, **found, "gb_s": round(moved / found["ms"] / 1e6, 2)}

        bench.measured("bandwidth", f"all_gather {size / MIB:g} MiB", gather)
        bench.measured("bandwidth", f"all_reduce {size / MIB:g} MiB", reduce)


def products(bench: Bench, tiny: bool) -> None:
    """Products of large matrices alone, and with all_gathers under way."""
    k, count = (256, 4) if tiny else (8192, 20)
    dtype = torch.bfloat16 if bench.device.type == "cuda" else torch.float32

    def beside() -> dict[str, Any]:
        a, b = (torch.randn(k, k, device=bench.device, dtype=dtype) for _ in range(2))
        own = torch.zeros(MIB // 64 if tiny else 32 * MIB, dtype=torch.uint8, device=bench.device)
        outs = [torch.empty(len(own) * bench.ranks, dtype=torch.uint8, device=bench.device)] * 8

        def multiply() -> None:
            for _ in range(count):
                torch.mm(a, b)

        def gather() -> None:
            for work in [start_all_gather(out, own, None) for out in outs]:
                work.wait()

        def both() -> None:
            flying = [start_all_gather(out, own, None) for out in outs]
            multiply()
            for work in flying:
                work.wait()

        p, g, b = (bench.timed(run, 10)["ms"] for run in (multiply, gather, both))
        # If nothing were lost, both would take as long as the longer of the two.
        lost = round((b - max(p, g)) / min(p, g), 3)
        return {"products_ms": p, "gathers_ms": g, "both_ms": b, "lost_of_the_shorter": lost}

    bench.measured("products", f"{count} products of {k} beside 8 gathers", beside)
