"""largest_batch(): how many rows are generated at a time if the caller does not say."""

import os
from pathlib import Path

import torch

from fastlora.generation.cache import slot_bytes
from fastlora.models.state import ModelState
from fastlora.ops.decode.product import MAX_BATCH

# The kernels of a decode step serve 64 rows; more run in plain torch.
_MOST_ROWS = MAX_BATCH
_MOST_ROWS_ON_CPU = 16

# The share of free memory that slots may take. Prefill and the logits need some too.
_SHARE = 0.8

_MEMINFO = Path("/proc/meminfo")


def largest_batch(model: ModelState, length: int) -> int:
    """How many rows of `length` tokens fit into the free memory; at most 64, or 16 on a CPU."""
    like, v = model.base["norm"], model.spec.config.vocab_size
    # A row's logits exist in the base's dtype, and while sampling five times in 4 or 8 bytes.
    per_row = slot_bytes(model.spec.config, like.dtype, length) + 32 * v
    if like.is_cuda:
        free, _ = torch.cuda.mem_get_info(like.device)
        # What torch has reserved and does not use is free for us, too.
        free += torch.cuda.memory_reserved(like.device) - torch.cuda.memory_allocated(like.device)
        return max(1, min(_MOST_ROWS, int(_SHARE * free) // per_row))
    return max(1, min(_MOST_ROWS_ON_CPU, int(_SHARE * _host_memory()) // per_row))


def _host_memory() -> int:
    """Bytes that this process can get on the host.

    Linux includes what its page cache would give back: after a large file was read, few pages are
    unused. Other systems report their memory in all, of which half counts.
    """
    if _MEMINFO.exists():
        lines = [line.split() for line in _MEMINFO.read_text().splitlines()]
        found = [int(words[1]) for words in lines if words and words[0] == "MemAvailable:"]
        if found:
            return 1024 * found[0]  # the file counts in KiB
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
