"""W_q, W_k and W_v one under the other in memory: the gradient of what they read is one product.

Their tree stays as it is: three tensors, each a view of its rows. In three products that add to one
buffer, those of k and v are small and the buffer travels twice more: 225 us a layer of 1B shapes
and 8,192 tokens, where one takes 167; 602 and 576 of 8B (H100;
scripts/bench_results/2026-11-27-input-gradients.txt). A model moved to the GPU after loading has
them apart.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fastlora.models.config import LlamaConfig
from fastlora.models.names import projection_path
from fastlora.models.params import LayerParams
from fastlora.ops.quant.weights import Weight

QKV = ("q_proj", "k_proj", "v_proj")


def fuse_qkv(config: LlamaConfig, tensors: dict[str, Weight]) -> None:
    """Put every layer's q, k and v, under their names on disk, side by side: copied once, one layer
    at a time, in the dict that is given. Quantised ones stay where they are."""
    for layer in range(config.num_hidden_layers):
        names = [f"{projection_path(layer, name)}.weight" for name in QKV]
        weights = [w for name in names if isinstance(w := tensors[name], Tensor)]
        if len(weights) == len(names):
            rows = torch.cat(weights).split([w.shape[0] for w in weights])
            tensors.update(zip(names, rows, strict=True))


def fused_qkv(params: LayerParams) -> Float[Tensor, "d_out d_in"] | None:
    """A layer's q, k and v as one matrix, where that is how they lie; a view, nothing is copied."""
    weights = [params[name]["weight"] for name in QKV]
    dense = all(isinstance(w, Tensor) and not w.requires_grad for w in weights)
    return _together(weights) if dense else None


def _together(weights: Sequence[Tensor]) -> Tensor | None:
    first, columns = weights[0], weights[0].shape[1]
    storage, place = first.untyped_storage().data_ptr(), first.data_ptr()
    for weight in weights:
        if weight.untyped_storage().data_ptr() != storage or weight.data_ptr() != place:
            return None
        if weight.dtype != first.dtype or not weight.is_contiguous():
            return None
        place += weight.nbytes
    return first.as_strided((sum(w.shape[0] for w in weights), columns), (columns, 1))
