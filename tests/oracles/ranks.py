"""Laws that several processes check together: started once, they run all laws of a file."""

import os
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Law = Callable[[Path], Any]


def run_laws(ranks: int, laws: Mapping[str, Law], folder: Path) -> dict[str, list[Any]]:
    """Name -> what each rank's law returned, or the traceback of its error as text.

    Laws are functions at the top of a module, because processes import them. After an error a rank
    runs no further laws, and its process group ends, so that the others do not wait for it.
    """
    with socket.socket() as probe:  # a port that is free now
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_rank, (ranks, port, dict(laws), folder), nprocs=ranks)
    results = [torch.load(folder / f"rank{i}.pt", weights_only=False) for i in range(ranks)]
    return {name: [r.get(name, "not run") for r in results] for name in laws}


def _rank(rank: int, ranks: int, port: int, laws: dict[str, Law], folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    results: dict[str, Any] = {}
    for name, law in laws.items():
        try:
            results[name] = law(folder)
        except Exception:  # noqa: BLE001  reported by the test
            results[name] = traceback.format_exc()
            print(results[name], file=sys.stderr)
            break
    torch.save(results, folder / f"rank{rank}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()
