"""Forward passes with a key-value cache: prefill for the prompt, decode for one more token.

`prepare` does once what would otherwise be repeated at every token.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastlora.models.attention import attention_output, queries_keys_values
from fastlora.models.decoder import layer_adapters, position_tables, product_dtype
from fastlora.models.embedding import embed, embedding_gain
from fastlora.models.head import Head, head, logits
from fastlora.models.mlp import mlp_block
from fastlora.models.names import with_replaced
from fastlora.models.params import Adapter, Base, LayerAdapter, LayerParams
from fastlora.models.projections import LayerSpec, layer_spec
from fastlora.models.rope_tables import rope_tables
from fastlora.models.self_contained import self_contained
from fastlora.models.spec import Spec
from fastlora.models.state import ModelState
from fastlora.ops.attention.attention import attention
from fastlora.ops.rms_norm import rms_norm


class PreparedLayer(NamedTuple):
    """One decoder layer."""

    params: LayerParams
    adapter: LayerAdapter  # in the dtype of the layer's products
    spec: LayerSpec
    attention_type: str  # "full_attention" or "sliding_attention"


class PreparedModel(NamedTuple):
    """A model as generation uses it: everything that is the same for all tokens."""

    spec: Spec
    base: Base  # the adapter's copies of base tensors are in their places
    adapter: Adapter | None
    layers: tuple[PreparedLayer, ...]
    embedding_gain: Float[Tensor, "d"] | None  # of DoRA on the embedding
    head: Head


class Cache(NamedTuple):
    """Keys and values of every layer, allocated once for prompt and new tokens together."""

    k: tuple[Float[Tensor, "b kv s hd"], ...]
    v: tuple[Float[Tensor, "b kv s hd"], ...]


def prepare(model: ModelState) -> PreparedModel:
    """Cast the adapter, put copies of base tensors in place, and compute DoRA's scales, once."""
    model = self_contained(model, unpark=model.adapter is None)
    adapter, base, spec = model.adapter, model.base, model.spec
    adapters = layer_adapters(adapter, spec.config)
    if adapter is not None:
        dtype = base["norm"].dtype
        base = with_replaced(base, adapter, tied=spec.extras.tied)
        adapters = tuple(product_dtype(x, spec, dtype) for x in adapters)
    layers = tuple(
        PreparedLayer(params, adapters[i], layer_spec(spec, i), spec.config.layer_types[i])
        for i, params in enumerate(base["layers"])
    )
    return PreparedModel(
        spec=spec,
        base=base,
        adapter=adapter,
        layers=layers,
        embedding_gain=embedding_gain(adapter, base, spec),
        head=head(adapter, base, spec),
    )


def new_cache(model: PreparedModel, b: int, length: int) -> Cache:
    """An empty cache of `length` positions: 2 * b * layers * kv * length * hd elements.

    In the base's dtype and on its device.
    """
    config, like = model.spec.config, model.base["norm"]
    shape = (b, config.num_key_value_heads, length, config.head_dim)
    new = lambda: tuple(like.new_empty(shape) for _ in range(config.num_hidden_layers))
    return Cache(k=new(), v=new())


def prefill(
    model: PreparedModel,
    input_ids: Int[Tensor, "b t"],
    attention_mask: Int[Tensor, "b t"] | None,
    cache: Cache,
) -> Float[Tensor, "b v"]:
    """Logits after the prompt. Writes the prompt's keys and values into the cache.

    Args:
        model: of `prepare`.
        input_ids: prompts, padded on the left.
        attention_mask: 1 = real token; None means all are.
        cache: of at least t positions.
    """
    x = embed(input_ids, model.adapter, model.base, model.spec, model.embedding_gain)
    tables = position_tables(model.spec.config, input_ids, x.dtype, attention_mask, None, None)
    x = _run_layers(model, x, tables.cos, tables.sin, tables.masks, cache, first=0)
    return _last_logits(model, x)


def decode(
    model: PreparedModel,
    token: Int[Tensor, "b 1"],
    position_ids: Int[Tensor, "b 1"],
    real: Bool[Tensor, "b s"],
    cache: Cache,
) -> Float[Tensor, "b v"]:
    """Logits after one more token. Writes its key and value into the cache.

    Args:
        model: of `prepare`.
        token: the newest token of each row.
        position_ids: its position, which counts real tokens only.
        real: for all s positions in use, the new one included: whether they hold a real token.
        cache: holds s - 1 positions.
    """
    config, s = model.spec.config, real.shape[1]
    x = embed(token, model.adapter, model.base, model.spec, model.embedding_gain)
    cos, sin = rope_tables(config, position_ids, position_ids + 1, x.dtype)
    in_window = torch.arange(s, device=real.device) > s - 1 - (config.sliding_window or s)
    masks = {
        "full_attention": real[:, None, None],
        "sliding_attention": (real & in_window)[:, None, None],
    }
    return _last_logits(model, _run_layers(model, x, cos, sin, masks, cache, first=s - 1))


def _run_layers(
    model: PreparedModel,
    x: Float[Tensor, "b t d"],
    cos: Float[Tensor, "#b t hd"],
    sin: Float[Tensor, "#b t hd"],
    masks: Mapping[str, Bool[Tensor, "#b 1 t s"] | None],
    cache: Cache,
    first: int,
) -> Float[Tensor, "b t d"]:
    """x after all layers, for tokens at cache positions first, first + 1, ..."""
    end = first + x.shape[1]
    for i, (params, adapter, static, attention_type) in enumerate(model.layers):
        q, k, v = queries_keys_values(x, params, adapter, cos, sin, static, None)
        cache.k[i][:, :, first:end] = k
        cache.v[i][:, :, first:end] = v
        if first > 0:  # otherwise k and v are all that the cache holds
            k, v = cache.k[i][:, :, :end], cache.v[i][:, :, :end]
        heads = attention(q, k, v, masks[attention_type])
        x = x + attention_output(heads, params, adapter, static, None)
        x = mlp_block(x, params, adapter, static, None)
    return x


def _last_logits(model: PreparedModel, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b v"]:
    hidden = rms_norm(x[:, -1], model.base["norm"], model.spec.config.rms_norm_eps)
    return logits(hidden, hidden, model.head, model.spec)
