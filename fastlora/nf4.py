"""What of a matrix is left after 4-bit NormalFloat quantisation, through bitsandbytes.

bitsandbytes is imported at the first call, not with the package: it takes a second and brings in
more than fastlora itself.
"""

from importlib import import_module

import torch
from jaxtyping import Float
from torch import Tensor

BLOCK = 64  # values that share one scale; QLoRA's and PEFT's choice


def nf4_rounded(weight: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "d_out d_in"]:
    """The matrix after a round trip through NF4, in float32, on its own device.

    Each run of 64 values becomes its largest magnitude, kept in float32 (no double quantisation),
    times 16 quantiles of a normal distribution (Dettmers et al. 2023, arXiv:2305.14314, section 3).

    Raises:
        ModuleNotFoundError: if bitsandbytes is not installed.
    """
    try:
        kernels = import_module("bitsandbytes.functional")
    except ModuleNotFoundError as error:
        cure = "4-bit quantisation needs bitsandbytes: pip install bitsandbytes."
        raise ModuleNotFoundError(cure) from error
    kind = dict(blocksize=BLOCK, quant_type="nf4")
    wide = weight.to(torch.float32).contiguous()
    packed, state = kernels.quantize_4bit(wide, compress_statistics=False, **kind)
    return kernels.dequantize_4bit(packed, state, **kind).view_as(wide)
