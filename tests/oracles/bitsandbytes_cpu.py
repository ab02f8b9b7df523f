"""bitsandbytes' dequantisation on the CPU, right for all shapes.

Its code for AVX-512 (0.50.2) takes the wrong absmax if blocks span rows and 16 divides the number
of columns: 40 x 96 normal values in blocks of 64 come back some 26 % off, not 9 %.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def plain_dequantisation() -> Iterator[None]:
    """Within the block bitsandbytes' op on the CPU is its own code in plain torch."""
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
    from bitsandbytes.backends.utils import _get_4bit_code

    def op(
        packed: Tensor,
        absmax: Tensor,
        blocksize: int,
        quant_type: str,
        shape: list[int],
        dtype: torch.dtype,
    ) -> Tensor:
        levels = _get_4bit_code(quant_type, packed.device)
        values, by_blocks = packed.view(torch.uint8).reshape(-1), _dequantize_4bit_compute
        return by_blocks.__wrapped__(values, absmax, levels, blocksize, shape, dtype)

    with torch.library._scoped_library("bitsandbytes", "IMPL") as library:
        with warnings.catch_warnings(action="ignore"):  # that it overrides the op
            library.impl("dequantize_4bit", op, "CPU", allow_override=True)
        yield
