"""Tiny random checkpoints of every family, written by transformers itself.

The tests load these checkpoints with both libraries. `FAMILIES` maps a name to the arguments of
transformers' config class (plus "model_type"). `make_checkpoint` writes the folder and returns
the model that transformers reads from it.
"""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_SIZES = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=56,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=None,
)


def _family(model_type: str, **changed: Any) -> dict[str, Any]:
    return {"model_type": model_type, **_SIZES, **changed}


def _rope(rope_type: str, theta: float = 10000.0, **rest: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": theta, **rest}}


_LLAMA3 = dict(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)

_QWEN3_MOE: dict[str, Any] = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)

# transformers applies these in training mode; fastlora's base has no dropout.
_NO_DROPOUT = dict(attention_dropout=0.0, residual_dropout=0.0)

# Phi-3's default, 32000, is outside of the vocabulary.
_PHI3 = dict(pad_token_id=0)
# Caps that change most scores and logits of these models.
_GEMMA: dict[str, Any] = dict(attn_logit_softcapping=1.5, final_logit_softcapping=3.0)

# Windows (5) and dynamic's context (16) are short, so that 24 tokens pass both.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama1": _family("llama", num_key_value_heads=4),
    "llama2": _family("llama", rms_norm_eps=1e-5),
    "llama_bias": _family("llama", attention_bias=True, mlp_bias=True),
    "llama_head_dim": _family("llama", head_dim=12),
    "llama3.1": _family("llama", **_rope("llama3", 5e5, **_LLAMA3)),
    "llama3.2": _family(
        "llama", tie_word_embeddings=True, **_rope("llama3", 5e5, **_LLAMA3 | {"factor": 32.0})
    ),
    "linear": _family("llama", **_rope("linear", factor=4.0)),
    "dynamic": _family("llama", max_position_embeddings=16, **_rope("dynamic", factor=3.0)),
    "yarn": _family(
        "llama", **_rope("yarn", factor=4.0, original_max_position_embeddings=32, beta_fast=8.0)
    ),
    "yarn_mscale": _family(
        "llama",
        hidden_size=64,
        **_rope(
            "yarn",
            factor=4.0,
            original_max_position_embeddings=32,
            mscale=1.0,
            mscale_all_dim=0.7,
            truncate=False,
        ),
    ),
    "tinyllama": _family(
        "llama", hidden_size=64, num_attention_heads=8, num_key_value_heads=1, rms_norm_eps=1e-5
    ),
    "smollm2": _family(
        "llama",
        hidden_size=48,
        num_attention_heads=3,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        **_rope("default", 1e5),
    ),
    "mistral": _family("mistral", hidden_size=48, head_dim=16, sliding_window=5),
    "qwen2": _family(
        "qwen2",
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        **_rope("default", 1e6),
    ),
    "qwen2_window": _family(
        "qwen2",
        num_hidden_layers=4,
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=2,
        **_rope("default", 1e6),
    ),
    "qwen3": _family("qwen3", head_dim=16, **_rope("default", 1e6)),
    "qwen3_tied": _family(
        "qwen3", head_dim=16, tie_word_embeddings=True, pad_token_id=0, **_rope("default", 1e6)
    ),
    "smollm3": _family("smollm3", num_hidden_layers=4, **_rope("default", 2e6)),
    "olmo2": _family("olmo2", num_key_value_heads=4, **_rope("default", 5e5)),
    # The window is in the first layer, whose RoPE has another theta than the second layer's.
    "olmo3": _family(
        "olmo3",
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=5,
        rope_parameters={
            "full_attention": dict(
                rope_type="yarn",
                rope_theta=5e5,
                factor=4.0,
                original_max_position_embeddings=32,
                beta_fast=8.0,
            ),
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "gemma2": _family("gemma2", head_dim=16, sliding_window=5, query_pre_attn_scalar=9, **_GEMMA),
    "gemma3": _family(
        "gemma3_text",
        num_hidden_layers=3,
        head_dim=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        sliding_window=5,
        final_logit_softcapping=3.0,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "mixtral": _family("mixtral", sliding_window=5, num_local_experts=4, **_rope("default", 1e6)),
    "qwen3_moe": _family("qwen3_moe", head_dim=16, **_QWEN3_MOE, **_rope("default", 1e6)),
    "qwen3_moe_mixed": _family(
        "qwen3_moe", num_hidden_layers=3, mlp_only_layers=[1], **_QWEN3_MOE, norm_topk_prob=True
    ),
    "ministral": _family(
        "ministral",
        head_dim=8,
        sliding_window=5,
        layer_types=["full_attention", "sliding_attention"],
    ),
    "internlm3": _family("internlm3", attention_bias=True, mlp_bias=True, head_dim=8),
    "seed_oss": _family("seed_oss", head_dim=8, **_NO_DROPOUT),
    "cwm": _family("cwm", head_dim=8, sliding_window=5, **_rope("llama3", 1e6, **_LLAMA3)),
    "ernie4_5": _family("ernie4_5", head_dim=8),
    "helium": _family("helium", head_dim=8),
    "granite": _family(
        "granite",
        attention_bias=True,
        embedding_multiplier=3.3,
        attention_multiplier=0.21,
        residual_multiplier=0.7,
        logits_scaling=1.7,
    ),
    "granite4": _family(
        "granitemoehybrid",
        shared_intermediate_size=56,
        num_local_experts=0,
        position_embedding_type="rope",
        layer_types=["attention"] * 2,
        mamba_n_heads=4,
        embedding_multiplier=3.3,
        attention_multiplier=0.21,
        residual_multiplier=0.7,
        logits_scaling=1.7,
    ),
    "phi3": _family("phi3", sliding_window=5, **_PHI3),
    # Phi-4-mini: six of eight dimensions are rotated, and 24 tokens pass LongRoPE's trained 16.
    "phi4_mini": _family(
        "phi3",
        tie_word_embeddings=True,
        original_max_position_embeddings=16,
        **_rope(
            "longrope",
            partial_rotary_factor=0.75,
            short_factor=[1.0, 1.2, 1.5],
            long_factor=[1.1, 2.5, 7.0],
        ),
        **_PHI3,
    ),
}


def make_checkpoint(
    family: str,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    config: dict[str, Any] | None = None,
    **save_kwargs: Any,
) -> PreTrainedModel:
    """Write a random checkpoint of a family into `folder`; return transformers' model of it.

    Every tensor is random, norms and biases too, so that a test notices a missing one. The largest
    logit is above 1. The state of the global RNG does not change.

    Args:
        family: a key of `FAMILIES`.
        folder: created if it does not exist.
        dtype: of every tensor in the file.
        seed: of the private generator.
        config: transformers config arguments that override the family's.
        **save_kwargs: for `save_pretrained`, as in max_shard_size="20kB".
    """
    kwargs = dict(FAMILIES[family]) | (config or {})
    with torch.random.fork_rng(devices=[]):  # transformers initialises from the global generator
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**kwargs), dtype=torch.float32
        )
    randomise(model, seed)
    model.to(dtype).save_pretrained(folder, **save_kwargs)
    # Read back rather than returned: .to(bfloat16) above rounded the rotary tables as well.
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def respell(folder: Path) -> None:
    """Rewrite config.json as transformers 4 wrote it: rope_theta, rope_scaling, torch_dtype."""
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    rope = raw.pop("rope_parameters")
    if "full_attention" in rope:  # settings by layer type
        rope, sliding = rope["full_attention"], rope["sliding_attention"]
        raw["rope_local_base_freq"] = sliding["rope_theta"]
    raw["rope_theta"] = rope.pop("rope_theta")
    raw["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    raw["torch_dtype"] = raw.pop("dtype")
    path.write_text(json.dumps(raw))


def mapped_from(tensor: torch.Tensor) -> str:
    """The file that a tensor's memory is mapped from, or "" for other memory. Linux only."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *rest = line.split(maxsplit=5)  # range, mode, offset, device, inode, path
        start, end = (int(x, 16) for x in span.split("-"))
        if start <= tensor.data_ptr() < end:
            return "".join(rest[4:])
    return ""


def randomise(model: PreTrainedModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    one = 0 if "gemma" in model.config.model_type else 1  # Gemma's norms multiply with 1 + weight
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        with torch.no_grad():
            p.copy_(one + 0.2 * noise if name.endswith("norm.weight") else 0.25 * noise)
