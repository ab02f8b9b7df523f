"""Models for the checks on a GPU: large enough for the kernels, and random in every adapter leaf.

Errors are relative to the largest entry or the norm of the exact value. bf16 rows hold fastlora's
error against the fp32 result of the same weights, over the error of transformers, PEFT or eager
torch on the same input.
"""

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import fastlora
from fastlora.model import Model

Row = tuple[str, float, float]  # law, value, limit
SIZES = dict(vocab_size=512, hidden_size=256, intermediate_size=704, max_position_embeddings=1024)
FAMILIES = {
    "llama3.2": {},
    "mistral": {"head_dim": 64, "sliding_window": 100},
    "qwen2": {},
    "qwen3": {"head_dim": 64},
    # Windows in three of four layers and in every other one; heads of 64 and 256.
    "olmo3": {"sliding_window": 100},
    "gemma2": {
        "head_dim": 256,
        "sliding_window": 100,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 10.0,
    },
    "gemma3": {"head_dim": 256, "sliding_window": 100},
    # 256 and 96 are multiples of 8: in bf16 these take torch's grouped kernel, in fp32 the loop.
    "mixtral": {"sliding_window": 100, "num_local_experts": 8},
    "qwen3_moe": {
        "head_dim": 64,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 96,
    },
    "helium": {"head_dim": 64},  # of those that differ from Llama in a field only
    # Smaller scores than those of the tiny checkpoint, because heads are larger.
    "granite": {"attention_multiplier": 0.1},
    "phi4_mini": {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0 + 0.1 * i for i in range(24)],
            "long_factor": [1.0 + 0.5 * i for i in range(24)],
        },
        "original_max_position_embeddings": 128,  # prompts of 100 and of 256 tokens take other sets
    },
}
# Three projections, the router and the experts. The experts' ranks are 8 and 4.
MIXTURES: dict[str, dict[str, Any]] = {
    family: {
        "target_modules": ["q_proj", "v_proj", "o_proj"],
        "target_parameters": ["gate.weight", "experts.gate_up_proj", "experts.down_proj"],
        "rank_pattern": {"experts.down_proj": 4},
    }
    for family in ("mixtral", "qwen3_moe")
}


def relative(a: Any, b: Any) -> float:
    """The largest relative difference, by norm, of two trees' leaves."""
    pairs = zip(tree_leaves(a), tree_leaves(b), strict=True)
    return max(together(x, y) for x, y in pairs)


def together(a: Any, b: Any) -> float:
    """Relative difference of two trees as one vector."""
    flat = lambda tree: torch.cat([x.detach().double().flatten() for x in tree_leaves(tree)])
    return float((flat(a) - flat(b)).norm() / flat(b).norm())


def median_token(a: Tensor, b: Tensor) -> float:
    """The relative difference of the median token.

    If two experts have nearly equal router scores, rounding can send a token to another expert, on
    both sides alike. These few tokens would determine the norm.
    """
    a, b = a.detach().double(), b.detach().double()
    wrong = (a - b).norm(dim=-1) / b.norm(dim=-1)
    return float(wrong.median())


def tokens(model: Model, b: int, t: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, model.spec.config.vocab_size, (b, t), generator=generator).cuda()


def adapted(folder: Path, dtype: str, beside: dict[str, Any] | None = None, **how: Any) -> Model:
    """The checkpoint with a random LoRA on every projection: a zero B would prove nothing."""
    model, _ = fastlora.load(str(folder), dtype=dtype, device="cuda")
    settings = {"r": 8, "lora_alpha": 16, "init_lora_weights": False}
    settings |= MIXTURES.get(folder.name, {}) | (beside or {})
    with tempfile.TemporaryDirectory() as originals:
        model = fastlora.lora(model, **settings, temporary_location=originals)
    return model.with_spec(**how)


def families(chosen: Iterable[str] = tuple(FAMILIES)) -> list[Any]:
    """Parameters of a test: families, each marked as the part of its name."""
    return [pytest.param(family, marks=pytest.mark.part(family)) for family in chosen]
