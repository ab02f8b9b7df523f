"""largest_batch(): how many rows are generated at a time if the caller does not say."""

import torch

from fastlora.generation.cache import slot_bytes
from fastlora.models.state import ModelState
from fastlora.ops.decode.product import MAX_BATCH
from fastlora.runtime.host_memory import free_host_memory

# The kernels of a decode step serve 64 rows; more run in plain torch.
_MOST_ROWS = MAX_BATCH
_MOST_ROWS_ON_CPU = 16

# The share of free memory that slots may take. Prefill and the logits need some too.
_SHARE = 0.8


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
    return max(1, min(_MOST_ROWS_ON_CPU, int(_SHARE * free_host_memory()) // per_row))
