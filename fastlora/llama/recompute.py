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

from fastlora.llama.config import LlamaConfig
from fastlora.llama.layer import LayerSpec, attention_block, mlp_block
from fastlora.llama.params import PROJECTIONS, LayerAdapter, LayerParams, projection_shape
from fastlora.llama.spec import Recompute
from fastlora.ops.dispatch import transforms_active
from fastlora.ops.flash_attention import Spans

LEVELS = ("none", "selective", "mlp", "attention", "full")


aten = torch.ops.aten
_ATTENTION = {
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten.bmm.default,  # SDPA's math backend and the reference: products and softmax
    aten._softmax.default,
    aten._safe_softmax.default,
    torch.ops.fastlora.flash_attention.default,
}
_PRODUCTS = {
    torch.ops.fastlora.lora_linear.default,
    torch.ops.fastlora.dropped_low.default,
    torch.ops.fastlora.quantized_linear.default,
    torch.ops.fastlora.grouped_linear.default,
    torch.ops.fastlora.qat_linear.default,
    aten.mm.default,
    aten.addmm.default,
}
# At every level: the choice of experts, 12 bytes for each of a token's, and DoRA's norms.
_SMALL = {aten.topk.default, torch.ops.fastlora.row_norms.default}
_KEPT = {
    "selective": _ATTENTION | _PRODUCTS | _SMALL,
    "attention": _ATTENTION | _SMALL,
    "full": _SMALL,
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


# As many fill the card; above, more tokens make a product no faster.
_CHUNK = 16_384


def mlp_chunks(config: LlamaConfig, layer: int, level: str, tokens: int, *, dropped: bool) -> int:
    """In how many chunks of tokens a layer runs an MLP that it makes again: the five tensors of
    its width that its backward pass holds at once are then of one chunk, where they are most of
    what a token of a long sequence costs. A power of two: few graphs.

    In one, where a token does not go its way alone: experts are sorted, and dropout's mask counts
    rows.
    """
    if level in ("none", "selective") or dropped or config.sparse_layers[layer]:
        return 1
    return 1 << ((tokens - 1) // _CHUNK).bit_length()


def _pieces(x: Float[Tensor, "b t d"], chunks: int) -> list[Float[Tensor, "1 _ d"]]:
    """All rows' tokens one after the other, cut; the last piece takes what is left over."""
    flat = x.reshape(1, -1, x.shape[-1])
    size = flat.shape[1] // chunks
    ends = [*(size * i for i in range(1, chunks)), flat.shape[1]]
    return [flat[:, begin:end] for begin, end in pairwise([0, *ends])]


def kept_elements(config: LlamaConfig, level: str, layer: int = 0) -> int:
    """Elements a layer keeps per token at a level, in activations of the compute dtype.

    A sparse layer's router, of one element an expert, is not counted. Where the SwiGLU kernel runs
    (ops/lora_swiglu.py), "none" keeps one f less than this says, the others as much.
    """
    d, f = config.hidden_size, config.intermediate_size
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    attention = d + q + 2 * kv + q + d
    spread = 0  # the tokens' copies, sorted by expert
    if config.sparse_layers[layer]:
        f = config.num_experts_per_tok * config.moe_intermediate_size
        spread = config.num_experts_per_tok * d
    return {
        "none": attention
        + 2 * d
        + q
        + kv
        + spread
        + 3 * f,  # + both norms, rotated q and k, silu(gate) * up
        "selective": attention + 2 * f,
        "mlp": attention,
        "attention": d + q,
        "full": d,
    }[level]


def layer_levels(config: LlamaConfig, recompute: Recompute) -> tuple[str, ...]:
    """The level of every layer.

    A number p in [0, 1] allows p times what all layers keep at "none"; what even "full" cannot
    meet gets "full". Depends on shapes only, so the same call always recomputes the same things.
    """
    n = config.num_hidden_layers
    if isinstance(recompute, str):
        return ("full" if recompute == "offload" else recompute,) * n
    kept = {x: [kept_elements(config, x, i) for i in range(n)] for x in LEVELS}
    total = sum(kept["none"])
    budget = recompute * total
    levels = ["none"] * n
    for rich, lean in pairwise(LEVELS):
        for i in range(n):
            if total <= budget:
                return tuple(levels)
            total -= kept[rich][i] - kept[lean][i]
            levels[i] = lean
    return tuple(levels)


# Operations a layer's forward pass has time for while one byte travels: 755 TFLOP/s against the
# 58 GB/s of PCIe 5 (an older card is slower at both).
_OPERATIONS_A_BYTE = 13_000
_HOST_BYTES = 12 * 2**30  # of pinned memory at most, layer inputs apart


def offload_levels(config: LlamaConfig, tokens: int, item: int) -> tuple[str, ...]:
    """The levels where what layers keep waits in host memory: "full", and as many "mlp", spread
    evenly, as the way there carries beside the compute.

    "mlp" sends q, k, v, attention and o along with x and spares the backward pass four products
    and attention: 1.9 ms a layer of an 8B model at 8,192 tokens, for 235 MB (H100). A dense layer
    of it has time for some 250 MB. Depends on shapes only.

    Args:
        config: the model's.
        tokens: in the batch.
        item: bytes of one element of an activation.
    """
    n, sent = config.num_hidden_layers, 0
    levels = ["full"] * n
    lean, rich = (item * kept_elements(config, level) for level in ("full", "mlp"))
    time_for = 2 * _layer_parameters(config) / _OPERATIONS_A_BYTE
    share = min((time_for - lean) / (rich - lean), _HOST_BYTES / (n * tokens * (rich - lean)), 1.0)
    for i in range(n):
        if not config.sparse_layers[i] and int((i + 1) * share) > sent:
            levels[i], sent = "mlp", sent + 1
    return tuple(levels)


def _layer_parameters(config: LlamaConfig) -> int:
    shapes = (projection_shape(config, name) for name in PROJECTIONS)
    return sum(rows * columns for rows, columns in shapes)
