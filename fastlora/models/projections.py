"""The linear layers of a decoder layer with their LoRA, DoRA, biases and fake quantisation."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fastlora.models.examples import example_project
from fastlora.models.fake_quantised import fake_quantised
from fastlora.models.fused_qkv import QKV
from fastlora.models.init_offset import a_with_offset, b_with_offset
from fastlora.models.params import (
    TARGETS,
    AdapterRecord,
    BiasedLoRA,
    DoRA,
    ExampleLoRA,
    LayerAdapter,
    LayerParams,
    Linear,
    LoRA,
    PreparedDoRA,
    StackedLoRA,
)
from fastlora.models.spec import Spec
from fastlora.models.stacks import stacked_project
from fastlora.ops.attention.context_group import ContextGroup
from fastlora.ops.dropout import dropout, fold, from_row, key_and_row
from fastlora.ops.linear.dora import row_norms
from fastlora.ops.linear.frozen import frozen_linear
from fastlora.ops.linear.lora import lora_linear
from fastlora.ops.linear.lora_group import Branch, lora_linears
from fastlora.ops.linear.masked_lora import Masks

# Number folded into a layer's dropout key, so that every projection has its own mask.
_DROPOUT_SALT = {name: salt for salt, name in enumerate(TARGETS)}


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """The settings of one layer. Layers with equal settings share one compiled graph."""

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
    fused: bool  # whether Triton kernels run
    context: ContextGroup | None  # the ranks that have rows together
    replaced: tuple[str, ...]  # tensors that are trained copies: their gradients change the graph


def layer_spec(
    spec: Spec,
    layer: int,
    *,
    fused: bool = False,
    stacked: bool = False,
    context: ContextGroup | None = None,
) -> LayerSpec:
    """The part of `spec` that a layer depends on.

    Args:
        spec: the model's.
        layer: number of the layer.
        fused: whether Triton kernels run.
        stacked: whether the layer runs a stack of adapters, in which B contains the scalings. One
            graph then serves all scalings.
        context: the ranks that have rows together; None: rows are whole.
    """
    config, lora, prefix = spec.config, spec.lora, f"model.layers.{layer}."
    copies = [name for name in spec.extras.replaced if name.startswith(prefix)]
    return LayerSpec(
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.rms_norm_eps,
        rope=bool(config.no_rope_layers[layer]),
        scalings=()
        if lora is None or stacked
        else tuple((t.name, t.scaling) for t in lora.targets[layer]),
        lora_dropout=lora.lora_dropout if lora else 0.0,
        qat_scheme=spec.qat_scheme,
        deterministic=spec.deterministic,
        # 0 in dense layers, which do not depend on it.
        num_experts_per_tok=config.num_experts_per_tok if config.sparse_layers[layer] else 0,
        norm_topk_prob=config.norm_topk_prob,
        fused=fused,
        context=context,
        replaced=tuple(name.removeprefix(prefix) for name in copies),
    )


def project(
    x: Float[Tensor, "b t d_in"],
    names: tuple[str, ...],
    params: LayerParams,
    adapter: LayerAdapter,
    spec: LayerSpec,
    key: Int[Tensor, "..."] | None,
) -> list[Float[Tensor, "b t d_out"]]:
    """The projections `names` of x, each with its low-rank term if the adapter has one.

    Args:
        x: the projections' common input.
        names: keys of TARGETS that the layer has.
        params: of the layer.
        adapter: of the layer.
        spec: of the layer.
        key: of the layer's dropout masks, or of each row's under a stack of adapters; None:
            without dropout.
    """
    if any(isinstance(adapter.get(name), StackedLoRA | ExampleLoRA) for name in names):
        return _project_by_group(x, names, params, adapter, spec, key)
    scalings = dict(spec.scalings)
    # Fake quantisation rounds W + s B A, so the sum of the matrices must be computed. Otherwise we
    # add the products of x with W and with A and B, which costs less.
    if spec.qat_scheme is not None:
        parts = _projection_parts(names, params, adapter, scalings)
        return [fake_quantised(x, *part, spec.qat_scheme) for part in parts]
    if key is not None and any(isinstance(adapter.get(name), DoRA) for name in names):
        return [_with_masked_base(x, name, params, adapter, spec, key) for name in names]
    fused_weight = params.get("qkv") if names == QKV else None
    _, ys = lora_linears(x, *group_arguments(names, params, adapter, spec, key), fused_weight)
    return [
        _add_bias_or_magnitude(y, params[name], adapter[name], scalings[name])
        if name in adapter
        else y
        for name, y in zip(names, ys, strict=True)
    ]


def _project_by_group(
    x: Float[Tensor, "b t d_in"],
    names: tuple[str, ...],
    params: LayerParams,
    adapter: LayerAdapter,
    spec: LayerSpec,
    key: Int[Tensor, "..."] | None,
) -> list[Float[Tensor, "b t d_out"]]:
    """`project` of a stack of adapters, or with a gradient for each example."""
    parts = _projection_parts(names, params, adapter, dict(spec.scalings))
    linears, records, scalings = zip(*parts, strict=True)
    salts, p = [_DROPOUT_SALT[name] for name in names], spec.lora_dropout
    if any(isinstance(record, ExampleLoRA) for record in records):
        return example_project(x, linears, records, scalings, salts, p, key)
    fused_weight = params.get("qkv") if names == QKV else None
    return stacked_project(x, linears, records, salts, p, key, fused_weight)


def group_arguments(
    names: tuple[str, ...],
    params: LayerParams,
    adapter: LayerAdapter,
    spec: LayerSpec,
    key: Int[Tensor, "..."] | None,
) -> tuple[list[Float[Tensor, "_ d_in"]], list[Branch], Masks | None]:
    """(every A, the branches, the dropout masks): arguments of ops/linear/lora_group.py.

    One product multiplies x with every A, so x is read once for all of `names`.
    """
    matrices, masks = a_matrices(names, params, adapter, spec, key)
    parts = _projection_parts(names, params, adapter, dict(spec.scalings))
    return matrices, [_branch(*part) for part in parts], masks


def _projection_parts(
    names: tuple[str, ...],
    params: LayerParams,
    adapter: LayerAdapter,
    scalings: dict[str, float],
) -> list[tuple[Linear, AdapterRecord | None, float]]:
    """For each projection (its frozen layer, its adapter or None, its low-rank term's factor)."""
    return [(params[n], adapter.get(n), scalings.get(n, 1.0)) for n in names]


def _branch(linear: Linear, lora: AdapterRecord | None, scaling: float) -> Branch:
    """One projection as ops/linear/lora_group.py takes it.

    DoRA's bias is left out: it is added after the product is scaled (`_add_bias_or_magnitude`).
    """
    weight, bias = linear["weight"], linear.get("bias")
    if lora is None:
        return Branch(weight, bias)
    return Branch(
        weight,
        None if isinstance(lora, DoRA | PreparedDoRA) else bias,
        b_with_offset(lora, linear),
        scaling,
    )


def a_matrices(
    names: tuple[str, ...],
    params: LayerParams,
    adapter: LayerAdapter,
    spec: LayerSpec,
    key: Int[Tensor, "..."] | None,
) -> tuple[list[Float[Tensor, "_ d_in"]], Masks | None]:
    """(every A, the dropout masks of their inputs).

    Each projection has its own mask. A0 of an initial offset belongs to the base and has none.
    """
    matrices, slots = [], []
    for name in names:
        if name in adapter:
            matrices.append(adapter[name].a)
            slots.append(_DROPOUT_SALT[name])
            if "offset" in params[name]:
                matrices.append(params[name]["offset"].a)
                slots.append(-1)  # no mask
    if key is None or not matrices:
        return matrices, None
    # The keys of all names are the same tensor for all calls in a layer, so a compiled layer
    # computes them once, in one launch.
    layer_key, first_row = key_and_row(key)
    keys = torch.arange(len(_DROPOUT_SALT), device=key.device)
    if key.dim() == 1:  # of pieces of rows: their keys differ by the first row only
        layer_key, keys = layer_key[:1], keys[:, None]
    keys = from_row(fold(layer_key, keys), first_row)
    # The kernels take one first row.
    fused = spec.fused and key.dim() == 0
    return matrices, Masks(keys, tuple(slots), spec.lora_dropout, fused)


def _with_masked_base(
    x: Float[Tensor, "b t d_in"],
    name: str,
    params: LayerParams,
    adapter: LayerAdapter,
    spec: LayerSpec,
    key: Int[Tensor, "..."],
) -> Float[Tensor, "b t d_out"]:
    """A projection that may carry DoRA. Under dropout, DoRA multiplies W with the masked x too."""
    linear, lora = params[name], adapter.get(name)
    if not isinstance(lora, DoRA):
        return project(x, (name,), params, adapter, spec, key)[0]
    layer_key, first_row = key_and_row(key)
    dropped = dropout(x, spec.lora_dropout, fold(layer_key, _DROPOUT_SALT[name]), first_row)
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
    """One projection with its low-rank term, in x.dtype.

    Args:
        x: the projection's input.
        dropped: x under the adapter's dropout mask; None without dropout.
        x_a: (dropped or x) times A', or [A; A0]'.
        linear: the frozen layer.
        lora: its adapter.
        scaling: factor of the low-rank term.
    """
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
    """Apply the adapter's vectors to an adapted product y; the result has y.dtype.

    BiasedLoRA adds its bias. DoRA scales y, which must not contain the base's bias, and then adds
    the latter. Both compute in the dtype of the adapter's vectors.
    """
    if isinstance(lora, DoRA):
        return _scaled(y, dora_scale(linear, lora, scaling), linear.get("bias"))
    if isinstance(lora, PreparedDoRA):
        return _scaled(y, lora.gain, linear.get("bias"))
    return (y + scaling * lora.bias).to(y.dtype) if isinstance(lora, BiasedLoRA) else y


def dora_scale(linear: Linear, lora: DoRA, scaling: float) -> Float[Tensor, "d_out"]:
    """DoRA's m / n: magnitude over the row norms of W + scaling * B A."""
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
    """DoRA: `gain` (m / n) times the adapted product, plus the base's bias.

    Under dropout, y = W x + (gain - 1) W dropped + gain * scaling * B A dropped, as in PEFT.
    """
    weight, bias = linear["weight"], linear.get("bias")
    b = b_with_offset(lora, linear)
    if dropped is None:
        return _scaled(lora_linear(x, x_a, weight, None, b, scaling), gain, bias)
    base, masked = _frozen(x, linear, bias, scaling), _frozen(dropped, linear, None, scaling)
    # x_a is without the offset's A0 here, because `_frozen` subtracts the offset.
    update = scaling * F.linear(x_a, lora.b)
    return (base + (gain - 1) * masked + gain * update).to(x.dtype)


def _frozen(
    x: Float[Tensor, "*n d_in"],
    linear: Linear,
    bias: Float[Tensor, "d_out"] | None,
    scaling: float,
) -> Float[Tensor, "*n d_out"]:
    """The base's product, minus that of its initial offset."""
    y = frozen_linear(x, linear["weight"], bias)
    if "offset" not in linear:
        return y
    return y - scaling * F.linear(F.linear(x, linear["offset"].a), linear["offset"].b)
