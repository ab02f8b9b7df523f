"""SwiGLU over adapted gate and up: h = silu(g + s low_g B_g') * (u + s low_u B_u')
(Shazeer 2020, arXiv:2002.05202; Hu et al. 2021, arXiv:2106.09685), and h A' for down's LoRA.
With DoRA each sum is scaled, one factor for each output (Liu et al. 2024, arXiv:2402.09353).

Read downward: the reference is the specification; the op runs swiglu_kernel.py. Its derivative
keeps g, u and what is of the rank, and neither h nor the adapted gate and up.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fastlora.ops.dispatch import rank_tile


# ── 1. reference ──────────────────────────────────────────────────────────────────────────
def lora_swiglu_reference(
    g: Float[Tensor, "*n f"],
    u: Float[Tensor, "*n f"],
    gate_x_a: Float[Tensor, "*n r_g"],
    up_x_a: Float[Tensor, "*n r_u"],
    b_g: Float[Tensor, "f r_g"],
    b_u: Float[Tensor, "f r_u"],
    a: Float[Tensor, "r_a f"] | None,
    gains: Float[Tensor, "2 f"] | None,
    scaling_g: float,
    scaling_u: float,
) -> tuple[Float[Tensor, "*n f"], Float[Tensor, "*n r_a"] | None]:
    """(h, h A' or None), differentiable in every tensor any number of times."""
    gate = g + scaling_g * F.linear(gate_x_a, b_g)
    up = u + scaling_u * F.linear(up_x_a, b_u)
    if gains is not None:
        gate, up = (gains[0] * gate).to(g.dtype), (gains[1] * up).to(u.dtype)
    h = F.silu(gate) * up
    return h, None if a is None else F.linear(h, a)


# ── 2. op and derivative ──────────────────────────────────────────────────────────────────
# h A' is a product of its own, outside the op, so that a recompute policy can keep it; but the
# autograd.Function is one, because the gradient of h arrives in two parts, dy W and dlow A, and the
# second is of the MLP's width only until it is a dot product inside the kernel's tile.
torch.library.define(
    "fastlora::lora_swiglu",
    "(Tensor g, Tensor u, Tensor x_a_g, Tensor x_a_u, Tensor b_g, Tensor b_u, Tensor? gains,"
    " float scaling_g, float scaling_u) -> Tensor",
)

torch.library.define(
    "fastlora::lora_swiglu_backward",
    "(Tensor(a!) dh, Tensor? dlow, Tensor? a, Tensor g, Tensor u, Tensor x_a_g, Tensor x_a_u,"
    " Tensor b_g, Tensor b_u, Tensor? gains, float scaling_g, float scaling_u)"
    " -> (Tensor, Tensor, Tensor)",
)


@torch.library.impl("fastlora::lora_swiglu", "CompositeExplicitAutograd")
def _lora_swiglu(*args):
    from fastlora.ops.swiglu.swiglu_kernel import swiglu  # noqa: PLC0415  imports triton

    return swiglu(*args)


@torch.library.impl("fastlora::lora_swiglu_backward", "CompositeExplicitAutograd")
def _lora_swiglu_backward(*args):
    from fastlora.ops.swiglu.swiglu_kernel import swiglu_backward_  # noqa: PLC0415  imports triton

    return swiglu_backward_(*args)


@torch.library.register_fake("fastlora::lora_swiglu")
def _(g, u, gate_x_a, up_x_a, b_g, b_u, gains, scaling_g, scaling_u):
    return torch.empty_like(g)


@torch.library.register_fake("fastlora::lora_swiglu_backward")
def _(dh, dlow, a, g, u, gate_x_a, up_x_a, b_g, b_u, gains, scaling_g, scaling_u):
    ranks = [gate_x_a.shape[1], up_x_a.shape[1], 0 if a is None else a.shape[0]]
    sums = g.new_empty((3, g.shape[1], rank_tile(*ranks)), dtype=torch.float32)
    return torch.empty_like(u), sums, sums.new_empty((2, g.shape[1]))


class _LoRASwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, g, u, gate_x_a, up_x_a, b_g, b_u, a, gains, scaling_g, scaling_u):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(g, u, gate_x_a, up_x_a, b_g, b_u, a, gains)
        ctx.scalings = scaling_g, scaling_u
        op = torch.ops.fastlora.lora_swiglu
        h = op(g, u, gate_x_a, up_x_a, b_g, b_u, gains, scaling_g, scaling_u)
        return h, None if a is None else torch.mm(h, a.t())

    @staticmethod
    def backward(ctx, dh, dlow):  # pyright: ignore[reportIncompatibleMethodOverride]
        if torch.is_grad_enabled():  # create_graph=True, but what follows is not differentiable
            raise RuntimeError(
                "the fused SwiGLU has no second derivative; differentiate fastlora.functional with"
                " torch.func, which runs the plain one."
            )
        g, u, gate_x_a, up_x_a, b_g, b_u, a, gains = ctx.saved_tensors
        scaling_g, scaling_u = ctx.scalings
        # The kernel writes dg over h's gradient: of five tensors of the MLP's width, which are a
        # layer's peak, four are left. A compiled graph knows whether that one is still wanted.
        dg = torch.zeros_like(g) if dh is None else dh
        tracing = torch.compiler.is_compiling()
        dg = dg.contiguous() if tracing else dg.clone(memory_format=torch.contiguous_format)
        own_a = None if dlow is None else a
        du, sums, dgains = torch.ops.fastlora.lora_swiglu_backward(
            dg, dlow, own_a, g, u, gate_x_a, up_x_a, b_g, b_u, gains, *ctx.scalings
        )
        part = lambda i, rank, like: sums[i, :, :rank].to(like.dtype)
        dlow_g, dlow_u = torch.mm(dg, b_g) * scaling_g, torch.mm(du, b_u) * scaling_u
        db_g, db_u = part(0, b_g.shape[1], b_g), part(1, b_u.shape[1], b_u)
        # Contiguous, as A is: torch's fused AdamW asks for gradients of the same layout.
        db_g, db_u = db_g.contiguous(), db_u.contiguous()
        da = None if dlow is None else part(2, a.shape[0], a).t().contiguous()
        return dg, du, dlow_g, dlow_u, db_g, db_u, da, None if gains is None else dgains, None, None


# ── 3. what the model calls ───────────────────────────────────────────────────────────────

# What was timed: a tile of 16 ranks pays (swiglu_kernel.py); wider ones were only found right.
_LARGEST_RANK = 16


def kernel_supports(dtype: torch.dtype, *ranks: int) -> bool:
    """Whether the kernel is known to pay for tensors of this dtype and these ranks."""
    return dtype in (torch.bfloat16, torch.float16, torch.float32) and max(ranks) <= _LARGEST_RANK


def lora_swiglu(
    g: Float[Tensor, "*n f"],
    u: Float[Tensor, "*n f"],
    gate_x_a: Float[Tensor, "*n r_g"],
    up_x_a: Float[Tensor, "*n r_u"],
    b_g: Float[Tensor, "f r_g"],
    b_u: Float[Tensor, "f r_u"],
    a: Float[Tensor, "r_a f"] | None,
    gains: Float[Tensor, "2 f"] | None,
    scaling_g: float,
    scaling_u: float,
) -> tuple[Float[Tensor, "*n f"], Float[Tensor, "*n r_a"] | None]:
    """(h, h A' or None), in g.dtype; every tensor but the gains has it. Runs a Triton kernel.

    Args:
        g: base product of the gate projection.
        u: of the up projection.
        low_g: input (dropped out, where dropout is on) of gate times its A'; rows may be apart.
        low_u: of up.
        b_g: gate's up-projecting matrix.
        b_u: up's.
        a: the down projection's A, or None where it has none of its own, or another input.
        gains: DoRA's m / n of gate and of up, in float32; None without DoRA.
        scaling_g: factor of gate's low-rank term.
        scaling_u: of up's.
    """
    flat = lambda x: x.reshape(-1, x.shape[-1])
    h, x_a = _LoRASwiGLU.apply(  # pyright: ignore
        flat(g), flat(u), flat(gate_x_a), flat(up_x_a), b_g, b_u, a, gains, scaling_g, scaling_u
    )
    n = g.shape[:-1]
    return h.view(*n, -1), None if x_a is None else x_a.view(*n, -1)
