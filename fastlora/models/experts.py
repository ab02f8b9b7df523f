"""A mixture of experts: every token goes through k of E SwiGLU networks, weighted by a router.

Shazeer et al. 2017, arXiv:1701.06538, in the form of Mixtral (arXiv:2401.04088, sec. 2.1) and
Qwen3-MoE. The router's logits are computed like any other projection (mlp.py).

Tokens are sorted by expert, so that each expert reads consecutive rows (ops/linear/experts.py) and
no shape depends on the router's choices. We multiply a token's weight in before the down product,
which is linear, and not after it. Then the backward pass does not need that product's output, k * d
elements per token.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fastlora.models.params import EXPERTS, ExampleLoRA, LayerAdapter, StackedLoRA
from fastlora.ops.dispatch import transforms_active
from fastlora.ops.linear.experts import grouped_linear, grouped_lora_linear, grouped_rows
from fastlora.ops.linear.group_gradients import expert_linear, number_of_groups
from fastlora.ops.linear.group_products import group_of_rows


class Routes(NamedTuple):
    """The order in which the k copies of all tokens are sorted by expert."""

    order: Int[Tensor, "m"]  # sorted row -> copy; copy i belongs to token i // k
    place: Int[Tensor, "m"]  # its inverse: copy -> sorted row
    offsets: Int[Tensor, "e"]  # int32; for each expert, the number of the row after its last
    # Under a stack of n adapters copies are sorted by expert and adapter, or by expert and example
    # if gradients are per example, and these are the ends of each pair, as `offsets`. Otherwise it
    # is `offsets` itself.
    lora_offsets: Int[Tensor, "en"]


def chosen_experts(
    logits: Float[Tensor, "n e"], per_token: int, renormalise: bool
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """(weights, indices) of each token's experts; softmax over all experts, at least float32.

    With `renormalise` the weights of a token sum to 1.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    weights, indices = logits.to(wide).softmax(-1).topk(per_token, dim=-1)
    if renormalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, indices


def make_routes(
    indices: Int[Tensor, "n k"],
    experts: int,
    adapters: int = 1,
    adapter: Int[Tensor, "n"] | None = None,
) -> Routes:
    """Sort all copies by expert; copies for one expert stay in the order of the tokens.

    Args:
        indices: of each token's experts.
        experts: their number.
        adapters: number of adapters in a stack, or of examples, by which copies for one expert are
            sorted.
        adapter: number of each token's adapter or example.
    """
    if adapter is not None:
        indices = indices * adapters + adapter[:, None]
    expert = indices.flatten()
    order = expert.argsort(stable=True)
    place = torch.zeros_like(order).scatter(
        0, order, torch.arange(order.shape[0], device=order.device)
    )
    groups = torch.arange(experts * adapters, device=expert.device)
    ends = (expert[:, None] <= groups).sum(0).to(torch.int32)
    return Routes(order, place, ends[adapters - 1 :: adapters].contiguous(), ends)


def expert_mlp(
    x: Float[Tensor, "b t d"],
    logits: Float[Tensor, "b t e"],
    experts: dict[str, Float[Tensor, "e _ _"]],
    adapter: LayerAdapter,
    scalings: dict[str, float],
    per_token: int,
    renormalise: bool,
    *,
    wait: bool = True,
) -> Float[Tensor, "b t d"]:
    """The weighted sum of each token's experts, in x.dtype.

    It is differentiable in x, logits and adapter.

    Args:
        x: the block's normed input.
        logits: of the router.
        experts: "gate_up_proj" [e, 2f, d], the gate's rows first, and "down_proj" [e, d, f].
        adapter: of the layer; "experts.gate_up_proj" and "experts.down_proj" are read.
        scalings: name in the adapter -> factor of its low-rank term.
        per_token: number of experts per token.
        renormalise: whether the weights of a token's experts are scaled to sum to 1.
        wait: False: few tokens, no gradient, and the host must not wait for the GPU.
    """

    def grouped(rows: Tensor, name: str) -> Tensor:
        weight, key = experts[name], f"experts.{name}"
        lora = adapter.get(key)
        if not wait:
            y = grouped_rows(rows, weight, routes.offsets)
            if lora is None:
                return y
            update = grouped_rows(
                grouped_rows(rows, lora.a, routes.offsets), lora.b, routes.offsets
            )
            return y.add_(update, alpha=scalings[key])
        if lora is None:
            return grouped_linear(rows, weight, routes.offsets)
        if isinstance(lora, StackedLoRA):  # [n e _ _]; the scaling is in B
            a, b = (m.transpose(0, 1).flatten(0, 1) for m in lora[:2])
            pair_ends = routes.lora_offsets
            return grouped_lora_linear(rows, weight, a, b, routes.offsets, 1.0, pair_ends)
        if isinstance(lora, ExampleLoRA):
            sinks, ends = (lora.sink_a, lora.sink_b), (routes.offsets, routes.lora_offsets)
            return expert_linear(
                rows, weight, lora.a, lora.b, ends[0], scalings[key], sinks, ends[1]
            )
        return grouped_lora_linear(rows, weight, lora.a, lora.b, routes.offsets, scalings[key])

    weights, indices = chosen_experts(logits.flatten(0, 1), per_token, renormalise)
    grouped_records = [
        lora for name in EXPERTS if isinstance(lora := adapter.get(name), StackedLoRA | ExampleLoRA)
    ]
    if grouped_records:
        n, groups = _number_of_groups(grouped_records[0]), grouped_records[0].groups
        owner = group_of_rows(groups, n, indices.shape[0], indices.device)
        routes = make_routes(indices, logits.shape[-1], n, owner)
    else:
        routes = make_routes(indices, logits.shape[-1])
    gate, up = grouped(spread(x.flatten(0, 1), routes), "gate_up_proj").chunk(2, dim=-1)
    weighted = F.silu(gate) * up * weights.flatten()[routes.order].unsqueeze(-1)
    down = grouped(weighted.to(x.dtype), "down_proj")
    return collect(down, routes, indices.shape[0]).view(x.shape)


def _number_of_groups(lora: StackedLoRA | ExampleLoRA) -> int:
    return lora.a.shape[0] if isinstance(lora, StackedLoRA) else number_of_groups(lora.sink_a)


# `spread` copies tokens to their sorted rows and `collect` sums them back. Each is the transpose of
# the other, and both are gathers. Autograd's derivative of a gather adds with atomics, which is
# slow in bf16 and gives different bits every run, so we define both derivatives ourselves.


def _gathered(x: Tensor, order: Tensor) -> Tensor:
    return x[order // (order.shape[0] // x.shape[0])]


def _summed(y: Tensor, place: Tensor, tokens: int) -> Tensor:
    return y[place].view(tokens, -1, y.shape[-1]).sum(1)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, order, place):
        ctx.save_for_backward(order, place)
        ctx.tokens = x.shape[0]
        return _gathered(x, order)

    @staticmethod
    def backward(ctx, dy):  # pyright: ignore[reportIncompatibleMethodOverride]
        return _Collect.apply(dy, *ctx.saved_tensors, ctx.tokens), None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, order, place, tokens):
        ctx.save_for_backward(order, place)
        return _summed(y, place, tokens)

    @staticmethod
    def backward(ctx, dx):  # pyright: ignore[reportIncompatibleMethodOverride]
        return _Spread.apply(dx, *ctx.saved_tensors), None, None, None


def spread(x: Float[Tensor, "n d"], routes: Routes) -> Float[Tensor, "m d"]:
    """Copies of every token's row, sorted by expert."""
    if transforms_active():
        return _gathered(x, routes.order)
    return _Spread.apply(x, routes.order, routes.place)  # pyright: ignore[reportReturnType]


def collect(y: Float[Tensor, "m d"], routes: Routes, tokens: int) -> Float[Tensor, "n d"]:
    """For each token the sum of its k sorted rows."""
    if transforms_active():
        return _summed(y, routes.place, tokens)
    return _Collect.apply(y, routes.order, routes.place, tokens)  # pyright: ignore[reportReturnType]
