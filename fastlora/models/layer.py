"""One decoder layer, run at a recompute level (levels.py).

The level decides, operation by operation, which results are kept for the backward pass. We use
torch's selective activation checkpointing, which works eagerly and inside torch.compile. There the
partitioner then drops results that no backward node reads.
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

from fastlora.models.attention import add_residual, attention_block
from fastlora.models.layer_spec import LayerSpec
from fastlora.models.mlp import mlp_block
from fastlora.models.params import LayerAdapter, LayerParams
from fastlora.ops.attention.flash import Spans
from fastlora.ops.attention.part_attention import PartSpans
from fastlora.ops.dispatch import transforms_active
from fastlora.runtime.layer_fetching import taken

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
    torch.ops.fastlora.part_attention.default,
}

_LINEAR_OPS = {
    torch.ops.fastlora.lora_linear.default,
    torch.ops.fastlora.quantized_linear.default,
    torch.ops.fastlora.fp8_linear.default,
    torch.ops.fastlora.grouped_linear.default,
    torch.ops.fastlora.stacked_linear.default,
    torch.ops.fastlora.stacked_product.default,
    torch.ops.fastlora.qat_linear.default,
    aten.mm.default,
    aten.addmm.default,
}


# Keys and values that come from other ranks (context parallel) are kept at no level: they are those
# of whole rows. The backward pass gathers them again.

# Kept at every level: DoRA's norms, x A' (ops/linear/times_a.py says why), and which experts each
# token goes to (12 bytes per expert). If the choice were recomputed, a compiled graph might round
# the logits differently and send a token that is near a tie to another expert in the backward pass.
_ALWAYS_KEPT = {
    aten.topk.default,
    torch.ops.fastlora.row_norms.default,
    torch.ops.fastlora.times_a.default,
    torch.ops.fastlora.masked_x_a.default,
}

_KEPT = {
    "selective": _ATTENTION_OPS | _LINEAR_OPS | _ALWAYS_KEPT,
    "attention": _ATTENTION_OPS | _ALWAYS_KEPT,
    "full": _ALWAYS_KEPT,
}


def _policy(level: str, _: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _KEPT[level] else CheckpointPolicy.MUST_RECOMPUTE


def _contexts(level: str) -> Callable[[], Any]:
    """torch's checkpoint contexts for a level, made so that its compile cache accepts the graphs.

    Graphs with recomputation are cached on disk only if the contexts have a `cache_hash` and the
    policy can be pickled.
    """
    contexts = partial(create_selective_checkpoint_contexts, partial(_policy, level))
    kept = sorted(str(op) for op in _KEPT[level])
    contexts.cache_hash = f"fastlora keeps {kept}"  # pyright: ignore[reportAttributeAccessIssue]
    return contexts


_CONTEXTS = {level: _contexts(level) for level in _KEPT}


def recomputed(
    fn: Callable[..., Any], level: str, *xs: Tensor, fetch: Callable[[], Any] | None = None
) -> Any:
    """fn(*xs). The backward pass gets xs and the results of the level's kept ops.

    `fetch` runs before fn is run again, outside of the mode that replays kept results.
    """
    contexts = _CONTEXTS[level]
    if fetch is not None:
        contexts = partial(_contexts_after, fetch, contexts)
    # Dropout computes its masks from keys (ops/dropout.py), so no random state needs preserving.
    return checkpoint(fn, *xs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def _contexts_after(fetch: Callable[[], Any], contexts: Callable[[], Any]) -> tuple[Any, Any]:
    forward, again = contexts()
    return forward, _FetchFirst(fetch, again)


class _FetchFirst:
    """A context that calls `fetch` before it enters another one. It may be entered repeatedly."""

    def __init__(self, fetch: Callable[[], Any], context: Any) -> None:
        self.fetch, self.context = fetch, context

    def __enter__(self) -> None:
        self.fetch()
        self.context.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.context.__exit__(*error)


def decoder_layer(
    x: Float[Tensor, "b t d"],
    params: LayerParams | Callable[[], LayerParams],
    adapter: LayerAdapter,
    cos: Float[Tensor, "#b t hd"],
    sin: Float[Tensor, "#b t hd"],
    mask: Bool[Tensor, "#b 1 t s"] | Spans | PartSpans | None,
    key: Int[Tensor, "..."] | None,
    spec: LayerSpec,
    level: str,
    chunks: int = 1,
) -> Float[Tensor, "b t d"]:
    """One decoder layer. Levels change memory and time; run eagerly, they do not change one bit.

    Args:
        x: the layer's input.
        params: the layer's part of the base, with projections' offsets in x.dtype; or a function
            that fetches it, which is called again when the layer is recomputed.
        adapter: the layer's part of the adapter, in the dtype of `decoder.product_dtype`.
        cos: RoPE table.
        sin: RoPE table.
        mask: see `decoder.Positions`; None is causal attention.
        key: of the dropout masks; None: without dropout.
        spec: the layer's settings.
        level: one of `levels.LEVELS`.
        chunks: in how many chunks of tokens the MLP runs (`levels.mlp_chunks`).
    """

    def attend(x: Tensor) -> Tensor:
        return attention_block(x, taken(params), adapter, cos, sin, mask, spec, key)

    def mlp(x: Tensor, attended: Tensor) -> Tensor:
        here = taken(params)
        if chunks == 1:
            return mlp_block(add_residual(x, attended, spec), here, adapter, spec, key)
        pairs = zip(pieces(x, chunks), pieces(attended, chunks), strict=True)
        sums = [add_residual(*pair, spec) for pair in pairs]
        parts = [mlp_block(part, here, adapter, spec, key) for part in sums]
        return torch.cat(parts, 1).view(x.shape)

    fetch = None if isinstance(params, dict) else params
    # torch.func refuses the saved-tensor hooks of checkpointing.
    if level == "none" or not torch.is_grad_enabled() or transforms_active():
        return mlp(x, attend(x))
    if level == "mlp":
        # Keep x and o and not their sum. To keep the sum, Inductor's kernel would write it in its
        # first loop and read it in its second, which may race (ops/gradient_barrier.py).
        attended = recomputed(attend, "selective", x, fetch=fetch)
        return recomputed(mlp, "full", x, attended, fetch=fetch)
    return recomputed(lambda x: mlp(x, attend(x)), level, x, fetch=fetch)


def pieces(x: Float[Tensor, "b t d"], chunks: int) -> list[Float[Tensor, "1 _ d"]]:
    """The tokens of all rows in `chunks` pieces; the last piece also has the remainder."""
    flat = x.reshape(1, -1, x.shape[-1])
    size = flat.shape[1] // chunks
    bounds = [*(size * i for i in range(chunks)), flat.shape[1]]
    return [flat[:, begin:end] for begin, end in pairwise(bounds)]
