"""Triton kernel of `norm_rows`: one program for each row."""

# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false
import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from fastlora.ops.launch import launch, pdl_options


# As in linear_kernel.py: no helper functions, and what no kernel writes is read before the wait.
@triton.jit
def norm_kernel(
    x_ptr, weight_ptr, residual_ptr, out_ptr, eps, D: tl.constexpr, BLOCK: tl.constexpr,
    NARROW: tl.constexpr, RESIDUAL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + i, mask=i < D, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    loaded = tl.load(x_ptr + row * D + i, mask=i < D, other=0.0)
    x = loaded.to(tl.float32)
    y = x * (1 / tl.sqrt(tl.sum(x * x, 0) / D + eps))
    if NARROW:
        y = y.to(loaded.dtype).to(tl.float32)
    y *= weight
    if RESIDUAL:  # the result is rounded before it is added, as in plain torch
        y = y.to(loaded.dtype).to(tl.float32)
        y += tl.load(residual_ptr + row * D + i, mask=i < D, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * D + i, y.to(loaded.dtype), mask=i < D)


def launch_norm(
    x: Float[Tensor, "n d"],
    factor: Float[Tensor, "d"],
    eps: float,
    residual: Float[Tensor, "n d"] | None,
    *,
    narrow: bool,
    pdl: bool | None = None,
) -> Float[Tensor, "n d"]:
    """`norm_rows` through the kernel.

    Args:
        x: contiguous.
        factor: of the normalised value, in any dtype.
        eps: added to the mean square.
        residual: contiguous, or None.
        narrow: whether the normalised value is rounded to x.dtype before it is multiplied.
        pdl: whether the kernel may start before the one before it ends; None: if the GPU can.
    """
    n, d = x.shape
    assert x.is_contiguous() and (residual is None or residual.is_contiguous())
    block = triton.next_power_of_2(d)
    out = torch.empty_like(x)
    launch(
        norm_kernel, (n,),
        x, factor, x if residual is None else residual, out, eps, D=d, BLOCK=block,
        NARROW=narrow, RESIDUAL=residual is not None,
        num_warps=max(1, min(8, block // 512)), **pdl_options(x, pdl),
    )  # fmt: skip
    return out
