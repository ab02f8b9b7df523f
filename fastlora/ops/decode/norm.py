"""RMSNorm of a decode step's rows, with the residual behind it: residual + x / rms(x) * weight.

Norms that come after a product, and those of q and k, are not part of the next product's kernel.
In plain torch each is some eight small kernels.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from fastlora.ops.dispatch import Kernels, use_kernel
from fastlora.ops.rms_norm import NormKind, norm_factor, rms_norm


@torch.no_grad()
def norm_rows(
    x: Float[Tensor, "n d"],
    weight: Float[Tensor, "d"],
    eps: float,
    kind: NormKind,
    residual: Float[Tensor, "n d"] | None = None,
    kernels: Kernels = "auto",
) -> Float[Tensor, "n d"]:
    """`rms_norm` of every row, plus `residual`, in x.dtype. The result has no gradient.

    Args:
        x: contiguous.
        weight: as for `rms_norm`.
        eps: as for `rms_norm`.
        kind: as for `rms_norm`.
        residual: contiguous; added to the rounded result.
        kernels: "auto", "triton" or "torch", as in ops/dispatch.py.
    """
    if not use_kernel(x, kernels) or x.dtype == torch.float64:
        y = rms_norm(x, weight, eps, kind)
        return y if residual is None else residual + y
    from fastlora.ops.decode.norm_kernel import launch_norm  # noqa: PLC0415  imports triton

    return launch_norm(x, norm_factor(weight, kind), eps, residual, narrow=kind == "narrow")
