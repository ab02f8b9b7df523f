"""timed(): the GPU's time for calls that the host launches one by one."""

import statistics
from collections.abc import Callable

import torch


def timed(fn: Callable, sets: list) -> str:
    """Median and quartiles of 80 calls in microseconds; the calls go through the sets of arguments.

    Sets that are together larger than the L2 cache are not found there.
    """
    for s in sets[:3]:
        fn(*s)
    times = []
    for i in range(80):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        fn(*sets[i % len(sets)])
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return f"{statistics.median(times):.1f} us (quartiles {statistics.quantiles(times, n=4)})"
