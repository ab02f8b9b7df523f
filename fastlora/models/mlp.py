"""mlp."""

from typing import TypeGuard

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fastlora.models.experts import expert_mlp
from fastlora.models.init_offset import a_with_offset, b_with_offset, rank_with_offset
from fastlora.models.params import (
    ROUTER,
    AdapterRecord,
    DoRA,
    LayerAdapter,
    LayerParams,
    Linear,
    LoRA,
)
from fastlora.models.projections import LayerSpec, a_matrices, adapted_linear, dora_scale, project
from fastlora.ops.gradient_barrier import gradient_barrier
from fastlora.ops.linear.lora_group import Branch, lora_linears
from fastlora.ops.rms_norm import rms_norm
from fastlora.ops.swiglu.swiglu import kernel_supports, lora_swiglu


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
    if _can_fuse_swiglu(params, adapter, spec, x.dtype, key):
        return x + _fused_mlp(normed, params, adapter, spec, key)
    gate, up = project(normed, ("gate_proj", "up_proj"), params, adapter, spec, key)
    return x + project(F.silu(gate) * up, ("down_proj",), params, adapter, spec, key)[0]


def _can_fuse_swiglu(
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
    return kernel_supports(dtype, rank_with_offset(lora, linear))


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
    matrices, masks = a_matrices(names, params, adapter, spec, key)
    x_a, ys = lora_linears(x, matrices, branches, masks)
    assert x_a is not None
    return [*x_a.split([rank_with_offset(adapter[name], params[name]) for name in names], -1)], ys


def _fused_mlp(
    x: Float[Tensor, "b t d"],
    params: LayerParams,
    adapter: LayerAdapter,
    spec: LayerSpec,
    key: Int[Tensor, ""] | None,
) -> Float[Tensor, "b t d"]:
    """SwiGLU with the low-rank terms of gate and up inside its kernel, then the down projection."""
    names, scalings = ["gate_proj", "up_proj"], dict(spec.scalings)
    (gate_x_a, up_x_a), (g, u) = _gate_up(x, params, adapter, spec, key)
    b_g, b_u = (b_with_offset(adapter[name], params[name]) for name in names)
    s_g, s_u = (scalings[name] for name in names)
    gains = _dora_scales(names, params, adapter, scalings)
    own, linear = adapter.get("down_proj"), params["down_proj"]
    # With dropout it has an input of its own, h under a mask.
    if key is not None or not _is_small(own, linear, x.dtype):
        h, _ = lora_swiglu(g, u, gate_x_a, up_x_a, b_g, b_u, None, gains, s_g, s_u)
        return project(h, ("down_proj",), params, adapter, spec, key)[0]
    a = a_with_offset(own, linear)
    h, x_a = lora_swiglu(g, u, gate_x_a, up_x_a, b_g, b_u, a, gains, s_g, s_u)
    assert x_a is not None
    return adapted_linear(h, None, x_a, linear, own, scalings["down_proj"])


def _dora_scales(
    names: list[str], params: LayerParams, adapter: LayerAdapter, scalings: dict[str, float]
) -> Float[Tensor, "2 f"] | None:
    """DoRA's m / n of two projections in float32; None where they carry plain LoRA."""
    gains = [
        dora_scale(params[name], lora, scalings[name]).float()
        for name in names
        if isinstance(lora := adapter[name], DoRA)
    ]
    return torch.stack(gains) if gains else None
