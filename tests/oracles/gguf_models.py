"""Tiny checkpoints with tokenizers, for files that llama.cpp runs."""

from pathlib import Path
from typing import Any

import fastlora
from fastlora.model import Model
from fastlora.text.tokenizer import Tokenizer
from oracles.checkpoints import make_checkpoint
from oracles.peft_side import with_random_adapter
from oracles.tokenizer_folders import byte_level, write_folder

QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Settings of oracles.checkpoints.FAMILIES that llama.cpp does not compute, replaced by ones that it
# does: windows that the texts fit into, and mixtures that divide by the chosen experts' sum.
_COMPUTED: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 100},
    "ministral": {"sliding_window": 100},
    "cwm": {"sliding_window": 100},
    "phi3": {"sliding_window": 100},
    # llama.cpp's context is at least 256 tokens, and decides between LongRoPE's factors.
    "phi4_mini": {"original_max_position_embeddings": 256, "max_position_embeddings": 512},
    "mixtral": {"sliding_window": 100},
    "qwen2_window": {"sliding_window": 100},
    "qwen3_moe": {"norm_topk_prob": True},
    "olmo3": {
        "rope_parameters": {
            "full_attention": dict(
                rope_type="yarn",
                rope_theta=1e4,
                factor=4.0,
                original_max_position_embeddings=32,
            ),
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }
    },
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3": {"query_pre_attn_scalar": 16},
}

# "mlp.experts" has parameters, not modules.
_MIXTURE = dict(
    target_modules=("q_proj", "k_proj", "v_proj", "o_proj"),
    target_parameters=["mlp.gate.weight", "experts.gate_up_proj", "experts.down_proj"],
)


def tokenizer_of(folder: Path) -> Tokenizer:
    """A byte-level tokenizer with 403 tokens in Qwen2's style."""
    raw = byte_level("<|endoftext|>", "<|im_end|>", plain=("<think>",), words=QWEN2_WORDS)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    tokenizer = Tokenizer.from_folder(write_folder(folder, raw, settings, None))
    assert tokenizer is not None
    return tokenizer


def model_of(family: str, folder: Path, vocab_size: int, **config: Any) -> Model:
    """A model of a family in float32, without an adapter."""
    config = _COMPUTED.get(family, {}) | {"vocab_size": vocab_size} | config
    make_checkpoint(family, folder, config=config)
    return fastlora.load(folder, max_seq_length=128, device="cpu")[0]


def adapted(model: Model, **settings: Any) -> Model:
    """With a random LoRA on everything in the layers."""
    mixture = any(model.spec.config.sparse_layers)
    return with_random_adapter(
        fastlora.lora(model, r=4, **((_MIXTURE if mixture else {}) | settings))
    )
