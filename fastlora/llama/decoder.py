"""The whole decoder: embedding, layers, final norm. The head is its caller's business."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastlora.llama.compiled import compiled, compiles
from fastlora.llama.config import LlamaConfig
from fastlora.llama.layer import layer_spec
from fastlora.llama.offload import HostStash
from fastlora.llama.params import Adapter, Base, LayerAdapter
from fastlora.llama.positions import attention_mask_2d, positions, rope_tables
from fastlora.llama.recompute import decoder_layer, layer_levels
from fastlora.llama.spec import Spec
from fastlora.ops.cast import cast
from fastlora.ops.dispatch import transforms_active
from fastlora.ops.dropout import fold
from fastlora.ops.rms_norm import rms_norm


class Where(NamedTuple):
    """What every layer of one forward pass shares: rotation tables and masks by layer type."""

    cos: Float[Tensor, "#b t hd"]
    sin: Float[Tensor, "#b t hd"]
    masks: dict[str, Bool[Tensor, "#b 1 t t"] | None]


def where(
    config: LlamaConfig,
    input_ids: Int[Tensor, "b t"],
    dtype: torch.dtype,
    attention_mask: Int[Tensor, "b t"] | None,
    position_ids: Int[Tensor, "#b t"] | None,
    segment_ids: Int[Tensor, "b t"] | None,
) -> Where:
    """Tables and masks for one batch; each mask is built once, however many layers use it."""
    if position_ids is None:
        position_ids = positions(input_ids, attention_mask, segment_ids)
    t, device = input_ids.shape[1], input_ids.device
    windows = {"full_attention": None, "sliding_attention": config.sliding_window}
    masks = {
        kind: attention_mask_2d(t, windows[kind], attention_mask, segment_ids, device)
        for kind in sorted(set(config.layer_types))
    }
    return Where(*rope_tables(config, position_ids, dtype), masks)


def layer_adapters(
    adapter: Adapter | None, config: LlamaConfig, dtype: torch.dtype
) -> tuple[LayerAdapter, ...]:
    """One dict per layer, in the dtype that multiplies; all empty for the base model."""
    if adapter is None:
        return ({},) * config.num_hidden_layers
    return cast(adapter["layers"], dtype)


def hidden_states(
    adapter: Adapter | None,
    base: Base,
    spec: Spec,
    input_ids: Int[Tensor, "b t"],
    *,
    attention_mask: Int[Tensor, "b t"] | None = None,
    position_ids: Int[Tensor, "#b t"] | None = None,
    segment_ids: Int[Tensor, "b t"] | None = None,
    seed: int | Int[Tensor, ""] | None = None,
) -> Float[Tensor, "b t d"]:
    """The final norm's output, in the base's dtype: what the head multiplies."""
    config = spec.config
    x = F.embedding(input_ids, base["embed_tokens"])
    at = where(config, input_ids, x.dtype, attention_mask, position_ids, segment_ids)
    adapters = layer_adapters(adapter, config, x.dtype)
    key = dropout_key(spec, seed, x.device)
    use_compiled = compiles(spec.compile, x.device) and not transforms_active()
    if use_compiled and torch.is_grad_enabled() and requires_grad(adapter):
        # Else the first layer alone would see an input without gradient, and compile by itself:
        # twice the compile time, to save one of 16 layers' input gradients of q, k and v.
        x.requires_grad_()
    offload = spec.recompute == "offload" and x.is_cuda and not torch.compiler.is_compiling()
    stash = HostStash() if offload and torch.is_grad_enabled() and not transforms_active() else None
    for i, level in enumerate(layer_levels(config, spec.recompute)):
        static = (layer_spec(spec, i), level)
        args = (base["layers"][i], adapters[i], at.cos, at.sin, at.masks[config.layer_types[i]])
        run = (
            compiled(decoder_layer, *static, grad=torch.is_grad_enabled()) if use_compiled else None
        )
        layer_key = None if key is None else fold(key, i)

        def layer(x, args=args, layer_key=layer_key, static=static, run=run):
            if run is not None:
                return run(x, *args, layer_key)
            return decoder_layer(x, *args, layer_key, *static)

        x = layer(x) if stash is None else stash.run(layer, x)
    return rms_norm(x, base["norm"], config.rms_norm_eps)


def requires_grad(tree: Any) -> bool:
    """Whether any tensor of a tree (None: no tensor) is being differentiated."""
    return any(isinstance(x, Tensor) and x.requires_grad for x in tree_leaves(tree))


def dropout_key(
    spec: Spec, seed: int | Int[Tensor, ""] | None, device: torch.device
) -> Int[Tensor, ""] | None:
    """The seed as a tensor on the device, or None where no mask will be drawn."""
    if seed is None or spec.lora is None or spec.lora.lora_dropout == 0.0:
        return None
    return torch.as_tensor(seed, dtype=torch.int64, device=device)


def head(base: Base) -> Float[Tensor, "v d"]:
    """The output matrix: its own, or the embedding's."""
    return base["lm_head"] if "lm_head" in base else base["embed_tokens"]
