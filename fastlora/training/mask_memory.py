"""The memory of attention masks, which are built where the attention kernels do not run."""

from fastlora.models.state import ModelState
from fastlora.ops.attention.flash import kernel_supports
from fastlora.ops.dispatch import use_kernel

_LARGEST_GIB = 8


def large_mask(model: ModelState, rows: int, length: int, ranks: int) -> str | None:
    """The memory of a mask that is larger than 8 GiB, and why it is built; None for others.

    Where the attention kernels run, no mask is built. They need a GPU, 16-bit weights and a head
    size of 64, 128 or 256. Elsewhere a model that was loaded at a context of 131,072 tokens would
    ask for 16 GiB a sequence.

    Args:
        model: that attends.
        rows: sequences in a batch.
        length: tokens of each.
        ranks: number of ranks that share a row. Each has the mask of its own queries.
    """
    config, norm = model.spec.config, model.base["norm"]
    heads = (config.num_attention_heads, config.head_dim)
    if kernel_supports(norm.dtype, *heads, length) and use_kernel(norm, model.spec.kernels):
        return None
    # bool elements of one byte; the mask has one entry for all heads.
    gib = rows * length**2 / ranks / 2**30
    if gib <= _LARGEST_GIB:
        return None
    return (
        f"needs an attention mask of {gib:.0f} GiB, because the attention kernels do not run for"
        f" {norm.dtype} and heads of {config.head_dim} on {norm.device.type} with"
        f" kernels={model.spec.kernels!r}"
    )
