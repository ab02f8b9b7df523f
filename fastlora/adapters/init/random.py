"""An adapter's first weights: drawn, or read off the weights of the base."""

import math
from typing import Any

import torch

from fastlora.adapters.extras import first_tensors
from fastlora.models.names import target_shape
from fastlora.models.params import (
    EXPERTS,
    Adapter,
    AdapterRecord,
    Base,
    BiasedLoRA,
    DoRA,
    ExpertLoRA,
    LoRA,
)
from fastlora.models.spec import Spec, Target
from fastlora.ops.linear.dora import row_norms
from fastlora.ops.quant.dequantize import dense


def init_adapter(spec: Spec, base: Base, dtype: torch.dtype, random_state: int) -> Adapter:
    """Fresh weights for every target of `spec.lora`, drawn in float32 on the CPU, layer by layer.

    B is zero, so the model starts equal to its base, unless `init_lora_weights` is False. A DoRA
    magnitude is the norm of what it scales, at least float32, so it changes nothing at first. The
    bounds are kaiming_uniform_'s with a = sqrt(5): 1 / sqrt(fan_in) (peft 0.21.2, layer.py:332).
    """
    assert spec.lora is not None, spec
    config, init = spec.lora, spec.lora.init_lora_weights
    generator, device = torch.Generator().manual_seed(random_state), base["norm"].device

    def fresh(layer: int | None, target: Target) -> AdapterRecord:
        d_out, d_in = target_shape(spec.config, target.name)
        if target.name in EXPERTS:
            n = spec.config.num_local_experts
            pairs = [_first_weights(init, target.r, d_in, d_out, generator, n) for _ in range(n)]
            return ExpertLoRA(*(torch.stack(m).to(device, dtype) for m in zip(*pairs, strict=True)))
        if target.name == "embed_tokens":
            a, b = _first_rows(init, target.r, d_in, d_out, generator)
        else:
            a, b = _first_weights(init, target.r, d_in, d_out, generator)
        a, b = a.to(device, dtype), b.to(device, dtype)
        if config.lora_bias:
            bias = torch.zeros(d_out) if init else _uniform((d_out,), target.r, generator)
            return BiasedLoRA(a, b, bias.to(device, dtype))
        if config.use_dora:
            weight = adapted_matrix(base, layer, target.name)
            wide = torch.promote_types(dtype, torch.float32)
            return DoRA(a, b, row_norms(weight, a, b, target.scaling).to(wide))
        return LoRA(a, b)

    layers = tuple({t.name: fresh(i, t) for t in ts} for i, ts in enumerate(config.targets))
    ends = {t.name: t for t in (spec.extras.embed_tokens, spec.extras.lm_head) if t}
    if spec.extras.tied:
        ends.pop("lm_head", None)
    rest: Any = {name: fresh(None, t) for name, t in ends.items()}
    return Adapter(layers=layers, **rest, **first_tensors(spec.config, spec.extras, base, dtype))


def adapted_matrix(base: Base, layer: int | None, name: str) -> torch.Tensor:
    """What a target adapts, as [d_out, d_in]; an embedding maps one-hot tokens to hidden states."""
    if layer is not None:
        return dense(base["layers"][layer][name]["weight"], base["norm"].dtype)
    if name == "embed_tokens":
        return base["embed_tokens"].t()
    return base["lm_head"] if "lm_head" in base else base["embed_tokens"]


def _first_rows(
    init: bool | str, r: int, d_in: int, d_out: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """(A, B) of an embedding: B normal, A zero unless `init` is False (peft 0.21.2, layer.py:352).

    "pissa", "loftq" and the like are about products with a dense input, and mean True here.
    """
    shape = (r, d_in)
    a = torch.zeros(shape) if init else torch.randn(shape, generator=generator)
    return a, torch.randn(d_out, r, generator=generator)


def _first_weights(
    init: bool | str, r: int, d_in: int, d_out: int, generator: torch.Generator, experts: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """(A, B); PEFT's B of several experts is one matrix, whose fan-in is all their ranks."""
    if init == "orthogonal":
        return orthogonal_pair(r, d_in, d_out, generator)
    if init == "gaussian":
        a = torch.randn(r, d_in, generator=generator) / r
    else:
        a = _uniform((r, d_in), d_in, generator)
    return a, torch.zeros(d_out, r) if init else _uniform((d_out, r), r * experts, generator)


def _uniform(shape: tuple[int, ...], fan_in: int, generator: torch.Generator) -> torch.Tensor:
    return (torch.rand(*shape, generator=generator) * 2 - 1) / math.sqrt(fan_in)


def orthogonal_pair(
    r: int, d_in: int, d_out: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """(A, B) with B A = 0 and neither zero: they span orthogonal halves of the rank's space.

    The recipe of peft 0.21.2 (layer.py:603): rows of one random orthogonal [r, r] matrix, the even
    ones for A, the odd ones for B, times normal matrices, over 10.
    """
    q, _ = torch.linalg.qr(torch.randn(r, r, generator=generator))
    a = (torch.randn(d_in, r // 2, generator=generator) @ q[0::2]).T / 10
    b = torch.randn(d_out, r // 2, generator=generator) @ q[1::2] / 10
    return a.contiguous(), b
