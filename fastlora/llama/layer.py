"""One decoder layer, as pure functions: RMSNorm, attention, RMSNorm, SwiGLU, LoRA everywhere."""

from dataclasses import dataclass
from typing import TypeGuard

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastlora.llama.experts import expert_mlp
from fastlora.llama.params import (
    ROUTER,
    TARGETS,
    AdapterRecord,
    BiasedLoRA,
    DoRA,
    LayerAdapter,
    LayerParams,
    Linear,
    LoRA,
)
from fastlora.llama.spec import Spec
from fastlora.llama.stacked import QKV
from fastlora.llama.start import down, rank, up
from fastlora.ops import flash_attention as flash
from fastlora.ops.attention import attention
from fastlora.ops.dora import row_norms
from fastlora.ops.dropout import dropout, fold
from fastlora.ops.dropped_low import Masks
from fastlora.ops.flash_attention import Spans, flash_attention
from fastlora.ops.frozen_linear import frozen_linear
from fastlora.ops.gradient_barrier import gradient_barrier
from fastlora.ops.lora_linear import lora_linear
from fastlora.ops.lora_linears import Branch, joint_lora_linears, lora_linears
from fastlora.ops.lora_swiglu import lora_swiglu, takes
from fastlora.ops.qat_linear import qat_linear
from fastlora.ops.rms_norm import rms_norm
from fastlora.ops.rope import apply_rope

_SALT = {name: salt for salt, name in enumerate(TARGETS)}


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """What one layer needs to know. Layers with equal specs share one compiled graph."""

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: bool
    scalings: tuple[tuple[str, float], ...]  # projection -> factor of its low-rank term
    lora_dropout: float
    qat_scheme: str | None
    deterministic: bool
    num_experts_per_tok: int
    norm_topk_prob: bool
    fused: bool  # whether Triton kernels run inside
    replaced: tuple[str, ...]  # tensors that are trained copies: gradients make another graph


def layer_spec(spec: Spec, layer: int, *, fused: bool = False) -> LayerSpec:
    """The part of `spec` that layer number `layer` depends on; `fused`: with Triton kernels."""
    config, lora, prefix = spec.config, spec.lora, f"model.layers.{layer}."
    copies = [name for name in spec.outside.replaced if name.startswith(prefix)]
    return LayerSpec(
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.rms_norm_eps,
        rope=bool(config.no_rope_layers[layer]),
        scalings=tuple((t.name, t.scaling) for t in lora.targets[layer]) if lora else (),
        lora_dropout=lora.lora_dropout if lora else 0.0,
        qat_scheme=spec.qat_scheme,
        deterministic=spec.deterministic,
        num_experts_per_tok=config.num_experts_per_tok if config.sparse_layers[layer] else 0,
        norm_topk_prob=config.norm_topk_prob,
        fused=fused,
        replaced=tuple(name.removeprefix(prefix) for name in copies),
    )


def project(
    x: Float[Tensor, "b t d_in"],
    names: tuple[str, ...],
    params: LayerParams,
    adapter: LayerAdapter,
    spec: LayerSpec,
    key: Int[Tensor, ""] | None,
) -> list[Float[Tensor, "b t d_out"]]:
    """The projections `names` of one x, each with its low-rank term where the adapter has one."""
    scalings = dict(spec.scalings)
    if spec.qat_scheme is not None:
        each = _records(names, params, adapter, scalings)
        return [_fake_quantised(x, *record, spec.qat_scheme) for record in each]
    if key is not None and any(isinstance(adapter.get(name), DoRA) for name in names):
        return [_with_masked_base(x, name, params, adapter, spec, key) for name in names]
    matrices, masks = _downs(names, params, adapter, spec, key)
    branches = [_branch(*record) for record in _records(names, params, adapter, scalings)]
    whole = params.get("qkv") if names == QKV else None
    _, ys = lora_linears(x, matrices, branches, masks, whole)
    return [
        _with_vectors(y, params[name], adapter[name], scalings[name]) if name in adapter else y
        for name, y in zip(names, ys, strict=True)
    ]


def _records(
    names: tuple[str, ...],
    params: LayerParams,
    adapter: LayerAdapter,
    scalings: dict[str, float],
) -> list[tuple[Linear, AdapterRecord | None, float]]:
    """Of each projection its frozen part, its trained one and the factor of its low-rank term."""
    return [(params[n], adapter.get(n), scalings.get(n, 1.0)) for n in names]


def _branch(linear: Linear, lora: AdapterRecord | None, scaling: float) -> Branch:
    weight, bias = linear["weight"], linear.get("bias")
    if lora is None:
        return Branch(weight, bias)
    return Branch(weight, None if isinstance(lora, DoRA) else bias, up(lora, linear), scaling)


def _downs(
    names: tuple[str, ...],
    params: LayerParams,
    adapter: LayerAdapter,
    spec: LayerSpec,
    key: Int[Tensor, ""] | None,
) -> tuple[list[Float[Tensor, "_ d_in"]], Masks | None]:
    """Every A, and the masks through which they see x: each projection has its own, and start
    factors, part of the base, have none."""
    matrices, slots = [], []
    for name in names:
        if name in adapter:
            matrices.append(adapter[name].a)
            slots.append(_SALT[name])
            if "start" in params[name]:
                matrices.append(params[name]["start"].a)
                slots.append(-1)
    if key is None:
        return matrices, None
    # Those of all names: a compiled layer forms them once, in one launch.
    keys = fold(key, torch.arange(len(_SALT), device=key.device))
    return matrices, Masks(keys, tuple(slots), spec.lora_dropout, spec.fused)


def _with_masked_base(
    x: Float[Tensor, "b t d_in"],
    name: str,
    params: LayerParams,
    adapter: LayerAdapter,
    spec: LayerSpec,
    key: Int[Tensor, ""],
) -> Float[Tensor, "b t d_out"]:
    """A projection that may carry DoRA, which under dropout multiplies W with the masked x too."""
    linear, lora = params[name], adapter.get(name)
    if not isinstance(lora, DoRA):
        return project(x, (name,), params, adapter, spec, key)[0]
    dropped = dropout(x, spec.lora_dropout, fold(key, _SALT[name]))
    low, scaling = F.linear(dropped, lora.a), dict(spec.scalings)[name]
    return adapted_linear(x, dropped, low, linear, lora, scaling)


def adapted_linear(
    x: Float[Tensor, "*n d_in"],
    dropped: Float[Tensor, "*n d_in"] | None,
    low: Float[Tensor, "*n r"],
    linear: Linear,
    lora: AdapterRecord,
    scaling: float,
) -> Float[Tensor, "*n d_out"]:
    """One projection with its low-rank term, in x.dtype."""
    if isinstance(lora, DoRA):
        gain = _gain(linear, lora, scaling)
        return dora_linear(x, dropped, low, linear, lora, gain, scaling)
    y = lora_linear(x, low, linear["weight"], linear.get("bias"), up(lora, linear), scaling)
    return _with_vectors(y, linear, lora, scaling)


def _with_vectors(
    y: Float[Tensor, "*n d_out"], linear: Linear, lora: AdapterRecord, scaling: float
) -> Float[Tensor, "*n d_out"]:
    """An adapted product (of DoRA: without the base's bias) with the adapter's own vectors, which
    enter in their own, wider dtype; in y.dtype."""
    if isinstance(lora, DoRA):
        return _scaled(y, _gain(linear, lora, scaling), linear.get("bias"))
    return (y + scaling * lora.bias).to(y.dtype) if isinstance(lora, BiasedLoRA) else y


def _gain(linear: Linear, lora: DoRA, scaling: float) -> Float[Tensor, "d_out"]:
    """DoRA's m / n."""
    a, b = down(lora, linear), up(lora, linear)
    return lora.magnitude / row_norms(linear["weight"], a, b, scaling)


def _scaled(
    y: Float[Tensor, "*n d_out"],
    gain: Float[Tensor, "d_out"],
    bias: Float[Tensor, "d_out"] | None,
) -> Float[Tensor, "*n d_out"]:
    scaled = gain * y
    return (scaled if bias is None else scaled + bias).to(y.dtype)


def dora_linear(
    x: Float[Tensor, "*n d_in"],
    dropped: Float[Tensor, "*n d_in"] | None,
    low: Float[Tensor, "*n r"],
    linear: Linear,
    lora: LoRA | DoRA,
    gain: Float[Tensor, "d_out"],
    scaling: float,
) -> Float[Tensor, "*n d_out"]:
    """`gain` (m / n) times the adapted product; what a dropout mask hides keeps the base's
    length."""
    weight, bias = linear["weight"], linear.get("bias")
    b = up(lora, linear)
    if dropped is None:
        return _scaled(lora_linear(x, low, weight, None, b, scaling), gain, bias)
    base, masked = _frozen(x, linear, bias, scaling), _frozen(dropped, linear, None, scaling)
    update = scaling * F.linear(low, lora.b)
    return (base + (gain - 1) * masked + gain * update).to(x.dtype)


def _frozen(
    x: Float[Tensor, "*n d_in"],
    linear: Linear,
    bias: Float[Tensor, "d_out"] | None,
    scaling: float,
) -> Float[Tensor, "*n d_out"]:
    """The base's product less that of its start factors."""
    y = frozen_linear(x, linear["weight"], bias)
    if "start" not in linear:
        return y
    return y - scaling * F.linear(F.linear(x, linear["start"].a), linear["start"].b)


def _fake_quantised(
    x: Float[Tensor, "b t d_in"],
    linear: Linear,
    lora: AdapterRecord | None,
    scaling: float,
    scheme: str,
) -> Float[Tensor, "b t d_out"]:
    """One projection as merging and quantising would leave it, adapted or not."""
    weight, bias = linear["weight"], linear.get("bias")
    assert isinstance(weight, Tensor), "lora() refuses qat_scheme over a quantised base"
    if lora is None:
        return qat_linear(x, weight, bias, None, None, None, scaling, scheme)
    if isinstance(lora, BiasedLoRA):
        wide = torch.promote_types(lora.bias.dtype, torch.float32)
        of_lora = scaling * lora.bias.to(wide)
        bias = (of_lora if bias is None else bias + of_lora).to(x.dtype)
    magnitude = lora.magnitude if isinstance(lora, DoRA) else None
    return qat_linear(x, weight, bias, lora.a, lora.b, magnitude, scaling, scheme)


Heads = tuple[Float[Tensor, "b h t hd"], Float[Tensor, "b kv t hd"], Float[Tensor, "b kv t hd"]]


def _heads(
    x: Float[Tensor, "b t d"],
    params: LayerParams,
    adapter: LayerAdapter,
    spec: LayerSpec,
    key: Int[Tensor, ""] | None,
) -> Heads:
    """Normed, projected and split into heads, tokens before heads in memory; not rotated."""
    b, t, _ = x.shape
    normed = rms_norm(x, params["input_layernorm"], spec.rms_norm_eps)
    qkv = project(normed, QKV, params, adapter, spec, key)
    q, k, v = (y.view(b, t, -1, spec.head_dim) for y in qkv)
    if "q_norm" in params:
        q = gradient_barrier(rms_norm(q, params["q_norm"], spec.rms_norm_eps))
        k = gradient_barrier(rms_norm(k, params["k_norm"], spec.rms_norm_eps))
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _joint_heads(
    x: Float[Tensor, "b t d"],
    params: LayerParams,
    adapter: LayerAdapter,
    spec: LayerSpec,
    key: Int[Tensor, ""] | None,
) -> tuple[Tensor, Tensor, Tensor, Float[Tensor, "b t w"] | None]:
    """`_heads`, and what receives their gradients side by side, where their weights lie so and
    nothing stands between the products and attention: Inductor took 74 us a layer of 1B, 4 x 2048
    tokens, to rotate them back and lay them so (H100)."""
    plain = spec.qat_scheme is None and "q_norm" not in params
    plain = plain and not any(isinstance(adapter.get(n), DoRA | BiasedLoRA) for n in QKV)
    if "qkv" not in params or not plain:
        return *_heads(x, params, adapter, spec, key), None
    normed = rms_norm(x, params["input_layernorm"], spec.rms_norm_eps)
    matrices, masks = _downs(QKV, params, adapter, spec, key)
    records = _records(QKV, params, adapter, dict(spec.scalings))
    branches = [_branch(*record) for record in records]
    ys, joint = joint_lora_linears(normed, matrices, branches, masks, params["qkv"])
    q, k, v = (y.unflatten(2, (-1, spec.head_dim)).transpose(1, 2) for y in ys)
    return q, k, v, joint


def queries_keys_values(
    x: Float[Tensor, "b t d"],
    params: LayerParams,
    adapter: LayerAdapter,
    cos: Float[Tensor, "#b t hd"],
    sin: Float[Tensor, "#b t hd"],
    spec: LayerSpec,
    key: Int[Tensor, ""] | None,
) -> Heads:
    """Normed, projected, split into heads and rotated: what attention and a KV cache take."""
    q, k, v = _heads(x, params, adapter, spec, key)
    if spec.rope:
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
    return q, k, v


def attention_output(
    heads: Float[Tensor, "b h t hd"],
    params: LayerParams,
    adapter: LayerAdapter,
    spec: LayerSpec,
    key: Int[Tensor, ""] | None,
) -> Float[Tensor, "b t d"]:
    """The output projection of the attended heads."""
    joined = heads.transpose(1, 2).flatten(2)
    return project(joined, ("o_proj",), params, adapter, spec, key)[0]


def attention_block(
    x: Float[Tensor, "b t d"],
    params: LayerParams,
    adapter: LayerAdapter,
    cos: Float[Tensor, "#b t hd"],
    sin: Float[Tensor, "#b t hd"],
    mask: Bool[Tensor, "#b 1 t t"] | Spans | None,
    spec: LayerSpec,
    key: Int[Tensor, ""] | None,
) -> Float[Tensor, "b t d"]:
    """attention(norm(x)), which the caller adds to x."""
    if isinstance(mask, Spans) or (mask is None and _flashes(x, spec)):
        q, k, v, joint = _joint_heads(x, params, adapter, spec, key)
        heads = flash_attention(q, k, v, (cos, sin) if spec.rope else None, mask, joint)
    else:
        q, k, v = queries_keys_values(x, params, adapter, cos, sin, spec, key)
        heads = attention(q, k, v, mask, deterministic=spec.deterministic)
    return attention_output(heads, params, adapter, spec, key)


def _flashes(x: Float[Tensor, "b t d"], spec: LayerSpec) -> bool:
    """Whether the Triton kernels of attention run where each query sees all before it: for the sake
    of the same bits, or because they are the fastest."""
    t, heads, head_dim = x.shape[1], spec.num_attention_heads, spec.head_dim
    able = spec.fused and flash.takes(x.dtype, heads, head_dim, t)
    return able and (spec.deterministic or flash.pays(head_dim, t))


def mlp_block(
    x: Float[Tensor, "b t d"],
    params: LayerParams,
    adapter: LayerAdapter,
    spec: LayerSpec,
    key: Int[Tensor, ""] | None,
) -> Float[Tensor, "b t d"]:
    """x + SwiGLU(norm(x)), Shazeer 2020, arXiv:2002.05202: down(silu(gate) * up).

    In a sparse layer, x + the weighted SwiGLUs of each token's experts.
    """
    normed = rms_norm(x, params["post_attention_layernorm"], spec.rms_norm_eps)
    if "experts" in params:
        normed = gradient_barrier(normed)
        (logits,) = project(normed, (ROUTER,), params, adapter, spec, key)
        k, scalings = spec.num_experts_per_tok, dict(spec.scalings)
        experts = params["experts"]
        return x + expert_mlp(normed, logits, experts, adapter, scalings, k, spec.norm_topk_prob)
    if _fuses(params, adapter, spec, x.dtype, key):
        return x + _fused_mlp(normed, params, adapter, spec, key)
    gate, up = project(normed, ("gate_proj", "up_proj"), params, adapter, spec, key)
    return x + project(F.silu(gate) * up, ("down_proj",), params, adapter, spec, key)[0]


def _fuses(
    params: LayerParams,
    adapter: LayerAdapter,
    spec: LayerSpec,
    dtype: torch.dtype,
    key: Int[Tensor, ""] | None,
) -> bool:
    """Whether gate and up both carry LoRA that the kernel takes, or both DoRA without dropout."""
    if not spec.fused or spec.qat_scheme is not None:
        return False
    gate, up = (adapter.get(name) for name in ("gate_proj", "up_proj"))
    if type(gate) is not type(up) or (isinstance(gate, DoRA) and key is not None):
        return False
    pairs = ((gate, params["gate_proj"]), (up, params["up_proj"]))
    return all(_is_small(lora, linear, dtype) for lora, linear in pairs)


def _is_small(
    lora: AdapterRecord | None, linear: Linear, dtype: torch.dtype
) -> TypeGuard[LoRA | DoRA]:
    # DoRA scales what the bias is then added to; the kernel has no bias of its own.
    if not (isinstance(lora, LoRA) or (isinstance(lora, DoRA) and "bias" not in linear)):
        return False
    return takes(dtype, rank(lora, linear))


def _gate_up(
    x: Float[Tensor, "b t d"],
    params: LayerParams,
    adapter: LayerAdapter,
    spec: LayerSpec,
    key: Int[Tensor, ""] | None,
) -> tuple[list[Float[Tensor, "b t _"]], list[Float[Tensor, "b t f"]]]:
    """The low-rank halves and the base products of gate and up, which SwiGLU adds."""
    names = ("gate_proj", "up_proj")
    branches = [Branch(params[name]["weight"], params[name].get("bias")) for name in names]
    matrices, masks = _downs(names, params, adapter, spec, key)
    low, ys = lora_linears(x, matrices, branches, masks)
    assert low is not None
    return [*low.split([rank(adapter[name], params[name]) for name in names], -1)], ys


def _fused_mlp(
    x: Float[Tensor, "b t d"],
    params: LayerParams,
    adapter: LayerAdapter,
    spec: LayerSpec,
    key: Int[Tensor, ""] | None,
) -> Float[Tensor, "b t d"]:
    """SwiGLU with the low-rank terms of gate and up inside its kernel, then the down projection."""
    names, scalings = ["gate_proj", "up_proj"], dict(spec.scalings)
    (low_g, low_u), (g, u) = _gate_up(x, params, adapter, spec, key)
    b_g, b_u = (up(adapter[name], params[name]) for name in names)
    s_g, s_u = (scalings[name] for name in names)
    gains = _gains(names, params, adapter, scalings)
    own, linear = adapter.get("down_proj"), params["down_proj"]
    # With dropout it has an input of its own, h under a mask.
    if key is not None or not _is_small(own, linear, x.dtype):
        h, _ = lora_swiglu(g, u, low_g, low_u, b_g, b_u, None, gains, s_g, s_u)
        return project(h, ("down_proj",), params, adapter, spec, key)[0]
    a = down(own, linear)
    h, low = lora_swiglu(g, u, low_g, low_u, b_g, b_u, a, gains, s_g, s_u)
    assert low is not None
    return adapted_linear(h, None, low, linear, own, scalings["down_proj"])


def _gains(
    names: list[str], params: LayerParams, adapter: LayerAdapter, scalings: dict[str, float]
) -> Float[Tensor, "2 f"] | None:
    """DoRA's m / n of two projections in float32; None where they carry plain LoRA."""
    gains = [
        _gain(params[name], lora, scalings[name]).float()
        for name in names
        if isinstance(lora := adapter[name], DoRA)
    ]
    return torch.stack(gains) if gains else None
