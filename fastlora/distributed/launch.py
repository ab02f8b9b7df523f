"""launched(): the place of this process among those that a launcher, such as torchrun, started.

torchrun and Ray Train set the same names: RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE.
torchrun also counts its restarts.
"""

import os
from dataclasses import dataclass

import torch

from fastlora.errors import raise_problems


@dataclass(frozen=True, slots=True)
class Launch:
    """This process among those that were launched together."""

    rank: int
    """In [0, ranks)."""
    ranks: int
    local_rank: int
    """Among the processes of this machine, in [0, local_ranks)."""
    local_ranks: int
    restarts: int
    """How often torchrun has started this group of processes again."""


def launched() -> Launch | None:
    """This process's place; None if no launcher has set RANK and WORLD_SIZE.

    Raises:
        ValueError: a variable is not a whole number, or a rank is not below its count.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    problems: list[str] = []

    def read(name: str, default: int) -> int:
        text = os.environ.get(name, str(default))
        if text.isascii() and text.isdecimal():
            return int(text)
        problems.append(f"{name}={text[:40]!r}: expected a whole number >= 0")
        return default

    rank, ranks = read("RANK", 0), read("WORLD_SIZE", 1)
    local_rank, local_ranks = read("LOCAL_RANK", rank), read("LOCAL_WORLD_SIZE", ranks)
    restarts = read("TORCHELASTIC_RESTART_COUNT", 0)
    for name, place, count_name, count in (
        ("RANK", rank, "WORLD_SIZE", ranks),
        ("LOCAL_RANK", local_rank, "LOCAL_WORLD_SIZE", local_ranks),
    ):
        if place >= count and not problems:
            problems.append(f"{name}={place} is not below {count_name}={count}")
    heading = "the environment variables of a launcher, such as torchrun, are wrong:"
    raise_problems(ValueError, heading, problems, "Unset RANK and WORLD_SIZE to train alone.")
    return Launch(rank, ranks, local_rank, local_ranks, restarts)


def own_device(device: torch.device) -> torch.device:
    """A CUDA device without an index becomes cuda:LOCAL_RANK in a launched process, and the current
    device of CUDA. Other devices, and those of a process that was not launched, stay.

    A process that sees one GPU only, because its launcher set CUDA_VISIBLE_DEVICES, gets that one.
    Kernels that Triton launches run on the current device, so it has to be the process's own.

    Raises:
        ValueError: this machine has fewer GPUs than processes.
    """
    if device.type != "cuda" or (launch := launched()) is None:
        return device
    if device.index is None:
        count = torch.cuda.device_count()
        index = 0 if count == 1 and launch.local_ranks == 1 else launch.local_rank
        if count == 1 and os.environ.get("CUDA_VISIBLE_DEVICES"):
            index = 0
        if index >= count:
            raise ValueError(
                f"LOCAL_RANK is {launch.local_rank}, but torch finds {count} CUDA devices on this"
                f" machine; launch at most {count} processes on it (--nproc-per-node {count})"
            )
        device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device
