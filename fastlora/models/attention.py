"""The attention half of a decoder layer: RMSNorm, q, k and v, RoPE, attention, o."""

from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastlora.models.fused_qkv import QKV
from fastlora.models.params import (
    BiasedLoRA,
    DoRA,
    ExampleLoRA,
    LayerAdapter,
    LayerParams,
    StackedLoRA,
)
from fastlora.models.projections import LayerSpec, group_arguments, project
from fastlora.ops.attention import flash
from fastlora.ops.attention.attention import attention
from fastlora.ops.attention.context_group import gather_keys_values
from fastlora.ops.attention.flash import Spans, flash_attention
from fastlora.ops.attention.part_attention import PartSpans, part_attention
from fastlora.ops.attention.rope import apply_rope
from fastlora.ops.gradient_barrier import gradient_barrier
from fastlora.ops.linear.lora_group import joint_lora_linears
from fastlora.ops.rms_norm import rms_norm

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
    normed = rms_norm(x, params["input_layernorm"], spec.rms_norm_eps)
    qkv = project(normed, QKV, params, adapter, spec, key)
    q, k, v = (y.view(b, t, -1, spec.head_dim) for y in qkv)
    if "q_norm" in params:
        # Without the barrier Inductor would fuse these norms' gradients with RoPE's, in a kernel
        # that may read values before they are written (ops/gradient_barrier.py).
        q = gradient_barrier(rms_norm(q, params["q_norm"], spec.rms_norm_eps))
        k = gradient_barrier(rms_norm(k, params["k_norm"], spec.rms_norm_eps))
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


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
    rotate them back and to copy them together (H100). This needs fused weights, and products whose
    results go to attention unchanged.
    """
    # DoRA and lora_bias change the products afterwards, and norms follow them in Qwen3. The ops of
    # stacked adapters and of per-example gradients return no joint gradient.
    unchanged = spec.qat_scheme is None and "q_norm" not in params
    unchanged = unchanged and not any(
        isinstance(adapter.get(n), DoRA | BiasedLoRA | StackedLoRA | ExampleLoRA) for n in QKV
    )
    if "qkv" not in params or not unchanged:
        return *_heads(x, params, adapter, spec, key), None
    normed = rms_norm(x, params["input_layernorm"], spec.rms_norm_eps)
    arguments = group_arguments(QKV, params, adapter, spec, key)
    ys, joint = joint_lora_linears(normed, *arguments, params["qkv"])
    q, k, v = (y.unflatten(2, (-1, spec.head_dim)).transpose(1, 2) for y in ys)
    return q, k, v, joint


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
    """The output projection of attention's result."""
    merged = heads.transpose(1, 2).flatten(2)
    return project(merged, ("o_proj",), params, adapter, spec, key)[0]


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
    """o(attention(norm(x))), which the caller adds to x. s is t, except in context parallel."""
    if spec.context is not None:
        heads = _attention_over_ranks(x, params, adapter, cos, sin, mask, spec, key)
        return attention_output(heads, params, adapter, spec, key)
    assert not isinstance(mask, PartSpans)
    # Spans are made only for the Triton kernels. Plain causal attention may be faster by SDPA.
    if isinstance(mask, Spans) or (mask is None and _use_flash(x, spec)):
        # These kernels rotate q and k themselves.
        q, k, v, joint = _joint_heads(x, params, adapter, spec, key)
        heads = flash_attention(q, k, v, (cos, sin) if spec.rope else None, mask, joint)
    else:
        q, k, v = queries_keys_values(x, params, adapter, cos, sin, spec, key)
        heads = attention(q, k, v, mask, deterministic=spec.deterministic)
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
        return part_attention(q, k, v, mask)
    assert isinstance(mask, Tensor)
    return attention(q, k, v, mask, deterministic=spec.deterministic)


def rotated_attention(
    q: Float[Tensor, "b h t hd"],
    k: Float[Tensor, "b kv t hd"],
    v: Float[Tensor, "b kv t hd"],
    mask: Bool[Tensor, "#b 1 t t"] | Spans | None,
    spec: LayerSpec,
) -> Float[Tensor, "b h t hd"]:
    """Attention of `queries_keys_values`' results, for callers that keep the rotated keys."""
    if isinstance(mask, Spans) or (mask is None and _use_flash(q, spec)):
        return flash_attention(q, k, v, None, mask)
    return attention(q, k, v, mask, deterministic=spec.deterministic)


def _use_flash(x: Float[Tensor, "b *h t d"], spec: LayerSpec) -> bool:
    """Whether the Triton kernels compute plain causal attention.

    They do if results must be deterministic, or if they are faster than SDPA.
    """
    t, heads, head_dim = x.shape[-2], spec.num_attention_heads, spec.head_dim
    supported = spec.fused and flash.kernel_supports(x.dtype, heads, head_dim, t)
    return supported and (spec.deterministic or flash.kernel_is_faster(head_dim, t))
