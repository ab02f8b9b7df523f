"""The GPU kernels of a training step: how often each runs and how long it takes.

    python scripts/bench/profile_step.py --shape 1b --recompute none
    python scripts/bench/profile_step.py --shape 8b --load-in-4bit --batch 2 --recompute offload

The step, the floor and most arguments are those of scripts/bench.py. After --warm steps,
torch.profiler records --steps steps. The profiler slows the host down, so use bench.py for step
times. The script prints the time from the first kernel to the last, the time in which at least one
kernel ran ("busy"), how often the host waited for the GPU (a step should never wait), and the
kernels sorted by time.
"""

import argparse
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from bench_steps import step_of
from measuring import (
    add_step_arguments,
    facts,
    floor_ms,
    on_one_line,
    shape_of,
)
from random_checkpoint import write_checkpoint
from step_batches import step_batches
from torch._C._autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

# CUDA calls in which the host waits. The profiler itself adds one wait at the end of a recording.
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")


class Kernel(NamedTuple):
    """One launch on the GPU; microseconds."""

    name: str
    start: float
    end: float


def busy_us(kernels: Iterable[Kernel]) -> float:
    """Microseconds in which at least one kernel ran; overlapping kernels count once."""
    total, end = 0.0, float("-inf")
    for k in sorted(kernels, key=lambda k: k.start):
        total += max(0.0, k.end - max(end, k.start))
        end = max(end, k.end)
    return total


def table(kernels: list[Kernel], waits: int, steps: int, floor: float, most: int) -> str:
    """Averages over the `steps` recorded steps; `floor` in milliseconds."""
    times: dict[str, list[float]] = defaultdict(list)
    for k in kernels:
        times[k.name].append(k.end - k.start)
    span = max(k.end for k in kernels) - min(k.start for k in kernels)
    busy = busy_us(kernels)
    lines = [
        f"a step: {span / steps / 1e3:.2f} ms from first kernel to last, busy"
        f" {busy / steps / 1e3:.2f}; {len(kernels) / steps:.0f} kernels;"
        f" {waits / steps:.1f} waits of the host; floor {floor:.1f} ms",
        f"{'ms':>9}{'of busy':>9}{'of floor':>10}{'launches':>10}{'us each':>9}  kernel",
    ]
    for name, each in sorted(times.items(), key=lambda x: -sum(x[1]))[:most]:
        ms = sum(each) / steps / 1e3
        lines += [
            f"{ms:>9.3f}{sum(each) / busy:>9.1%}{ms / floor:>10.1%}{len(each) / steps:>10.1f}"
            f"{sum(each) / len(each):>9.1f}  {name[:90]}"
        ]
    return "\n".join(lines)


def recorded(events: Iterable[FunctionEvent]) -> tuple[list[Kernel], int]:
    """The kernels of a profile, and how often the host waited for the GPU."""
    kernels, waits = [], 0
    for e in events:
        if e.device_type == DeviceType.CUDA and not e.is_user_annotation:
            kernels.append(Kernel(e.name, e.time_range.start, e.time_range.end))
        waits += e.name in WAITS
    return kernels, waits


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_step_arguments(parser)
    parser.add_argument("--recompute", default="none", help="a policy or a peer of bench.py")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--warm", type=int, default=3)
    parser.add_argument("--most", type=int, default=30, help="kernels to print")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("profile_step.py records a CUDA GPU, and this machine has none.")
    args.one = args.recompute
    with tempfile.TemporaryDirectory() as temporary:
        if not args.folder:
            args.folder = Path(temporary)
            write_checkpoint(shape_of(args), args.folder)
        step, batch = step_of(args), step_batches(args)[0]
        for _ in range(args.warm):
            step(batch)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as prof:
            for _ in range(args.steps):
                step(batch)
            torch.cuda.synchronize()
    kernels, waits = recorded(prof.events() or [])
    floor = floor_ms(shape_of(args), args.batch, args.seq)
    print(on_one_line({"setting": args.one} | facts(args)))
    print(table(kernels, waits - 1, args.steps, floor, args.most))


if __name__ == "__main__":
    main()
