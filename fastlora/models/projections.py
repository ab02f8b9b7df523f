"""The linear layers of a decoder layer with their LoRA, DoRA, biases and fake quantisation."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fastlora.models.dora_products import dora_linear, dora_scale, scaled_rows
from fastlora.models.examples import example_project
from fastlora.models.fake_quantised import fake_quantised
from fastlora.models.fused_qkv import QKV
from fastlora.models.init_offset import b_with_offset
from fastlora.models.layer_spec import LayerSpec
from fastlora.models.params import (
    TARGETS,
    AdapterRecord,
    BiasedLoRA,
    DoRA,
    ExampleLoRA,
    LayerAdapter,
    LayerParams,
    Linear,
    PreparedDoRA,
    StackedLoRA,
)
from fastlora.models.stacks import stacked_project
from fastlora.ops.dropout import dropout, fold, from_row, key_and_row
from fastlora.ops.linear.lora import lora_linear
from fastlora.ops.linear.lora_group import Branch, lora_linears
from fastlora.ops.linear.masked_lora import Masks

# Number folded into a layer's dropout key, so that every projection has its own mask.
_DROPOUT_SALT = {name: salt for salt, name in enumerate(TARGETS)}


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
    arguments = group_arguments(names, params, adapter, spec, key)
    _, ys = lora_linears(x, *arguments, fused_weight, fused=spec.fused)
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
    return adapted_linear(x, dropped, x_a, linear, lora, scaling, fused=spec.fused)


def adapted_linear(
    x: Float[Tensor, "*n d_in"],
    dropped: Float[Tensor, "*n d_in"] | None,
    x_a: Float[Tensor, "*n r"],
    linear: Linear,
    lora: AdapterRecord,
    scaling: float,
    *,
    fused: bool = False,
) -> Float[Tensor, "*n d_out"]:
    """One projection with its low-rank term, in x.dtype.

    Args:
        x: the projection's input.
        dropped: x under the adapter's dropout mask; None without dropout.
        x_a: (dropped or x) times A', or [A; A0]'.
        linear: the frozen layer.
        lora: its adapter.
        scaling: factor of the low-rank term.
        fused: whether Triton kernels may run.
    """
    if isinstance(lora, DoRA):
        gain = dora_scale(linear, lora, scaling)
        return dora_linear(x, dropped, x_a, linear, lora, gain, scaling)
    weight, bias, b = linear["weight"], linear.get("bias"), b_with_offset(lora, linear)
    y = lora_linear(x, x_a, weight, bias, b, scaling, fused=fused)
    return _add_bias_or_magnitude(y, linear, lora, scaling)


def _add_bias_or_magnitude(
    y: Float[Tensor, "*n d_out"], linear: Linear, lora: AdapterRecord, scaling: float
) -> Float[Tensor, "*n d_out"]:
    """Apply the adapter's vectors to an adapted product y; the result has y.dtype.

    BiasedLoRA adds its bias. DoRA scales y, which must not contain the base's bias, and then adds
    the latter. Both compute in the dtype of the adapter's vectors.
    """
    if isinstance(lora, DoRA):
        return scaled_rows(y, dora_scale(linear, lora, scaling), linear.get("bias"))
    if isinstance(lora, PreparedDoRA):
        return scaled_rows(y, lora.gain, linear.get("bias"))
    return (y + scaling * lora.bias).to(y.dtype) if isinstance(lora, BiasedLoRA) else y
