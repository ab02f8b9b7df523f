"""The MLP half of a decoder layer: RMSNorm and SwiGLU, or a mixture of experts."""

from collections.abc import Sequence
from typing import TypeGuard

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastlora.models.attention import add_residual, layer_norm
from fastlora.models.dora_products import dora_scale
from fastlora.models.experts import expert_mlp
from fastlora.models.init_offset import a_with_offset, b_with_offset, rank_with_offset
from fastlora.models.layer_spec import LayerSpec
from fastlora.models.params import (
    GATE_UP,
    ROUTER,
    AdapterRecord,
    DoRA,
    LayerAdapter,
    LayerParams,
    Linear,
    LoRA,
)
from fastlora.models.projections import a_matrices, adapted_linear, project
from fastlora.ops.gradient_barrier import gradient_barrier
from fastlora.ops.linear.lora_group import Branch, lora_linears
from fastlora.ops.swiglu.swiglu import gate_product, kernel_supports, lora_swiglu


def mlp_block(
    x: Float[Tensor, "b t d"],
    params: LayerParams,
    adapter: LayerAdapter,
    spec: LayerSpec,
    key: Int[Tensor, "..."] | None,
    *,
    wait: bool = True,
) -> Float[Tensor, "b t d"]:
    """x + residual_scale * mlp_output(x, ...)."""
    return add_residual(x, mlp_output(x, params, adapter, spec, key, wait=wait), spec)


def mlp_output(
    x: Float[Tensor, "b t d"],
    params: LayerParams,
    adapter: LayerAdapter,
    spec: LayerSpec,
    key: Int[Tensor, "..."] | None,
    *,
    wait: bool = True,
) -> Float[Tensor, "b t d"]:
    """SwiGLU(norm(x)), Shazeer 2020, arXiv:2002.05202: down(silu(gate) * up); norms at both ends if
    the layer has them. GeGLU if the activation is GELU.

    In a sparse layer: the weighted sum of the SwiGLUs of each token's experts. `wait` is that of
    `expert_mlp`.
    """
    out = _mlp(layer_norm(x, params, spec.norms.mlp_in, spec), params, adapter, spec, key, wait)
    return layer_norm(out, params, spec.norms.mlp_out, spec)


def _mlp(
    normed: Float[Tensor, "b t d"],
    params: LayerParams,
    adapter: LayerAdapter,
    spec: LayerSpec,
    key: Int[Tensor, "..."] | None,
    wait: bool,
) -> Float[Tensor, "b t d"]:
    """The MLP or the mixture of experts, between the norms."""
    if "experts" in params:
        # The gradient of `normed` is a sum over a token's experts. Fused with RMSNorm's gradient it
        # was wrong in one step of some five on an H100 (ops/gradient_barrier.py).
        normed = gradient_barrier(normed)
        (logits,) = project(normed, (ROUTER,), params, adapter, spec, key)
        k, scalings = spec.num_experts_per_tok, dict(spec.scalings)
        experts = params["experts"]
        renormalise = spec.norm_topk_prob
        return expert_mlp(normed, logits, experts, adapter, scalings, k, renormalise, wait=wait)
    if _can_fuse_swiglu(params, adapter, spec, normed.dtype, key):
        return _fused_mlp(normed, params, adapter, spec, key)
    hidden = gated(normed, params, adapter, spec, key)
    return project(hidden, (down_name(params),), params, adapter, spec, key)[0]


def gated(
    normed: Float[Tensor, "b t d"],
    params: LayerParams,
    adapter: LayerAdapter,
    spec: LayerSpec,
    key: Int[Tensor, "..."] | None,
) -> Float[Tensor, "b t f"]:
    """The activation of gate, times up, without the kernel: the input of down_proj."""
    ys = project(normed, gate_up_names(params), params, adapter, spec, key)
    gate, up = ys if len(ys) == 2 else ys[0].chunk(2, -1)
    return gate_product(gate, up, gelu=spec.activation == "gelu_tanh")


def gate_up_names(params: LayerParams) -> tuple[str, ...]:
    """The layer's names of gate and up, or of the one layer that computes both."""
    return tuple(name for name in GATE_UP if name in params)


def down_name(params: LayerParams) -> str:
    """The layer's name of the MLP's last projection."""
    return "output_linear" if "output_linear" in params else "down_proj"


def _can_fuse_swiglu(
    params: LayerParams,
    adapter: LayerAdapter,
    spec: LayerSpec,
    dtype: torch.dtype,
    key: Int[Tensor, "..."] | None,
) -> bool:
    """Whether the SwiGLU kernel supports this layer.

    gate and up must both carry LoRA, or both DoRA without dropout, of small ranks. If they are one
    layer, its rows must be dense, because the kernel reads two tensors.
    """
    if not spec.fused or spec.qat_scheme is not None:
        return False
    # One kernel reads both, so both must be of one class. DoRA under dropout multiplies W with the
    # masked input too, which is not the product that the kernel gets.
    names = gate_up_names(params)
    loras, linears = [adapter.get(name) for name in names], [params[name] for name in names]
    kinds = {type(lora) for lora in loras}
    if len(kinds) > 1 or (DoRA in kinds and key is not None):
        return False
    if len(names) == 1 and not isinstance(linears[0]["weight"], Tensor):
        return False
    pairs = zip(loras, linears, strict=True)
    return all(_kernel_supports(lora, linear, dtype) for lora, linear in pairs)


def _kernel_supports(
    lora: AdapterRecord | None, linear: Linear, dtype: torch.dtype
) -> TypeGuard[LoRA | DoRA]:
    # DoRA scales the product before the base's bias is added. The kernel adds no bias.
    if not (isinstance(lora, LoRA) or (isinstance(lora, DoRA) and "bias" not in linear)):
        return False
    return kernel_supports(dtype, rank_with_offset(lora, linear))


def _gate_up(
    x: Float[Tensor, "b t d"],
    params: LayerParams,
    adapter: LayerAdapter,
    spec: LayerSpec,
    key: Int[Tensor, "..."] | None,
) -> tuple[list[Float[Tensor, "b t _"]], list[Float[Tensor, "b t f"]]]:
    """(x A' of gate and up, their base products). The SwiGLU kernel adds the low-rank terms."""
    names = gate_up_names(params)
    # Branches without B: their low-rank terms are left to the SwiGLU kernel, which reads g and u
    # anyway.
    branches = [Branch(params[name]["weight"], params[name].get("bias")) for name in names]
    if len(branches) == 1:
        branches = _row_halves(branches[0])
    matrices, masks = a_matrices(names, params, adapter, spec, key)
    x_a, ys = lora_linears(x, matrices, branches, masks)
    assert x_a is not None
    if len(names) == 1:  # both halves have one A
        return [x_a, x_a], ys
    return [*x_a.split([rank_with_offset(adapter[name], params[name]) for name in names], -1)], ys


def _row_halves(branch: Branch) -> list[Branch]:
    """The first and the second half of a dense layer's rows."""
    assert isinstance(branch.weight, Tensor), type(branch.weight)
    biases = (None, None) if branch.bias is None else branch.bias.chunk(2)
    return [Branch(*rows) for rows in zip(branch.weight.chunk(2), biases, strict=True)]


def _fused_mlp(
    x: Float[Tensor, "b t d"],
    params: LayerParams,
    adapter: LayerAdapter,
    spec: LayerSpec,
    key: Int[Tensor, "..."] | None,
) -> Float[Tensor, "b t d"]:
    """SwiGLU by its kernel, which also adds gate's and up's low-rank terms; then down_proj."""
    names, scalings = gate_up_names(params), dict(spec.scalings)
    (gate_x_a, up_x_a), (g, u) = _gate_up(x, params, adapter, spec, key)
    bs = [b_with_offset(adapter[name], params[name]) for name in names]
    b_g, b_u = bs if len(bs) == 2 else bs[0].chunk(2)
    s_g, s_u = scalings[names[0]], scalings[names[-1]]
    scales, gelu = _dora_scales(names, params, adapter, scalings), spec.activation == "gelu_tanh"
    name = down_name(params)
    down, linear = adapter.get(name), params[name]
    # The kernel can also compute h A' of down_proj, but not for h under a dropout mask.
    if key is not None or not _kernel_supports(down, linear, x.dtype):
        h, _ = lora_swiglu(g, u, gate_x_a, up_x_a, b_g, b_u, None, scales, s_g, s_u, gelu=gelu)
        return project(h, (name,), params, adapter, spec, key)[0]
    a = a_with_offset(down, linear)
    h, x_a = lora_swiglu(g, u, gate_x_a, up_x_a, b_g, b_u, a, scales, s_g, s_u, gelu=gelu)
    assert x_a is not None
    return adapted_linear(h, None, x_a, linear, down, scalings[name], fused=spec.fused)


def _dora_scales(
    names: Sequence[str], params: LayerParams, adapter: LayerAdapter, scalings: dict[str, float]
) -> Float[Tensor, "2 f"] | None:
    """DoRA's m / n of gate and up in float32; None if they carry LoRA."""
    scales = [
        dora_scale(params[name], lora, scalings[name]).float()
        for name in names
        if isinstance(lora := adapter[name], DoRA)
    ]
    return torch.cat(scales).view(2, -1) if scales else None
