"""How transfers and kernels share the time of a step, from a Chrome trace of torch's profiler."""

import json
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Interval = tuple[float, float]


def joined(intervals: Iterable[Interval]) -> list[Interval]:
    """Intervals in order, those that touch made one."""
    found: list[Interval] = []
    for begin, end in sorted(intervals):
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((begin, end))
    return found


def shared_times(of: Iterable[Interval], by: Iterable[Interval]) -> list[float]:
    """For each of the first intervals, the time in which one of the others runs."""
    spans = joined(by)
    begins, ends = [a for a, _ in spans], [b for _, b in spans]
    near = lambda a, b: spans[bisect_right(ends, a) : bisect_left(begins, b)]
    return [sum(min(b, d) - max(a, c) for c, d in near(a, b)) for a, b in of]


def covered(of: Iterable[Interval], by: Iterable[Interval]) -> float:
    """The share of the first intervals' time in which one of the others runs; 0 without any."""
    of = joined(of)
    total = sum(end - begin for begin, end in of)
    return sum(shared_times(of, by)) / total if total else 0.0


def device_events(trace: Path) -> list[dict[str, Any]]:
    """Kernels and copies of a trace."""
    events = json.loads(trace.read_text())["traceEvents"]
    return [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]


def overlap_figures(transfers: list[Interval], kernels: list[Interval]) -> dict[str, Any]:
    """Figures of a step.

    A layer's transfer begins before the layer before it ends if and only if a kernel runs during
    the transfer, because the layer's own kernels wait for it. Embedding, first layer and head have
    no layer before them.

    Args:
        transfers: of the base's bytes, in microseconds.
        kernels: that compute.
    """
    spans = joined(kernels)
    whole = [(spans[0][0], spans[-1][1])] if spans else []
    return {
        "transfers": len(transfers),
        "transfers_ms": round(sum(b - a for a, b in transfers) / 1e3, 3),
        "beside_kernels": round(covered(transfers, spans), 4),
        "without_any_kernel": sum(x == 0 for x in shared_times(transfers, spans)),
        "idle": round(1 - covered(whole, spans), 4) if whole else None,
    }
