"""What the backward pass computes again, decided operation by operation.

A layer runs at one of five levels, from most memory to least. Elements kept per token (d hidden,
q and kv the widths of the query and key projections, f the MLP's):

    none       everything autograd (or Inductor's min-cut partitioner) wants
    selective  x, q, k, v, attention, o, gate, up       again: norms, RoPE, SwiGLU, casts
    mlp        x, q, k, v, attention, o                 again: + gate and up products
    attention  x, attention                             again: + q, k, v and o products
    full       x                                        again: + attention itself

A sparse layer keeps k f in place of f (k experts per token, f of one expert), and at every level
the k experts chosen: chosen again from logits that a compiled graph rounds otherwise, a token near
a tie would go another way in the backward pass.

Freeing one element of any projection costs the same arithmetic (2 * d_in operations), attention
costs more, so this order is the cheapest first. A policy name is one level for all layers, but for
"offload" (`offload_levels`; "full" where there is nowhere to send things). A number is a budget,
met by moving layers down one level at a time, the first layers first: the backward pass reaches
them last, when most memory is free again.

Built on torch's selective activation checkpointing, which works the same eager and inside
torch.compile (there the partitioner then drops what no backward node reads).
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from fastlora.models.attention import attention_block
from fastlora.models.mlp import mlp_block
from fastlora.models.params import LayerAdapter, LayerParams
from fastlora.models.projections import LayerSpec
from fastlora.ops.attention.flash import Spans
from fastlora.ops.dispatch import transforms_active

aten = torch.ops.aten

_ATTENTION_OPS = {
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten.bmm.default,  # SDPA's math backend and the reference: products and softmax
    aten._softmax.default,
    aten._safe_softmax.default,
    torch.ops.fastlora.flash_attention.default,
}

_LINEAR_OPS = {
    torch.ops.fastlora.lora_linear.default,
    torch.ops.fastlora.masked_x_a.default,
    torch.ops.fastlora.quantized_linear.default,
    torch.ops.fastlora.grouped_linear.default,
    torch.ops.fastlora.qat_linear.default,
    aten.mm.default,
    aten.addmm.default,
}


# At every level: the choice of experts, 12 bytes for each of a token's, and DoRA's norms.
_ALWAYS_KEPT = {aten.topk.default, torch.ops.fastlora.row_norms.default}

_KEPT = {
    "selective": _ATTENTION_OPS | _LINEAR_OPS | _ALWAYS_KEPT,
    "attention": _ATTENTION_OPS | _ALWAYS_KEPT,
    "full": _ALWAYS_KEPT,
}


def _policy(level: str, _: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _KEPT[level] else CheckpointPolicy.MUST_RECOMPUTE


def _contexts(level: str) -> Callable[[], Any]:
    """torch's contexts for what a level keeps, in a form that its compile cache takes: without
    `cache_hash`, or with a policy that does not pickle, no graph that recomputes is ever cached."""
    contexts = partial(create_selective_checkpoint_contexts, partial(_policy, level))
    kept = sorted(str(op) for op in _KEPT[level])
    contexts.cache_hash = f"fastlora keeps {kept}"  # pyright: ignore[reportAttributeAccessIssue]
    return contexts


_CONTEXTS = {level: _contexts(level) for level in _KEPT}


def _recomputed(fn: Callable[..., Tensor], level: str, *xs: Tensor) -> Tensor:
    """fn(*xs), keeping for the backward pass only xs and what the level's ops produced."""
    # No op here reads a random state (ops/dropout.py), so none needs preserving.
    out = checkpoint(
        fn, *xs, use_reentrant=False, preserve_rng_state=False, context_fn=_CONTEXTS[level]
    )
    assert isinstance(out, Tensor)
    return out


def decoder_layer(
    x: Float[Tensor, "b t d"],
    params: LayerParams,
    adapter: LayerAdapter,
    cos: Float[Tensor, "#b t hd"],
    sin: Float[Tensor, "#b t hd"],
    mask: Bool[Tensor, "#b 1 t t"] | Spans | None,
    key: Int[Tensor, ""] | None,
    spec: LayerSpec,
    level: str,
    chunks: int = 1,
) -> Float[Tensor, "b t d"]:
    """One decoder layer at a level, its MLP in `chunks` of tokens. Levels change memory and time;
    eager, never a bit."""

    def attend(x: Tensor) -> Tensor:
        return attention_block(x, params, adapter, cos, sin, mask, spec, key)

    def mlp(x: Tensor, attended: Tensor) -> Tensor:
        if chunks == 1:
            return mlp_block(x + attended, params, adapter, spec, key)
        each = zip(_pieces(x, chunks), _pieces(attended, chunks), strict=True)
        pieces = [mlp_block(own + more, params, adapter, spec, key) for own, more in each]
        return torch.cat(pieces, 1).view(x.shape)

    # torch.func refuses saved-tensor hooks, and keeps what it needs by itself.
    if level == "none" or not torch.is_grad_enabled() or transforms_active():
        return mlp(x, attend(x))
    if level == "mlp":
        # x and o, not their sum, which Inductor's kernel would write for the backward pass in its
        # first loop and read again in its second (ops/gradient_barrier.py).
        return _recomputed(mlp, "full", x, _recomputed(attend, "selective", x))
    return _recomputed(lambda x: mlp(x, attend(x)), level, x)


def _pieces(x: Float[Tensor, "b t d"], chunks: int) -> list[Float[Tensor, "1 _ d"]]:
    """All rows' tokens one after the other, cut; the last piece takes what is left over."""
    flat = x.reshape(1, -1, x.shape[-1])
    size = flat.shape[1] // chunks
    ends = [*(size * i for i in range(1, chunks)), flat.shape[1]]
    return [flat[:, begin:end] for begin, end in pairwise([0, *ends])]
