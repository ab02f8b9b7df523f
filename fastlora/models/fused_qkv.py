"""q, k and v stored as consecutive rows of one matrix, so that one product gives dx for all three.

Computed as three products that add to one buffer, those of k and v are small and the buffer is read
and written twice more: 225 us per layer of 1B shapes and 8,192 tokens, against 167 us for one
product; 602 and 576 us for 8B (H100; input-gradients-2026-11-27 in scripts/bench/results.jsonl). A
model that is moved to the GPU after loading has the three apart.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fastlora.models.config import LlamaConfig
from fastlora.models.names import projection_path
from fastlora.models.params import LayerParams
from fastlora.ops.quant.weights import Weight, WeightFP8

QKV = ("q_proj", "k_proj", "v_proj")


def fuse_qkv(config: LlamaConfig, tensors: dict[str, Weight]) -> None:
    """Store every layer's q, k and v next to each other, changing the given dict.

        {"...q_proj.weight": W_q, "...k_proj.weight": W_k, "...v_proj.weight": W_v}
    ->  {"...q_proj.weight": M[:q], "...k_proj.weight": M[q:q+kv], "...v_proj.weight": M[q+kv:]}

    M is a new matrix with the same values. One layer at a time is copied, so that the extra memory
    is that of one layer. Quantised weights are not changed.

    Args:
        config: the model's shape.
        tensors: the model's tensors by their names on disk.
    """
    if config.fused_projections:  # they are one matrix already
        return
    for layer in range(config.num_hidden_layers):
        names = [f"{projection_path(layer, name)}.weight" for name in QKV]
        weights = [w for name in names if isinstance(w := tensors[name], Tensor)]
        if len(weights) == len(names):  # quantised weights are not Tensors
            # split() returns views, so all three share the new matrix's memory.
            rows = torch.cat(weights).split([w.shape[0] for w in weights])
            tensors.update(zip(names, rows, strict=True))


def fused_qkv(params: LayerParams) -> Float[Tensor, "d_out d_in"] | None:
    """A view of a layer's q, k and v weights as one matrix; None if they are not consecutive.

    Also None if they are quantised or require gradients, or if the model has one layer for them.
    """
    if any(name not in params for name in QKV):
        return None
    weights = [params[name]["weight"] for name in QKV]
    # A view made here would not pass a gradient on to three separate leaves.
    dense = all(isinstance(w, Tensor) and not w.requires_grad for w in weights)
    return _as_one(weights) if dense else None


def one_gradient(params: LayerParams) -> bool:
    """Whether one product gives the input gradient of q, k and v: they are one matrix in memory, or
    in e4m3 (ops/linear/fp8.py)."""
    of_fp8 = lambda name: name in params and isinstance(params[name]["weight"], WeightFP8)
    return "qkv" in params or all(map(of_fp8, QKV))


def with_fused_qkv(params: LayerParams) -> LayerParams:
    """A layer's params with that matrix, if there is one, as "qkv"."""
    qkv = fused_qkv(params)
    return params if qkv is None else params | {"qkv": qkv}


def _as_one(weights: Sequence[Tensor]) -> Tensor | None:
    # Addresses decide, not how the weights were made: a copy to another device, a trained copy or a
    # dtype cast of one of the three each break the arrangement.
    first, columns = weights[0], weights[0].shape[1]
    storage, address = first.untyped_storage().data_ptr(), first.data_ptr()
    for weight in weights:
        if weight.untyped_storage().data_ptr() != storage or weight.data_ptr() != address:
            return None
        if weight.dtype != first.dtype or not weight.is_contiguous():
            return None
        address += weight.nbytes
    return first.as_strided((sum(w.shape[0] for w in weights), columns), (columns, 1))
