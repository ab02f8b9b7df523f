"""Bench: rows of one job of ranks, and measurements that may fail without ending the others."""

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastlora.distributed.data_parallel import Group
from fastlora.distributed.process_group import Groups, start_group
from fastlora.distributed.waiting import Waits
from fastlora.runtime.layer_fetching import bytes_outside_allocator


class Bench:
    """The ranks of a job, and the file of rows, which rank 0 writes."""

    def __init__(self, out: Path, device: torch.device, title: dict[str, Any]) -> None:
        """Start the process group.

        Args:
            out: a file of JSON lines.
            device: of this rank.
            title: what all rows have.
        """
        self.out, self.device, self.title = out, device, title
        start_group(device)
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.host: Any = dist.new_group(backend="gloo")
        self._subgroups = 0

    def row(self, part: str, name: str, **figures: Any) -> None:
        """Write and print a row."""
        if self.rank == 0:
            line = json.dumps({**self.title, "part": part, "name": name, **figures})
            with self.out.open("a") as file:
                file.write(line + "\n")
            print(line, flush=True)

    def measured(self, part: str, name: str, measure: Callable[[], dict[str, Any] | None]) -> Any:
        """Write the row of a measurement, or its error; returns the figures, or None.

        All ranks learn whether one has failed. If it failed within a collective, the others wait
        until the job's time is over, and the next job goes on.
        """
        figures, error = None, ""
        try:
            figures = measure()
        except Exception as problem:  # noqa: BLE001  the other measurements go on
            error = f"rank {self.rank}: {type(problem).__name__}: {problem}"[:600]
        errors = [e for e in self.gathered(error) if e]
        if errors:
            self.row(part, name, error=errors[0])
            figures = None
        elif figures is not None:
            self.row(part, name, **figures)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return figures

    def gathered(self, value: Any) -> list[Any]:
        """The values of all ranks."""
        every: list[Any] = [None] * self.ranks
        dist.all_gather_object(every, value, group=self.host)
        return every

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def timed(self, step: Callable[[], Any], runs: int, warm: int = 2, group: Any = None) -> dict:
        """Milliseconds of each call: the median and the spread of this rank."""
        for _ in range(warm):
            step()
        times = []
        for _ in range(runs):
            self.synchronize()
            dist.barrier(group=group or self.host)
            begin = time.perf_counter()
            step()
            self.synchronize()
            times.append(1e3 * (time.perf_counter() - begin))
        spread = max(times) - min(times)
        return {"ms": round(statistics.median(times), 3), "spread_ms": round(spread, 3)}

    def reset_peak(self) -> None:
        """Begin to watch the peak of memory."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()

    def peak_gib(self, base: Any) -> float | None:
        """The peak of memory of a step over a base; None on the CPU."""
        if self.device.type != "cuda":
            return None
        memory = torch.cuda.max_memory_allocated() + bytes_outside_allocator(base)
        return round(memory / 2**30, 3)

    def subgroup(self, count: int) -> Group | None:
        """The first `count` ranks as `train` would have them; None on the others.

        All ranks must call this.
        """
        self._subgroups += 1
        ranks = list(range(count))
        device: Any = dist.new_group(ranks) if self.device.type == "cuda" else None
        if self.rank >= count:
            return None
        # Only its members make the gloo group. new_group would make the others split NCCL's group
        # too, which waits for the members to do so (torch 2.11 and 2.13, device_id given).
        host: Any = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
        device = host if device is None else device
        c10d: Any = dist.distributed_c10d
        store = c10d.PrefixStore(f"bench/{self._subgroups}/", c10d._get_default_store())
        return Group(Groups(device, host, Waits(store, self.rank, count)), self.device)


def digest(tensors: Sequence[Tensor]) -> str:
    """A hash of the bits of tensors."""
    found = hashlib.sha256()
    for x in tensors:
        found.update(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]
