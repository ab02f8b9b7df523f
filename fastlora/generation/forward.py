"""The two passes over a cache: `prefill` for prompts, `decode` for one more token of every row.

Rows are not padded on the left: token i of a row has position i and lies at index i of its slot.
`decode` contains no host synchronisation and no shape that depends on data, so that a CUDA graph
can record it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils._pytree import tree_map

from fastlora.generation.angles import RopeTables, table_rows
from fastlora.generation.cache import Cache
from fastlora.generation.kernel_layer import (
    StepKernels,
    product_heads,
    rest_by_products,
    run_kernel_layer,
)
from fastlora.generation.prepare import PreparedModel
from fastlora.models.attention import (
    add_residual,
    attention_output,
    queries_keys_values,
    rotated_attention,
)
from fastlora.models.capture import plus
from fastlora.models.decoder import attention_masks
from fastlora.models.embedding import embed, embedding_scale
from fastlora.models.head import divided, head, logits
from fastlora.models.layer_spec import LayerSpec
from fastlora.models.mlp import mlp_output
from fastlora.models.names import with_replaced
from fastlora.models.rope_tables import tables_by_type
from fastlora.ops.attention.attention import attention_reference
from fastlora.ops.decode.linear import decode_product
from fastlora.ops.decode.next_token import step_inputs
from fastlora.ops.rms_norm import rms_norm
from fastlora.ops.soft_cap import soft_cap
from fastlora.runtime.layer_fetching import taken


def prefill(
    model: PreparedModel,
    cache: Cache,
    slots: Sequence[int],
    input_ids: Int[Tensor, "b t"],
    lengths: Int[Tensor, "b"],
    adapter_ids: Int[Tensor, "b"],
    kernels: StepKernels,
) -> None:
    """Write keys and values of the first t tokens of some prompts into their slots.

    Attention is causal, so a row shorter than t may hold any ids behind its own tokens: no token of
    the row sees them, and `decode` overwrites their keys and values before it reads them.

    Args:
        model: of `prepare`.
        cache: of at least t indices.
        slots: where each row goes.
        input_ids: rows, padded on the right.
        lengths: of the whole prompts, which dynamic RoPE needs; they may be longer than t.
        adapter_ids: the number of each row's adapter, for a stack.
        kernels: of kernel_layer.step_kernels, for any number of rows.
    """
    (b, t), spec = input_ids.shape, model.spec
    x = _embed(model, input_ids, adapter_ids)
    index = torch.arange(t, device=x.device).expand(b, t)
    tables = tables_by_type(spec.config, index, lengths[:, None], x.dtype)
    masks = attention_masks(spec, x, None, None, model.layers[0].spec.fused)
    rows = cache.rows(slots)
    for i, layer in enumerate(model.layers):
        x = _steered(model, f"layers.{i}.in", x)
        angles = tables[layer.attention_type]
        q, k, v = _queries_keys_values(model, i, kernels, x, *angles, adapter_ids)
        cache.write(i, rows, k, v)
        if i + 1 == len(model.layers):  # of the last layer only keys and values are needed
            return
        heads = rotated_attention(q, k, v, masks[layer.attention_type], layer.spec)
        x = _rest_of_layer(model, i, kernels, x, heads, adapter_ids)
        x = _steered(model, f"layers.{i}.out", x)


def decode(
    model: PreparedModel,
    cache: Cache,
    token: Int[Tensor, "b"],
    lengths: Int[Tensor, "b"],
    adapter_ids: Int[Tensor, "b"],
    tables: RopeTables,
    kernels: StepKernels,
    end: int,
) -> Float[Tensor, "b v"]:
    """Logits after one more token of the rows in slots 0 to b - 1, in the base's dtype.

    Writes the token's keys and values at index `lengths` of its slot.

    Args:
        model: of `prepare`.
        cache: of at least b slots.
        token: the newest token of each row.
        lengths: number of tokens of each row before `token`.
        adapter_ids: the number of each row's adapter, for a stack.
        tables: of `rope_table`, at least as long as the cache.
        kernels: of kernel_layer.step_kernels.
        end: no row has more than `end` tokens, the new one included.
    """
    b, rows = token.shape[0], torch.arange(token.shape[0], device=token.device)
    x, angles_of = _inputs(model, token, lengths, adapter_ids, tables, kernels)
    by_kernels = kernels.triton and None not in kernels.layers
    masks = {} if by_kernels else _decode_masks(model, lengths, end)
    for i, layer in enumerate(model.layers):
        k_cache, v_cache = cache.k[i], cache.v[i]
        if b < cache.slots:
            k_cache, v_cache = k_cache[:b], v_cache[:b]
        kernel, (cos, sin) = kernels.layers[i], angles_of[layer.attention_type]
        x = _steered(model, f"layers.{i}.in", x)
        if kernel is not None and kernels.triton:
            x = run_kernel_layer(x[:, 0], kernel, cos, sin, k_cache, v_cache, lengths)[:, None]
            x = _steered(model, f"layers.{i}.out", x)
            continue
        angles = cos[:, None], sin[:, None]
        q, k, v = _queries_keys_values(model, i, kernels, x, *angles, adapter_ids)
        k_cache[rows, :, lengths] = k[:, :, 0]
        v_cache[rows, :, lengths] = v[:, :, 0]
        mask = masks[layer.attention_type]
        heads = _one_query(q, k_cache[:, :, :end], v_cache[:, :, :end], mask, layer.spec)
        x = _rest_of_layer(model, i, kernels, x, heads, adapter_ids)
        x = _steered(model, f"layers.{i}.out", x)
    if kernels.head is not None:
        (y,) = decode_product(x[:, 0].contiguous(), kernels.head, kernels="triton")
        return soft_cap(divided(y, model.spec), model.spec.config.logit_cap)
    return _logits(model, x[:, 0], adapter_ids)


def _inputs(
    model: PreparedModel,
    token: Int[Tensor, "b"],
    lengths: Int[Tensor, "b"],
    adapter_ids: Int[Tensor, "b"],
    tables: RopeTables,
    kernels: StepKernels,
) -> tuple[Float[Tensor, "b 1 d"], dict[str, tuple[Float[Tensor, "b hd"], Float[Tensor, "b hd"]]]]:
    """The embeddings, and for each layer type cos and sin of the positions."""
    if kernels.triton and _plain_embedding(model):
        embedding, first = model.base["embed_tokens"], next(iter(tables.values()))
        scale = embedding_scale(model.spec, embedding.dtype)
        inputs = step_inputs(token, lengths, embedding, *first, scale, kernels="triton")
        found = {
            name: (inputs.cos, inputs.sin) if table is first else table_rows(table, lengths)
            for name, table in tables.items()
        }
        return _steered(model, "embed", inputs.x[:, None]), found
    x = _embed(model, token[:, None], adapter_ids)
    return x, {name: table_rows(table, lengths) for name, table in tables.items()}


def _plain_embedding(model: PreparedModel) -> bool:
    """Whether `_embed` reads rows of the matrix, may scale them, and does nothing else."""
    adapter = model.adapter
    adapted = adapter is not None and ("embed_tokens" in adapter or "tokens" in adapter)
    return model.stack_size is None and model.spec.qat_scheme is None and not adapted


def _decode_masks(
    model: PreparedModel, lengths: Int[Tensor, "b"], end: int
) -> dict[str, Bool[Tensor, "b 1 1 s"]]:
    """Layer type -> the indices that the new token, at index `lengths`, attends to."""
    index, last = torch.arange(end, device=lengths.device), lengths[:, None]
    seen = index <= last
    masks = {"full_attention": seen[:, None, None]}
    if (window := model.spec.config.sliding_window) is not None:
        masks["sliding_attention"] = (seen & (index > last - window))[:, None, None]
    else:
        masks["sliding_attention"] = masks["full_attention"]
    return masks


def _one_query(
    q: Float[Tensor, "b h 1 hd"],
    k: Float[Tensor, "b kv s hd"],
    v: Float[Tensor, "b kv s hd"],
    mask: Bool[Tensor, "b 1 1 s"],
    spec: LayerSpec,
) -> Float[Tensor, "b h 1 hd"]:
    """Attention of one token of each row.

    The h / kv query heads of a key head are passed as so many queries, because they see the same
    keys. Then no key is repeated.
    """
    (b, h, _, hd), kv = q.shape, k.shape[1]
    grouped = q.reshape(b, kv, h // kv, hd)
    scale, cap = spec.attention_scale, spec.attention_cap
    if cap is not None:
        return attention_reference(q, k, v, mask, scale, cap)
    mask = mask.expand(b, 1, h // kv, mask.shape[-1])
    heads = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=scale)
    return heads.reshape(b, h, 1, hd)


# ── the parts of a pass, each for one adapter or for a stack ──────────────────────────────


def _embed(
    model: PreparedModel, ids: Int[Tensor, "b t"], adapter_ids: Int[Tensor, "b"]
) -> Float[Tensor, "b t d"]:
    spec, base, gain, rows = model.spec, model.base, model.embedding_gain, model.row_of_id
    if model.stack_size is None or model.adapter is None:
        return _steered(model, "embed", embed(ids, model.adapter, base, spec, gain, rows))

    def one(tree: Any, ids: Int[Tensor, "t"]) -> Float[Tensor, "t d"]:
        own = with_replaced(base, tree["adapter"], tied=spec.extras.tied)
        return embed(ids[None], tree["adapter"], own, spec, tree.get("gain"), rows)[0]

    tree: dict[str, Any] = {"adapter": model.adapter}
    x = _row_by_row(one, tree if gain is None else tree | {"gain": gain}, adapter_ids, ids)
    return _steered(model, "embed", x)


def _steered(model: PreparedModel, place: str, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
    """x and the vector that is added at a place, if there is one."""
    return plus(x, model.added.get(place)) if model.added else x


def _logits(
    model: PreparedModel, x: Float[Tensor, "b d"], adapter_ids: Int[Tensor, "b"]
) -> Float[Tensor, "b v"]:
    spec, base = model.spec, model.base
    how = spec.config.rms_norm_eps, spec.config.norm_kind
    if model.head is not None:
        hidden = _steered(model, "norm", rms_norm(x, base["norm"], *how))
        return logits(hidden, hidden, model.head, spec)

    def one(adapter: Any, x: Float[Tensor, "d"]) -> Float[Tensor, "v"]:
        own = with_replaced(base, adapter, tied=spec.extras.tied)
        hidden = _steered(model, "norm", rms_norm(x, own["norm"], *how))
        return logits(hidden, hidden, head(adapter, base, spec), spec)

    return _row_by_row(one, model.adapter, adapter_ids, x)


def _queries_keys_values(
    model: PreparedModel,
    i: int,
    kernels: StepKernels,
    x: Float[Tensor, "b t d"],
    cos: Float[Tensor, "b t hd"],
    sin: Float[Tensor, "b t hd"],
    adapter_ids: Int[Tensor, "b"],
) -> tuple[Tensor, Tensor, Tensor]:
    if (prepared := kernels.layers[i]) is not None:
        return product_heads(x, prepared, cos, sin)
    spec = model.layers[i].spec
    run = lambda params, adapter, x, cos, sin: queries_keys_values(
        x, params, adapter, cos, sin, spec, None
    )
    return _each_row(model, i, run, adapter_ids, x, cos, sin)


def _rest_of_layer(
    model: PreparedModel,
    i: int,
    kernels: StepKernels,
    x: Float[Tensor, "b t d"],
    heads: Float[Tensor, "b h t hd"],
    adapter_ids: Int[Tensor, "b"],
) -> Float[Tensor, "b t d"]:
    """The layer's output, from its input and attention's result."""
    if (prepared := kernels.layers[i]) is not None:
        return rest_by_products(x, heads, prepared)
    spec = model.layers[i].spec
    # The loop over experts, which waits for the GPU, is the faster form on the CPU and in prefill.
    wait = model.stack_size is not None or not x.is_cuda or x.shape[1] > 1

    def run(params: Any, adapter: Any, x: Tensor, heads: Tensor) -> Tensor:
        attended = attention_output(heads, params, adapter, spec, None)
        x = add_residual(x, _steered(model, f"layers.{i}.attn.out", attended), spec)
        out = mlp_output(x, params, adapter, spec, None, wait=wait)
        return add_residual(x, _steered(model, f"layers.{i}.mlp.out", out), spec)

    return _each_row(model, i, run, adapter_ids, x, heads)


def _each_row(
    model: PreparedModel,
    i: int,
    run: Callable[..., Any],
    adapter_ids: Int[Tensor, "b"],
    *xs: Float[Tensor, "b ..."],
) -> Any:
    """run(params, adapter, *xs) of layer i. Under a stack, every row with its own of both."""
    layer = model.layers[i]
    if model.stack_size is None:
        return run(taken(layer.params), layer.adapter, *xs)

    def one(tree: Any, *row: Tensor) -> Any:
        adapter, copies = tree
        params = layer.params
        if copies:
            own: Any = {"replaced": copies}
            params = with_replaced(model.base, own, tied=False)["layers"][i]
        return tree_map(lambda y: y[0], run(params, adapter, *(x[None] for x in row)))

    return _row_by_row(one, (layer.adapter, model.layer_copies[i]), adapter_ids, *xs)


def _row_by_row(
    run: Callable[..., Any], stack: Any, adapter_ids: Int[Tensor, "b"], *xs: Tensor
) -> Any:
    """run(adapter, *row) of every row, where a stack holds the adapters."""
    trees = tree_map(lambda x: x[adapter_ids], stack)
    if len(adapter_ids) == 1 and not adapter_ids.is_cuda:  # vmap takes most of a small step's time
        result = run(tree_map(lambda x: x[0], trees), *(x[0] for x in xs))
        return tree_map(lambda y: y[None], result)
    return torch.vmap(run)(trees, *xs)
