"""The process group: an existing one is used, else one is started for a launched process.

All calls of torch.distributed that start or end groups are in this file.
"""

import atexit
import os
import socket
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from fastlora.distributed.launch import launched
from fastlora.distributed.rounds import agree_on_round
from fastlora.distributed.waiting import FOREVER, Waits

# Ranks come to train at different times, because one of them downloads, or encodes rows.
MEET_SECONDS = 1800.0


class Groups(NamedTuple):
    """The groups of a run, and how to wait in them."""

    device: Any
    """The group that sums tensors of the model's device."""
    host: Any
    """A gloo group, for what is on the CPU."""
    waits: Waits


def needs_group() -> bool:
    """Whether this process is one of several, or has a process group already."""
    if not dist.is_available():
        return False
    if dist.is_initialized():
        return True
    launch = launched()
    return launch is not None and launch.ranks > 1


def are_several() -> bool:
    """Whether this process is one of several ranks."""
    if not needs_group():
        return False
    return not dist.is_initialized() or dist.get_world_size() > 1


def open_groups(device: torch.device) -> Groups:
    """The groups of a run over all ranks. `close_groups` ends the host's one.

    The default process group is started if there is none.

    Raises:
        TimeoutError: a rank does not come; the message names it.
    """
    start_group(device)
    rank, count = dist.get_rank(), dist.get_world_size()
    c10d: Any = dist.distributed_c10d
    store = c10d._get_default_store()
    # The store outlives a run. The number of this process's runs keeps their keys apart.
    run = store.add(f"fastlora/runs/{rank}", 1)
    waits = Waits(c10d.PrefixStore(f"fastlora/{run}/", store), rank, count)
    waits.arrive("fastlora.train", MEET_SECONDS)
    host: Any = dist.new_group(backend="gloo", timeout=FOREVER)
    # A group that the user started with NCCL alone cannot sum tensors on the CPU.
    return Groups(dist.group.WORLD if device.type == "cuda" else host, host, waits)


def close_groups(groups: Groups, failed: bool) -> None:
    """End the host's group; after a failure also leave the default group to the system.

    NCCL waits for collectives that are under way when its group is ended. After a failure these
    may never end, and the launcher would wait for this process.
    """
    if failed:
        atexit.unregister(_end)
        return
    dist.destroy_process_group(groups.host)


def start_group(device: torch.device) -> None:
    """Start the default process group if there is none: NCCL with gloo for CUDA, else gloo.

    It is ended when Python ends: a process may train several times, and NCCL takes seconds to
    start.
    """
    if dist.is_initialized():
        return
    c10d: Any = dist
    wait = timedelta(seconds=MEET_SECONDS)
    store, rank, count = next(c10d.rendezvous("env://", timeout=wait))
    store = dist.distributed_c10d.PrefixStore("fastlora", store)
    name = agree_on_round(store, rank, count, MEET_SECONDS)
    # FOREVER: Waits times out earlier, and names a rank.
    how: dict[str, Any] = dict(rank=rank, world_size=count, timeout=FOREVER)
    how["store"] = dist.distributed_c10d.PrefixStore(name, store)
    if device.type == "cuda":
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device, **how)
    else:
        dist.init_process_group("gloo", **how)
    atexit.register(_end)


def _end() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def this_process(device: torch.device) -> dict[str, str]:
    """Names of this process for messages: its machine, process id and GPU."""
    gpu = ""
    if device.type == "cuda":
        gpu = str(getattr(torch.cuda.get_device_properties(device), "uuid", device))
    return {"host": socket.gethostname(), "process": str(os.getpid()), "gpu": gpu}


def start_all_gather(out: torch.Tensor, own: torch.Tensor, group: Any) -> Any:
    """Begin to gather equal parts of all ranks into `out`. torch 2.13 renamed the function."""
    gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return gather(out, own, group=group, async_op=True)
