"""The attention half of a decoder layer: RMSNorm, q, k and v, RoPE, attention, o, RMSNorm."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastlora.models.fused_qkv import QKV, one_gradient
from fastlora.models.layer_spec import LayerSpec
from fastlora.models.norms import normed
from fastlora.models.params import (
    BiasedLoRA,
    DoRA,
    ExampleLoRA,
    LayerAdapter,
    LayerParams,
    StackedLoRA,
)
from fastlora.models.projections import group_arguments, project
from fastlora.ops.attention import flash
from fastlora.ops.attention.attention import attention
from fastlora.ops.attention.context_group import gather_keys_values
from fastlora.ops.attention.flash import Spans, flash_attention
from fastlora.ops.attention.part_attention import PartSpans, part_attention
from fastlora.ops.attention.rope import apply_rope, in_halves
from fastlora.ops.gradient_barrier import gradient_barrier
from fastlora.ops.linear.lora_group import joint_lora_linears

Heads = tuple[Float[Tensor, "b h t hd"], Float[Tensor, "b kv t hd"], Float[Tensor, "b kv t hd"]]


def _heads(
    x: Float[Tensor, "b t d"],
    params: LayerParams,
    adapter: LayerAdapter,
    spec: LayerSpec,
    key: Int[Tensor, "..."] | None,
) -> Heads:
    """q, k and v of the normed input, split into heads and not rotated.

    In memory they are [b, t, h, hd]; the results are transposed views.
    """
    b, t, _ = x.shape
    inputs = layer_norm(x, params, spec.norms.attention_in, spec)
    q, k, v = _products(inputs, params, adapter, spec, key)
    if "q_norm" in params:
        # Without the barrier Inductor would fuse these norms' gradients with RoPE's, in a kernel
        # that may read values before they are written (ops/gradient_barrier.py).
        q, k = (gradient_barrier(y) for y in normed_queries_keys(q, k, params, spec))
    q, k, v = (y.view(b, t, -1, spec.head_dim) for y in (q, k, v))
    q, k = (in_halves(y, spec.rope_dim, spec.rope_of_neighbours) for y in (q, k))
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _products(
    inputs: Float[Tensor, "b t d"],
    params: LayerParams,
    adapter: LayerAdapter,
    spec: LayerSpec,
    key: Int[Tensor, "..."] | None,
) -> Sequence[Float[Tensor, "b t _"]]:
    """q, k and v; views of one tensor if they are one linear layer."""
    if "qkv_proj" in params:
        (y,) = project(inputs, ("qkv_proj",), params, adapter, spec, key)
        return split_qkv(y, spec)
    return project(inputs, QKV, params, adapter, spec, key)


def split_qkv(y: Float[Tensor, "*b w"], spec: LayerSpec) -> Sequence[Float[Tensor, "*b _"]]:
    """q, k and v of their fused projection, as views."""
    q, kv = (n * spec.head_dim for n in (spec.num_attention_heads, spec.num_key_value_heads))
    return y.split([q, kv, kv], -1)


def _joint_heads(
    x: Float[Tensor, "b t d"],
    params: LayerParams,
    adapter: LayerAdapter,
    spec: LayerSpec,
    key: Int[Tensor, "..."] | None,
) -> tuple[Tensor, Tensor, Tensor, Float[Tensor, "b t w"] | None]:
    """`_heads`, and one tensor whose gradient is dq, dk and dv side by side, or None.

    Attention's backward kernel writes its three results into one buffer, which the fused product of
    q, k and v then reads. Otherwise Inductor takes 74 us per layer of 1B at 4 x 2048 tokens to
    rotate them back and to copy them together (H100). This needs weights whose input gradient is
    one product (fused, or in e4m3), and products whose results go to attention unchanged.
    """
    # DoRA and lora_bias change the products afterwards, and norms follow them in Qwen3, another
    # order of dimensions in Helium. The ops of
    # stacked adapters and of per-example gradients return no joint gradient.
    unchanged = spec.qat_scheme is None and "q_norm" not in params and spec.in_order
    unchanged = unchanged and not any(
        isinstance(adapter.get(n), DoRA | BiasedLoRA | StackedLoRA | ExampleLoRA) for n in QKV
    )
    if "qkv_proj" in params and spec.in_order:
        inputs = layer_norm(x, params, spec.norms.attention_in, spec)
        (joint,) = project(inputs, ("qkv_proj",), params, adapter, spec, key)
        parts = split_qkv(joint.detach(), spec)  # their gradient comes by `joint` alone
        q, k, v = (y.unflatten(2, (-1, spec.head_dim)).transpose(1, 2) for y in parts)
        return q, k, v, joint
    if not unchanged or not one_gradient(params):
        return *_heads(x, params, adapter, spec, key), None
    inputs = layer_norm(x, params, spec.norms.attention_in, spec)
    arguments = group_arguments(QKV, params, adapter, spec, key)
    ys, joint = joint_lora_linears(inputs, *arguments, params.get("qkv"), fused=spec.fused)
    q, k, v = (y.unflatten(2, (-1, spec.head_dim)).transpose(1, 2) for y in ys)
    return q, k, v, joint


def add_residual(
    x: Float[Tensor, "*b d"], y: Float[Tensor, "*b d"], spec: LayerSpec
) -> Float[Tensor, "*b d"]:
    """x + residual_scale * y, where y is the output of attention or of the MLP."""
    return x + y if spec.residual_scale == 1.0 else torch.add(x, y, alpha=spec.residual_scale)


def layer_norm(
    x: Float[Tensor, "*b d"], params: LayerParams, name: str | None, spec: LayerSpec
) -> Float[Tensor, "*b d"]:
    """x through a norm of the layer; x itself if `name` is None."""
    return normed(x, params, name, spec.rms_norm_eps, spec.norm_kind)


def normed_queries_keys(
    q: Float[Tensor, "*b q"], k: Float[Tensor, "*b kv"], params: LayerParams, spec: LayerSpec
) -> tuple[Float[Tensor, "*b q"], Float[Tensor, "*b kv"]]:
    """All heads of q and k side by side, normed head by head, or together if the weight is of all
    heads."""

    def one(y: Tensor, name: str) -> Tensor:
        parts = y.unflatten(-1, (-1, params[name].shape[0]))
        return layer_norm(parts, params, name, spec).flatten(-2)

    return one(q, "q_norm"), one(k, "k_norm")


def queries_keys_values(
    x: Float[Tensor, "b t d"],
    params: LayerParams,
    adapter: LayerAdapter,
    cos: Float[Tensor, "#b t hd"],
    sin: Float[Tensor, "#b t hd"],
    spec: LayerSpec,
    key: Int[Tensor, "..."] | None,
) -> Heads:
    """q, k and v of the normed input, split into heads and rotated, for attention and KV caches."""
    q, k, v = _heads(x, params, adapter, spec, key)
    if spec.rope:  # SmolLM3 leaves it out in every fourth layer
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
    return q, k, v


def attention_output(
    heads: Float[Tensor, "b h t hd"],
    params: LayerParams,
    adapter: LayerAdapter,
    spec: LayerSpec,
    key: Int[Tensor, "..."] | None,
) -> Float[Tensor, "b t d"]:
    """The output projection of attention's result, through the norm behind it if there is one."""
    merged = heads.transpose(1, 2).flatten(2)
    (y,) = project(merged, ("o_proj",), params, adapter, spec, key)
    if spec.norms.attention_out is None:
        return y
    # Without the barrier one kernel would sum this result's gradient, of the MLP and of the
    # residual, and read the sum again for the norm's gradient (ops/gradient_barrier.py).
    return gradient_barrier(layer_norm(y, params, spec.norms.attention_out, spec))


def attention_block(
    x: Float[Tensor, "b t d"],
    params: LayerParams,
    adapter: LayerAdapter,
    cos: Float[Tensor, "#b t hd"],
    sin: Float[Tensor, "#b t hd"],
    mask: Bool[Tensor, "#b 1 t s"] | Spans | PartSpans | None,
    spec: LayerSpec,
    key: Int[Tensor, "..."] | None,
) -> Float[Tensor, "b t d"]:
    """norm(o(attention(norm(x)))), which the caller adds to x; each norm if the layer has it.

    s is t, except in context parallel.
    """
    if spec.context is not None:
        heads = _attention_over_ranks(x, params, adapter, cos, sin, mask, spec, key)
        return attention_output(heads, params, adapter, spec, key)
    assert not isinstance(mask, PartSpans)
    # Spans are made only for the Triton kernels. Plain causal attention may be faster by SDPA.
    if isinstance(mask, Spans) or (mask is None and _use_flash(x, spec)):
        # These kernels rotate q and k themselves.
        q, k, v, joint = _joint_heads(x, params, adapter, spec, key)
        rope = (cos, sin) if spec.rope else None
        heads = flash_attention(q, k, v, rope, mask, joint, *_scale_and_cap(spec))
    else:
        q, k, v = queries_keys_values(x, params, adapter, cos, sin, spec, key)
        heads = plain_attention(q, k, v, mask, spec)
    return attention_output(heads, params, adapter, spec, key)


def _attention_over_ranks(
    x: Float[Tensor, "b t d"],
    params: LayerParams,
    adapter: LayerAdapter,
    cos: Float[Tensor, "#b t hd"],
    sin: Float[Tensor, "#b t hd"],
    mask: Bool[Tensor, "#b 1 t s"] | Spans | PartSpans | None,
    spec: LayerSpec,
    key: Int[Tensor, "..."] | None,
) -> Float[Tensor, "b h t hd"]:
    """Attention of this rank's queries over the keys of all ranks that have the rows."""
    assert spec.context is not None
    q, k, v = queries_keys_values(x, params, adapter, cos, sin, spec, key)
    k, v = gather_keys_values(k, v, spec.context)
    if isinstance(mask, PartSpans):
        return part_attention(q, k, v, mask, *_scale_and_cap(spec))
    assert isinstance(mask, Tensor)
    return plain_attention(q, k, v, mask, spec)


def rotated_attention(
    q: Float[Tensor, "b h t hd"],
    k: Float[Tensor, "b kv t hd"],
    v: Float[Tensor, "b kv t hd"],
    mask: Bool[Tensor, "#b 1 t t"] | Spans | None,
    spec: LayerSpec,
) -> Float[Tensor, "b h t hd"]:
    """Attention of `queries_keys_values`' results, for callers that keep the rotated keys."""
    if isinstance(mask, Spans) or (mask is None and _use_flash(q, spec)):
        return flash_attention(q, k, v, None, mask, None, *_scale_and_cap(spec))
    return plain_attention(q, k, v, mask, spec)


def plain_attention(
    q: Float[Tensor, "b h t hd"],
    k: Float[Tensor, "b kv s hd"],
    v: Float[Tensor, "b kv s hd"],
    mask: Bool[Tensor, "#b 1 t s"] | None,
    spec: LayerSpec,
) -> Float[Tensor, "b h t hd"]:
    """Attention of rotated queries and keys without our kernels."""
    scale, cap = _scale_and_cap(spec)
    return attention(q, k, v, mask, deterministic=spec.deterministic, scale=scale, cap=cap)


def _scale_and_cap(spec: LayerSpec) -> tuple[float | None, float | None]:
    return spec.attention_scale, spec.attention_cap


def _use_flash(x: Float[Tensor, "b *h t d"], spec: LayerSpec) -> bool:
    """Whether the Triton kernels compute plain causal attention.

    They do if results must be deterministic, if scores have a cap, which SDPA does not compute, or
    if they are faster than SDPA.
    """
    t, heads, head_dim = x.shape[-2], spec.num_attention_heads, spec.head_dim
    supported = spec.fused and flash.kernel_supports(x.dtype, heads, head_dim, t)
    needed = spec.deterministic or spec.attention_cap is not None
    return supported and (needed or flash.kernel_is_faster(head_dim, t))
