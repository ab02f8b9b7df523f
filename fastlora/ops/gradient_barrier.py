"""A gradient that Inductor forms in one kernel and reads in another.

Inductor may write a value to memory in the first loop of a kernel over rows and read it back in
the second, with no barrier between. Triton then lets one thread read what another has not written
yet, wherever store and load are spread over the threads in different ways: a float32 store beside
16-bit loads (triton#10924, pytorch#190519; seen in torch 2.11 and 2.13). RMSNorm's gradient behind
a mixture of experts was such a kernel, its scratch the sum over a token's experts: gradients off by
a hundred times their length, in one step of some five, on an H100.

scripts/layer_kernels.py names such kernels, scripts/gpu_check.py looks for them in all it compiled.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from fastlora.ops.dispatch import transforms_active

# Says that it writes to x, and does nothing: what comes before it and what comes after it cannot be
# one kernel, and no byte moves.
torch.library.define("fastlora::settle_", "(Tensor(a!) x) -> ()")


@torch.library.impl("fastlora::settle_", "CompositeExplicitAutograd")
def _settle_(x):
    pass


@torch.library.register_fake("fastlora::settle_")
def _(x):
    pass


class _GradientBarrier(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx):  # pyright: ignore[reportIncompatibleMethodOverride]
        if not torch.is_grad_enabled():  # create_graph=True: what is differentiated is not written
            torch.ops.fastlora.settle_(dx)
        return dx


def gradient_barrier(x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
    """x; compiled, no kernel both forms its gradient and goes on with it."""
    if transforms_active() or not torch.compiler.is_compiling():
        return x
    return _GradientBarrier.apply(x)  # pyright: ignore[reportReturnType]
