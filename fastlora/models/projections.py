"""projections."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fastlora.models.fused_qkv import QKV
from fastlora.models.init_offset import a_with_offset, b_with_offset
from fastlora.models.params import (
    TARGETS,
    AdapterRecord,
    BiasedLoRA,
    DoRA,
    LayerAdapter,
    LayerParams,
    Linear,
    LoRA,
)
from fastlora.models.spec import Spec
from fastlora.ops.dropout import dropout, fold
from fastlora.ops.linear.dora import row_norms
from fastlora.ops.linear.frozen import frozen_linear
from fastlora.ops.linear.lora import lora_linear
from fastlora.ops.linear.lora_group import Branch, lora_linears
from fastlora.ops.linear.masked_lora import Masks
from fastlora.ops.linear.qat import qat_linear

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
    copies = [name for name in spec.extras.replaced if name.startswith(prefix)]
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
        each = projection_parts(names, params, adapter, scalings)
        return [_fake_quantised(x, *record, spec.qat_scheme) for record in each]
    if key is not None and any(isinstance(adapter.get(name), DoRA) for name in names):
        return [_with_masked_base(x, name, params, adapter, spec, key) for name in names]
    matrices, masks = a_matrices(names, params, adapter, spec, key)
    branches = [branch(*record) for record in projection_parts(names, params, adapter, scalings)]
    whole = params.get("qkv") if names == QKV else None
    _, ys = lora_linears(x, matrices, branches, masks, whole)
    return [
        _add_bias_or_magnitude(y, params[name], adapter[name], scalings[name])
        if name in adapter
        else y
        for name, y in zip(names, ys, strict=True)
    ]


def projection_parts(
    names: tuple[str, ...],
    params: LayerParams,
    adapter: LayerAdapter,
    scalings: dict[str, float],
) -> list[tuple[Linear, AdapterRecord | None, float]]:
    """Of each projection its frozen part, its trained one and the factor of its low-rank term."""
    return [(params[n], adapter.get(n), scalings.get(n, 1.0)) for n in names]


def branch(linear: Linear, lora: AdapterRecord | None, scaling: float) -> Branch:
    weight, bias = linear["weight"], linear.get("bias")
    if lora is None:
        return Branch(weight, bias)
    return Branch(
        weight, None if isinstance(lora, DoRA) else bias, b_with_offset(lora, linear), scaling
    )


def a_matrices(
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
            if "offset" in params[name]:
                matrices.append(params[name]["offset"].a)
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
    x_a, scaling = F.linear(dropped, lora.a), dict(spec.scalings)[name]
    return adapted_linear(x, dropped, x_a, linear, lora, scaling)


def adapted_linear(
    x: Float[Tensor, "*n d_in"],
    dropped: Float[Tensor, "*n d_in"] | None,
    x_a: Float[Tensor, "*n r"],
    linear: Linear,
    lora: AdapterRecord,
    scaling: float,
) -> Float[Tensor, "*n d_out"]:
    """One projection with its low-rank term, in x.dtype."""
    if isinstance(lora, DoRA):
        gain = dora_scale(linear, lora, scaling)
        return dora_linear(x, dropped, x_a, linear, lora, gain, scaling)
    y = lora_linear(
        x, x_a, linear["weight"], linear.get("bias"), b_with_offset(lora, linear), scaling
    )
    return _add_bias_or_magnitude(y, linear, lora, scaling)


def _add_bias_or_magnitude(
    y: Float[Tensor, "*n d_out"], linear: Linear, lora: AdapterRecord, scaling: float
) -> Float[Tensor, "*n d_out"]:
    """An adapted product (of DoRA: without the base's bias) with the adapter's own vectors, which
    enter in their own, wider dtype; in y.dtype."""
    if isinstance(lora, DoRA):
        return _scaled(y, dora_scale(linear, lora, scaling), linear.get("bias"))
    return (y + scaling * lora.bias).to(y.dtype) if isinstance(lora, BiasedLoRA) else y


def dora_scale(linear: Linear, lora: DoRA, scaling: float) -> Float[Tensor, "d_out"]:
    """DoRA's m / n."""
    a, b = a_with_offset(lora, linear), b_with_offset(lora, linear)
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
    x_a: Float[Tensor, "*n r"],
    linear: Linear,
    lora: LoRA | DoRA,
    gain: Float[Tensor, "d_out"],
    scaling: float,
) -> Float[Tensor, "*n d_out"]:
    """`gain` (m / n) times the adapted product; what a dropout mask hides keeps the base's
    length."""
    weight, bias = linear["weight"], linear.get("bias")
    b = b_with_offset(lora, linear)
    if dropped is None:
        return _scaled(lora_linear(x, x_a, weight, None, b, scaling), gain, bias)
    base, masked = _frozen(x, linear, bias, scaling), _frozen(dropped, linear, None, scaling)
    update = scaling * F.linear(x_a, lora.b)
    return (base + (gain - 1) * masked + gain * update).to(x.dtype)


def _frozen(
    x: Float[Tensor, "*n d_in"],
    linear: Linear,
    bias: Float[Tensor, "d_out"] | None,
    scaling: float,
) -> Float[Tensor, "*n d_out"]:
    """The base's product less that of its start factors."""
    y = frozen_linear(x, linear["weight"], bias)
    if "offset" not in linear:
        return y
    return y - scaling * F.linear(F.linear(x, linear["offset"].a), linear["offset"].b)


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
