"""forward."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastlora.models.attention import attention_output, queries_keys_values
from fastlora.models.decoder import layer_adapters, position_tables
from fastlora.models.embedding import embed
from fastlora.models.head import Head, logits
from fastlora.models.mlp import mlp_block
from fastlora.models.params import Adapter, Base
from fastlora.models.projections import layer_spec
from fastlora.models.rope_tables import rope_tables
from fastlora.models.spec import Spec
from fastlora.ops.attention.attention import attention
from fastlora.ops.rms_norm import rms_norm


class EmbeddingAndHead(NamedTuple):
    """What comes before and after the layers, made once and not at every token."""

    gain: Float[Tensor, "d"] | None  # DoRA's, of the embedding
    head: Head


class Cache(NamedTuple):
    """Keys and values of every layer, allocated once for prompt and new tokens together."""

    k: tuple[Float[Tensor, "b kv s hd"], ...]
    v: tuple[Float[Tensor, "b kv s hd"], ...]


def new_cache(base: Base, spec: Spec, b: int, length: int) -> Cache:
    """Room for `length` positions: 2 * b * layers * kv * length * hd elements, in base dtype."""
    config, like = spec.config, base["norm"]
    shape = (b, config.num_key_value_heads, length, config.head_dim)
    new = lambda: tuple(like.new_empty(shape) for _ in range(config.num_hidden_layers))
    return Cache(k=new(), v=new())


def prefill(
    adapter: Adapter | None,
    base: Base,
    spec: Spec,
    input_ids: Int[Tensor, "b t"],
    attention_mask: Int[Tensor, "b t"] | None,
    cache: Cache,
    ends: EmbeddingAndHead,
) -> Float[Tensor, "b v"]:
    """Logits after the whole prompt; writes the prompt's keys and values into the cache."""
    config, t = spec.config, input_ids.shape[1]
    x = embed(input_ids, adapter, base, spec, ends.gain)
    at = position_tables(config, input_ids, x.dtype, attention_mask, None, None)
    adapters = layer_adapters(adapter, config)
    for i, params in enumerate(base["layers"]):
        static = layer_spec(spec, i)
        q, k, v = queries_keys_values(x, params, adapters[i], at.cos, at.sin, static, None)
        cache.k[i][:, :, :t] = k
        cache.v[i][:, :, :t] = v
        heads = attention(q, k, v, at.masks[config.layer_types[i]])
        x = x + attention_output(heads, params, adapters[i], static, None)
        x = mlp_block(x, params, adapters[i], static, None)
    return _last_logits(x, base, spec, ends)


def decode(
    adapter: Adapter | None,
    base: Base,
    spec: Spec,
    token: Int[Tensor, "b 1"],
    position_ids: Int[Tensor, "b 1"],
    real: Bool[Tensor, "b s"],
    cache: Cache,
    ends: EmbeddingAndHead,
) -> Float[Tensor, "b v"]:
    """Logits after one more token, the s-th; `real` is False where a cached one is padding."""
    config, s = spec.config, real.shape[1]
    x = embed(token, adapter, base, spec, ends.gain)
    cos, sin = rope_tables(config, position_ids, position_ids + 1, x.dtype)
    near = torch.arange(s, device=real.device) > s - 1 - (config.sliding_window or s)
    masks = {
        "full_attention": real[:, None, None],
        "sliding_attention": (real & near)[:, None, None],
    }
    adapters = layer_adapters(adapter, config)
    for i, params in enumerate(base["layers"]):
        static = layer_spec(spec, i)
        q, k, v = queries_keys_values(x, params, adapters[i], cos, sin, static, None)
        cache.k[i][:, :, s - 1 : s] = k
        cache.v[i][:, :, s - 1 : s] = v
        mask = masks[config.layer_types[i]]
        heads = attention(q, cache.k[i][:, :, :s], cache.v[i][:, :, :s], mask)
        x = x + attention_output(heads, params, adapters[i], static, None)
        x = mlp_block(x, params, adapters[i], static, None)
    return _last_logits(x, base, spec, ends)


def _last_logits(
    x: Float[Tensor, "b t d"], base: Base, spec: Spec, ends: EmbeddingAndHead
) -> Float[Tensor, "b v"]:
    hidden = rms_norm(x[:, -1], base["norm"], spec.config.rms_norm_eps)
    return logits(hidden, hidden, ends.head, spec)
