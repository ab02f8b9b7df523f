"""First values of A and B that are drawn at random."""

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
from fastlora.runtime.layer_fetching import resident


def init_adapter(spec: Spec, base: Base, dtype: torch.dtype, random_state: int) -> Adapter:
    """A fresh adapter for every target of `spec.lora`, on the base's device.

        spec.lora.targets (("q_proj" of rank r, ...), ...)
    ->  {"layers": ({"q_proj": LoRA(a=[r, d], b=[q, r]), ...}, ...)}

    Values are drawn in float32 on the CPU, layer by layer. B is zero, so the model starts equal to
    its base, unless `init_lora_weights` is False. A DoRA magnitude, in at least float32, is the
    norm of the row that it scales, so it changes nothing at first. The bounds 1 / sqrt(fan_in) are
    those of kaiming_uniform_ with a = sqrt(5) (peft 0.21.2, layer.py:332).
    """
    assert spec.lora is not None, spec
    config, init = spec.lora, spec.lora.init_lora_weights
    # A seed means these draws in this order: by layer and target, A, then B, then B's bias. Another
    # order would give other weights for the same random_state.
    generator, device = torch.Generator().manual_seed(random_state), base["norm"].device

    def fresh(layer: int | None, target: Target) -> AdapterRecord:
        d_out, d_in = target_shape(spec.config, target.name)
        if target.name in EXPERTS:
            n = spec.config.num_local_experts
            pairs = [_first_pair(init, target.r, d_in, d_out, generator, n) for _ in range(n)]
            return ExpertLoRA(*(torch.stack(m).to(device, dtype) for m in zip(*pairs, strict=True)))
        if target.name == "embed_tokens":
            a, b = _first_embedding_pair(init, target.r, d_in, d_out, generator)
        else:
            a, b = _first_pair(init, target.r, d_in, d_out, generator)
        a, b = a.to(device, dtype), b.to(device, dtype)
        if config.lora_bias:
            bias = _zeros(d_out) if init else _uniform((d_out,), target.r, generator)
            return BiasedLoRA(a, b, bias.to(device, dtype))
        if config.use_dora:
            weight = adapted_matrix(base, layer, target.name)
            # In bfloat16 the norms would be rounded by up to 2**-9, and the model would change.
            magnitude_dtype = torch.promote_types(dtype, torch.float32)
            return DoRA(a, b, row_norms(weight, a, b, target.scaling).to(magnitude_dtype))
        return LoRA(a, b)

    layers = tuple({t.name: fresh(i, t) for t in ts} for i, ts in enumerate(config.targets))
    edge_targets = {t.name: t for t in (spec.extras.embed_tokens, spec.extras.lm_head) if t}
    # A tied head uses the embedding's record, transposed.
    if spec.extras.tied:
        edge_targets.pop("lm_head", None)
    edges: Any = {name: fresh(None, t) for name, t in edge_targets.items()}
    return Adapter(layers=layers, **edges, **first_tensors(spec.config, spec.extras, base, dtype))


def adapted_matrix(base: Base, layer: int | None, name: str) -> torch.Tensor:
    """The matrix [d_out, d_in] that a target adapts, dequantised if need be.

    An embedding is returned transposed: it maps one-hot tokens to hidden states.
    """
    if layer is not None:
        return dense(base["layers"][layer][name]["weight"], base["norm"].dtype)
    if name == "embed_tokens":
        return resident(base["embed_tokens"]).t()
    return resident(base["lm_head"] if "lm_head" in base else base["embed_tokens"])


def _first_embedding_pair(
    init: bool | str, r: int, d_in: int, d_out: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """(A, B) of an embedding: B normal, A zero unless `init` is False (peft 0.21.2, layer.py:352).

    Other values of `init` concern dense inputs and mean True here.
    """
    a = _zeros(r, d_in) if init else _normal(r, d_in, generator)
    return a, _normal(d_out, r, generator)


def _first_pair(
    init: bool | str, r: int, d_in: int, d_out: int, generator: torch.Generator, experts: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """(A, B). In PEFT the B of all experts is one matrix, whose fan-in is r times their number."""
    if init == "orthogonal":
        return _orthogonal_pair(r, d_in, d_out, generator)
    if init == "gaussian":
        a = _normal(r, d_in, generator) / r
    else:
        a = _uniform((r, d_in), d_in, generator)
    # Every value but False gives zeros. Methods such as "pissa" replace A and B afterwards.
    return a, _zeros(d_out, r) if init else _uniform((d_out, r), r * experts, generator)


def _uniform(shape: tuple[int, ...], fan_in: int, generator: torch.Generator) -> torch.Tensor:
    drawn = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")
    return (drawn * 2 - 1) / math.sqrt(fan_in)


def _normal(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    shape = (rows, columns)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def _zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.float32, device="cpu")


def _orthogonal_pair(
    r: int, d_in: int, d_out: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """(A, B) with B A = 0 and neither zero.

    The recipe of peft 0.21.2 (layer.py:603): of a random orthogonal [r, r] matrix, the even rows
    are for A and the odd rows for B. They are multiplied by normal matrices and divided by 10.
    """
    q, _ = torch.linalg.qr(_normal(r, r, generator))
    a = (_normal(d_in, r // 2, generator) @ q[0::2]).T / 10
    b = _normal(d_out, r // 2, generator) @ q[1::2] / 10
    return a.contiguous(), b
