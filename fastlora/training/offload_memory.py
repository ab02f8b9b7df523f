"""The host memory that a run with recompute="offload" pins."""

import torch

from fastlora.distributed.mesh import node_size
from fastlora.models.levels import offload_bytes
from fastlora.models.state import ModelState
from fastlora.runtime.host_memory import free_host_memory


def large_offload(model: ModelState, rows: int, length: int, ranks: int) -> str | None:
    """The pinned memory that is more than the host can give, in words; None if it can.

    Without this, Linux would end the process without a message, or CUDA would raise in the first
    step.

    Args:
        model: with recompute="offload", on a GPU.
        rows: sequences in a batch of one rank.
        length: tokens of each.
        ranks: number of ranks that share a row. Each keeps the activations of its own tokens.
    """
    item = model.base["norm"].element_size()
    needed = offload_bytes(model.spec.config, rows * length // ranks, item) * node_size()
    # Pinned memory that torch keeps, for example of an earlier run, is used again.
    kept = torch.cuda.host_memory_stats().get("allocated_bytes.current", 0)
    free = free_host_memory() + kept * node_size()
    if needed <= free:
        return None
    several = f" for the {node_size()} ranks of this machine" if node_size() > 1 else ""
    return (
        f"keeps {needed / 2**30:.0f} GiB of activations in pinned host memory{several}, which has"
        f" {free / 2**30:.0f} GiB free"
    )
