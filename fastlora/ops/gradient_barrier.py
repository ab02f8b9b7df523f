"""An identity that makes Inductor write a gradient in one kernel and read it in another.

It avoids a race in Inductor's kernels over rows (triton#10924, pytorch#190519; seen in torch 2.11
and 2.13). Such a kernel may store a value in its first loop and load it in its second loop, with no
barrier in between. If the store and the load assign elements to threads differently, for example a
float32 store and 16-bit loads, a thread can read an element before another thread has written it.
In the backward pass of RMSNorm in front of a mixture of experts, the stored value was the sum over
a token's experts. About one step in five then had gradients wrong by 100 times their norm (H100).

scripts/bench/layer_kernels.py lists kernels with this pattern, and tests/gpu/test_inductor.py
searches for the pattern in every kernel that it compiles.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from fastlora.ops.dispatch import transforms_active

# The op declares that it writes to x, and does nothing. Inductor therefore never fuses the code
# before it with the code after it. It costs no memory traffic.
torch.library.define("fastlora::settle_", "(Tensor(a!) x) -> ()")


@torch.library.impl("fastlora::settle_", "CompositeExplicitAutograd")
def _do_nothing(x):
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
        if not torch.is_grad_enabled():  # with create_graph=True, dx must not be written to
            torch.ops.fastlora.settle_(dx)
        return dx


def gradient_barrier(x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
    """Return x. In compiled code, no kernel both writes x's gradient and reads it."""
    if transforms_active() or not torch.compiler.is_compiling():
        return x
    return _GradientBarrier.apply(x)  # pyright: ignore[reportReturnType]
