"""The settings of a model in a GGUF file, and the reasons why llama.cpp cannot run a model."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastlora.errors import raise_problems
from fastlora.models.config import LlamaConfig
from fastlora.models.families.family import GGUF
from fastlora.models.families.registry import family_of
from fastlora.models.names import linear_names, projection_bias
from fastlora.models.params import LINEARS
from fastlora.models.rope_tables import layer_rope, longrope_length, rope_frequencies

# Values of a key: bool, int (uint32), float (float32), text, or a list of one of these.
Metadata = dict[str, Any]


def architecture(config: LlamaConfig) -> GGUF:
    """llama.cpp's architecture for a model.

    Raises:
        ValueError: llama.cpp cannot run this model; lists every reason.
    """
    found = family_of(config).gguf
    cure = "Use save_pretrained_merged, whose folder transformers and vLLM read."
    problems = architecture_problems(config)
    raise_problems(ValueError, "llama.cpp cannot run this model:", problems, cure)
    assert found is not None
    return found


def architecture_problems(config: LlamaConfig) -> list[str]:
    """Why llama.cpp cannot run a model."""
    found = family_of(config).gguf
    if found is None:
        return [f"llama.cpp has no architecture for model_type {config.model_type!r}"]
    return [
        *_rope_problems(config, found),
        *_layer_problems(config, found),
        *_scale_problems(config, found),
    ]


def model_metadata(config: LlamaConfig) -> Metadata:
    """Key -> value, for all settings but the tokenizer's."""
    gguf, rope = architecture(config), config.rope_parameters
    arch = gguf.arch
    settings: Metadata = {
        "vocab_size": config.vocab_size,
        "context_length": context_length(config),
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": config.rope_dim,
        "rope.freq_base": float(rope.rope_theta),
    }
    settings |= _rope_scaling(config) | _window_settings(config, gguf)
    caps = {
        "attn_logit_softcapping": config.attention_cap,
        "final_logit_softcapping": config.logit_cap,
    }
    settings |= {name: float(cap) for name, cap in caps.items() if cap is not None}
    if gguf.multipliers:
        settings |= {
            "attention.scale": float(config.attention_scale or config.head_dim**-0.5),
            "embedding_scale": float(config.embedding_scale or 1.0),
            "residual_scale": float(config.residual_scale),
            "logit_scale": float(config.logit_divisor),
        }
    if config.num_local_experts:
        settings |= {
            "expert_count": config.num_local_experts,
            "expert_used_count": config.num_experts_per_tok,
            "expert_feed_forward_length": config.moe_intermediate_size,
        }
    return {"general.architecture": arch, **{f"{arch}.{k}": v for k, v in settings.items()}}


def _window_settings(config: LlamaConfig, gguf: GGUF) -> Metadata:
    """The window, and which layers have it."""
    if config.sliding_window is None or not gguf.windows:
        return {}
    return {
        "attention.sliding_window": config.sliding_window,
        "attention.sliding_window_pattern": [x == "sliding_attention" for x in config.layer_types],
        "rope.freq_base_swa": float(layer_rope(config, "sliding_attention").rope_theta),
    }


def rope_factors(config: LlamaConfig) -> dict[str, Tensor]:
    """Name in the file -> divisors of RoPE's frequencies [rope_dim / 2] in float32, for those that
    are written as tensors."""
    rope = config.rope_parameters
    if rope.rope_type == "longrope":
        sets = {"short": rope.short_factor, "long": rope.long_factor}
        new = lambda x: torch.tensor(x, dtype=torch.float32, device="cpu")
        return {f"rope_factors_{name}.weight": new(x) for name, x in sets.items()}
    if not _as_factors(config):
        return {}
    even = torch.arange(0, config.rope_dim, 2, dtype=torch.float64, device="cpu")
    unscaled = 1.0 / rope.rope_theta ** (even / config.rope_dim)
    return {"rope_freqs.weight": (unscaled / _frequencies(config)[0]).to(torch.float32)}


def _as_factors(config: LlamaConfig) -> bool:
    """Whether RoPE's scaling can only be written as one divisor for each frequency.

    llama.cpp's YaRN has beta_fast 32 and beta_slow 1, rounds the bounds of its ramp, and needs a
    factor of at least 1. With any other settings the frequencies are written as divisors.
    """
    rope = config.rope_parameters
    if rope.rope_type != "yarn":
        return rope.rope_type == "llama3"
    usual = replace(rope, beta_fast=32.0, beta_slow=1.0, truncate=True)
    as_usual, _ = _frequencies(replace(config, rope_parameters=usual))
    return rope.factor < 1 or not torch.equal(as_usual, _frequencies(config)[0])


def _rope_scaling(config: LlamaConfig) -> Metadata:
    rope = config.rope_parameters
    if rope.rope_type == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope.factor)}
    if rope.rope_type not in ("yarn", "longrope"):
        return {}
    _, attention_factor = _frequencies(config)
    if rope.rope_type == "longrope":
        return {
            "rope.scaling.attn_factor": attention_factor,
            "rope.scaling.original_context_length": rope.original_max_position_embeddings,
        }
    if _as_factors(config):
        return {"rope.scaling.attn_factor": attention_factor}
    # llama.cpp multiplies this with its own factor.
    own = 1.0 + 0.1 * math.log(rope.factor)
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(rope.factor),
        "rope.scaling.original_context_length": rope.original_max_position_embeddings,
        "rope.scaling.attn_factor": attention_factor / own,
    }


def _frequencies(config: LlamaConfig) -> tuple[Tensor, float]:
    """RoPE's frequencies [rope_dim / 2] in float64, and its factor on cos and sin."""
    length = torch.zeros(1, 1, dtype=torch.int64, device="cpu")
    scaled, factor = rope_frequencies(config, length, torch.float64)
    return scaled.flatten(), factor


def context_length(config: LlamaConfig) -> int:
    """The longest input that llama.cpp computes as the model does."""
    if config.sliding_window is None or architecture(config).windows:
        return config.max_position_embeddings
    # Up to its width, a window changes nothing.
    return min(config.max_position_embeddings, config.sliding_window)


def context_notes(config: LlamaConfig) -> list[str]:
    """Sentences on lengths at which llama.cpp computes another model."""
    length, notes = context_length(config), []
    if (trained := longrope_length(config)) is not None:
        notes.append(
            f"With a context of more than {trained:,} tokens llama.cpp takes LongRoPE's long"
            " factors for texts of every length; the model takes them for longer texts only. Set a"
            f" context of at most {trained:,} if your texts fit."
        )
    if length == config.max_position_embeddings:
        return notes
    return [
        *notes,
        f"llama.cpp has no sliding window for this architecture. The file says that its context is"
        f" {length:,} tokens, the width of the window, and is exact up to there.",
    ]


def _rope_problems(config: LlamaConfig, gguf: GGUF) -> list[str]:
    rope, problems = config.rope_parameters, []
    if rope.rope_type == "dynamic":
        problems.append("rope_type 'dynamic': llama.cpp has no RoPE that depends on the length")
    elif rope.rope_type == "longrope" and not gguf.length_factors:
        problems.append(
            f"rope_type 'longrope': architecture {gguf.arch!r} reads no factors by length"
        )
    elif _as_factors(config) and not gguf.rope_factors:
        problems.append(
            f"rope_type {rope.rope_type!r} with these settings: architecture {gguf.arch!r} reads no"
            " factors of frequencies"
        )
    if gguf.windows and config.sliding_window is not None:
        problems += _sliding_rope_problems(config, gguf)
    interval = gguf.no_rope_interval
    layers = range(config.num_hidden_layers)
    expected = tuple(int(interval is None or (i + 1) % interval != 0) for i in layers)
    if config.no_rope_layers != expected:
        every = "in all layers" if interval is None else f"except in every {interval}th layer"
        problems.append(
            f"no_rope_layers is {list(config.no_rope_layers)!r:.200}: architecture {gguf.arch!r}"
            f" has RoPE {every}"
        )
    return problems


def _sliding_rope_problems(config: LlamaConfig, gguf: GGUF) -> list[str]:
    sliding = layer_rope(config, "sliding_attention")
    theta = gguf.sliding_theta or config.rope_parameters.rope_theta
    if sliding.rope_type == "default" and sliding.rope_theta == theta:
        return []
    return [
        f"RoPE of sliding layers is {sliding.rope_type!r} with theta {sliding.rope_theta:g}:"
        f" architecture {gguf.arch!r} has 'default' with theta {theta:g} there"
    ]


def _scale_problems(config: LlamaConfig, gguf: GGUF) -> list[str]:
    """Caps and scales of attention and logits."""
    problems = []
    for name, cap, has in (
        ("attn_logit_softcapping", config.attention_cap, gguf.score_cap),
        ("final_logit_softcapping", config.logit_cap, gguf.head_cap),
    ):
        if cap is not None and not has:
            problems.append(f"{name} is {cap:g}: architecture {gguf.arch!r} has no such cap")
        if cap is None and gguf.score_cap:
            problems.append(f"{name} is null: architecture {gguf.arch!r} always has this cap")
    if config.attention_scale is None or gguf.multipliers:
        return problems
    by_width = config.num_hidden_layers == gguf.scaled_by_width
    expected = config.hidden_size // config.num_attention_heads if by_width else config.head_dim
    if not math.isclose(config.attention_scale, expected**-0.5, rel_tol=1e-6):
        problems.append(
            f"query_pre_attn_scalar is {config.attention_scale**-2:g}: architecture {gguf.arch!r}"
            f" computes with {expected}"
        )
    return problems


def _layer_problems(config: LlamaConfig, gguf: GGUF) -> list[str]:
    biased = [
        n for n in linear_names(config) if projection_bias(config, n) and n not in gguf.biases
    ]
    # A mixture's layers have no MLP, so no bias there.
    if all(config.sparse_layers):
        biased = [n for n in biased if LINEARS[n] != "mlp"]
    problems = [f"bias of {n}: architecture {gguf.arch!r} adds none" for n in biased]
    q = config.num_attention_heads * config.head_dim
    if not gguf.any_head_dim and q != config.hidden_size:
        problems.append(
            f"head_dim is {config.head_dim}: architecture {gguf.arch!r} needs hidden_size / heads,"
            f" {config.hidden_size / config.num_attention_heads:g}"
        )
    if family_of(config).experts is None:
        return problems
    if dense := [i for i, sparse in enumerate(config.sparse_layers) if not sparse]:
        problems.append(
            f"layers without experts ({dense!r:.100}): architecture {gguf.arch!r} has experts"
            " in all layers"
        )
    if any(config.sparse_layers) and not config.norm_topk_prob:
        problems.append("norm_topk_prob is false: llama.cpp always divides by the chosen's sum")
    return problems
