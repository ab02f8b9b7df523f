"""SwiGLU over adapted gate and up: h = silu(g + s_g xA_g B_g') * (u + s_u xA_u B_u'), and h A' for
the down projection's LoRA. With gelu=True it is GeGLU: the tanh form of GELU takes SiLU's place.

Here g and u are the base products of the gate and up projections, and xA_g and xA_u are their
inputs times A' (Shazeer 2020, arXiv:2002.05202; Hu et al. 2021, arXiv:2106.09685). With DoRA each
sum is multiplied with one gain per output (Liu et al. 2024, arXiv:2402.09353).

The reference is the specification; the op runs swiglu_kernel.py. For the backward pass it keeps g,
u and tensors of the rank's width, and neither h nor the adapted gate and up.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fastlora.ops.launch import implement
from fastlora.ops.linear.times_a import times_a


def gate_product(
    gate: Float[Tensor, "*n f"], up: Float[Tensor, "*n f"], *, gelu: bool
) -> Float[Tensor, "*n f"]:
    """silu(gate) * up, or gelu(gate) * up with the tanh form of GELU."""
    return (F.gelu(gate, approximate="tanh") if gelu else F.silu(gate)) * up


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
    gelu: bool = False,
) -> tuple[Float[Tensor, "*n f"], Float[Tensor, "*n r_a"] | None]:
    """(h, h A' or None), differentiable in every tensor any number of times."""
    gate = g + scaling_g * F.linear(gate_x_a, b_g)
    up = u + scaling_u * F.linear(up_x_a, b_u)
    if gains is not None:
        gate, up = (gains[0] * gate).to(g.dtype), (gains[1] * up).to(u.dtype)
    h = gate_product(gate, up, gelu=gelu)
    return h, None if a is None else F.linear(h, a)


# ── 2. op and derivative ──────────────────────────────────────────────────────────────────
# h A' is computed outside the op, so that a recompute policy can keep it. One autograd.Function
# spans both, because the gradient of h has two terms, dy W from the down projection's base product
# and dh_a A from its LoRA. The kernel computes the second inside its tile, so that term never
# exists as a tensor of the MLP's width.
torch.library.define(
    "fastlora::lora_swiglu",
    "(Tensor g, Tensor u, Tensor gate_x_a, Tensor up_x_a, Tensor b_g, Tensor b_u, Tensor? gains,"
    " float scaling_g, float scaling_u, bool gelu=False) -> Tensor",
)

torch.library.define(
    "fastlora::lora_swiglu_backward",
    "(Tensor(a!) dh, Tensor? dh_a, Tensor? a, Tensor g, Tensor u, Tensor gate_x_a, Tensor up_x_a,"
    " Tensor b_g, Tensor b_u, Tensor? gains, float scaling_g, float scaling_u, bool gelu=False)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@implement("fastlora::lora_swiglu")
def _lora_swiglu(*args):
    from fastlora.ops.swiglu.swiglu_kernel import swiglu  # noqa: PLC0415  imports triton

    return swiglu(*args)


@implement("fastlora::lora_swiglu_backward")
def _lora_swiglu_backward(*args):
    from fastlora.ops.swiglu.swiglu_kernel import swiglu_backward_  # noqa: PLC0415  imports triton

    return swiglu_backward_(*args)


@torch.library.register_fake("fastlora::lora_swiglu")
def _(g, u, gate_x_a, up_x_a, b_g, b_u, gains, scaling_g, scaling_u, gelu=False):
    return torch.empty_like(g)


@torch.library.register_fake("fastlora::lora_swiglu_backward")
def _(dh, dh_a, a, g, u, gate_x_a, up_x_a, b_g, b_u, gains, scaling_g, scaling_u, gelu=False):
    f, new = g.shape[1], g.new_empty
    da = new((0 if a is None else a.shape[0], f))
    dbs = new((f, gate_x_a.shape[1])), new((f, up_x_a.shape[1]))
    return torch.empty_like(u), *dbs, da, new((2, f), dtype=torch.float32)


class _LoRASwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, g, u, gate_x_a, up_x_a, b_g, b_u, a, gains, scaling_g, scaling_u, gelu):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(g, u, gate_x_a, up_x_a, b_g, b_u, a, gains)
        ctx.scalings, ctx.gelu = (scaling_g, scaling_u), gelu
        op = torch.ops.fastlora.lora_swiglu
        h = op(g, u, gate_x_a, up_x_a, b_g, b_u, gains, scaling_g, scaling_u, gelu)
        return h, None if a is None else times_a(h, a)

    @staticmethod
    def backward(ctx, dh, dh_a):  # pyright: ignore[reportIncompatibleMethodOverride]
        if torch.is_grad_enabled():  # create_graph=True, but the kernel is not differentiable
            raise RuntimeError(
                "the fused SwiGLU has no second derivative; differentiate fastlora.functional with"
                " torch.func, which runs the reference."
            )
        g, u, gate_x_a, up_x_a, b_g, b_u, a, gains = ctx.saved_tensors
        scaling_g, scaling_u = ctx.scalings
        # The kernel overwrites h's gradient with dg. A layer's memory peak is then four tensors of
        # the MLP's width and not five. In eager mode autograd may still need h's gradient, so we
        # clone it; a compiled graph copies it only if it is used again.
        dg = torch.zeros_like(g) if dh is None else dh
        tracing = torch.compiler.is_compiling()
        dg = dg.contiguous() if tracing else dg.clone(memory_format=torch.contiguous_format)
        used_a = None if dh_a is None else a
        du, db_g, db_u, da, dgains = torch.ops.fastlora.lora_swiglu_backward(
            dg, dh_a, used_a, g, u, gate_x_a, up_x_a, b_g, b_u, gains, *ctx.scalings, ctx.gelu
        )
        dgate_x_a, dup_x_a = torch.mm(dg, b_g) * scaling_g, torch.mm(du, b_u) * scaling_u
        da = None if dh_a is None else da
        dgains = None if gains is None else dgains
        return dg, du, dgate_x_a, dup_x_a, db_g, db_u, da, dgains, None, None, None


# ── 3. public functions ───────────────────────────────────────────────────────────────────

# The kernel is measured faster up to rank 16 (one tile, swiglu_kernel.py). For larger ranks it is
# correct, but its speed is not measured.
_LARGEST_RANK = 16


def kernel_supports(dtype: torch.dtype, *ranks: int) -> bool:
    """Whether the kernel is tested and measured to be faster for this dtype and these ranks."""
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
    *,
    gelu: bool = False,
) -> tuple[Float[Tensor, "*n f"], Float[Tensor, "*n r_a"] | None]:
    """(h, h A' or None), in g.dtype. Runs a Triton kernel. All inputs but `gains` have g.dtype.

    Args:
        g: base product of the gate projection.
        u: base product of the up projection.
        gate_x_a: gate's input (after dropout) times its A'; may be a slice of a wider tensor.
        up_x_a: up's input (after dropout) times its A'.
        b_g: LoRA's B of the gate projection.
        b_u: LoRA's B of the up projection.
        a: LoRA's A of the down projection; None if it has no adapter, or if its A does not
            multiply h itself (dropout).
        gains: DoRA's m / n of gate and of up, in float32; None without DoRA.
        scaling_g: factor of gate's low-rank term (alpha / r).
        scaling_u: factor of up's low-rank term.
        gelu: the gate's activation is GELU's tanh form, and not SiLU.

    Raises:
        RuntimeError: in the backward pass, if it is run with create_graph=True.
    """
    flat = lambda x: x.reshape(-1, x.shape[-1])
    x_a = flat(gate_x_a), flat(up_x_a)
    h, h_a = _LoRASwiGLU.apply(  # pyright: ignore
        flat(g), flat(u), *x_a, b_g, b_u, a, gains, scaling_g, scaling_u, gelu
    )
    n = g.shape[:-1]
    return h.view(*n, -1), None if h_a is None else h_a.view(*n, -1)
