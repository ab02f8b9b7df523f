"""Write random weights in the shape of a real model, as a sharded Hugging Face folder.

python scripts/bench/random_checkpoint.py 1b FOLDER          # or 3b, 8b, gemma2-2b, ...
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import torch

from fastlora.checkpoints.hub import DEMO
from fastlora.checkpoints.tensors import INDEX, write_json, write_safetensors
from fastlora.models.config_json import config_from_json
from fastlora.models.names import base_tensors
from fastlora.text.tokenizer import Tokenizer

_COMMON = dict(
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    vocab_size=128256,
    num_key_value_heads=8,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    hidden_act="silu",
    bos_token_id=0,
    eos_token_id=1,
    torch_dtype="bfloat16",
)


def _shape(d: int, f: int, layers: int, heads: int, hd: int, tied: bool, factor: float):
    rope = dict(
        rope_type="llama3",
        factor=factor,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )
    return _COMMON | dict(
        hidden_size=d,
        intermediate_size=f,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        head_dim=hd,
        tie_word_embeddings=tied,
        rope_scaling=rope,
    )


# Qwen3-30B-A3B: 61 GB with all layers, 11 GB with `bench.py --layers 8`. Mixtral 8x7B: 93 GB.
_QWEN3_MOE = _COMMON | dict(
    architectures=["Qwen3MoeForCausalLM"],
    model_type="qwen3_moe",
    vocab_size=151936,
    hidden_size=2048,
    intermediate_size=6144,
    num_hidden_layers=48,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=128,
    max_position_embeddings=40960,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    tie_word_embeddings=False,
    num_experts=128,
    num_experts_per_tok=8,
    moe_intermediate_size=768,
    norm_topk_prob=True,
    decoder_sparse_step=1,
    mlp_only_layers=[],
)
_MIXTRAL = _COMMON | dict(
    architectures=["MixtralForCausalLM"],
    model_type="mixtral",
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    max_position_embeddings=32768,
    rope_theta=1e6,
    tie_word_embeddings=False,
    sliding_window=None,
    num_local_experts=8,
    num_experts_per_tok=2,
)

# google/gemma-2-2b, google/gemma-3-1b-it and allenai/Olmo-3-7B.
_GEMMA = dict(
    model_type="gemma2",
    architectures=["Gemma2ForCausalLM"],
    vocab_size=256000,
    hidden_size=2304,
    intermediate_size=9216,
    num_hidden_layers=26,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=256,
    max_position_embeddings=8192,
    sliding_window=4096,
    query_pre_attn_scalar=256,
    bos_token_id=0,
    eos_token_id=1,
    torch_dtype="bfloat16",
)
_GEMMA3 = _GEMMA | dict(
    model_type="gemma3_text",
    architectures=["Gemma3ForCausalLM"],
    vocab_size=262144,
    hidden_size=1152,
    intermediate_size=6912,
    num_attention_heads=4,
    num_key_value_heads=1,
    max_position_embeddings=32768,
    sliding_window=512,
)
_OLMO3 = _COMMON | dict(
    model_type="olmo3",
    architectures=["Olmo3ForCausalLM"],
    vocab_size=100278,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    max_position_embeddings=8192,
    sliding_window=4096,
    rms_norm_eps=1e-6,
)

# A Llama with the sizes of Gemma 3 1B, which is narrower than any Llama.
_NARROW = _GEMMA3 | dict(
    model_type="llama",
    architectures=["LlamaForCausalLM"],
    sliding_window=None,
    query_pre_attn_scalar=None,
    tie_word_embeddings=True,
)

# Llama 3.2 1B, Llama 3.2 3B, Llama 3.1 8B, two mixtures of experts, and the models above.
SHAPES: dict[str, dict[str, Any]] = {
    "1b": _shape(2048, 8192, 16, 32, 64, True, 32.0),
    "3b": _shape(3072, 8192, 28, 24, 128, True, 32.0),
    "8b": _shape(4096, 14336, 32, 32, 128, False, 8.0),
    "30b-a3b": _QWEN3_MOE,
    "8x7b": _MIXTRAL,
    "gemma2-2b": _GEMMA,
    "gemma3-1b": _GEMMA3,
    "gemma3-1b-llama": _NARROW,
    "olmo3-7b": _OLMO3,
}


def write_checkpoint(raw: dict[str, Any], folder: Path) -> None:
    """Write bf16 matrices from N(0, 0.02²) and norms that multiply with 1, one shard per layer.

    Only one layer is in memory at a time. If the vocabulary is large enough for the ids of the
    demo's tokenizer, the folder gets that tokenizer, which Unsloth needs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    config = config_from_json(raw)
    shapes, norm = base_tensors(config), 0.0 if config.norm_kind == "one_plus" else 1.0
    layer = lambda name: (re.search(r"layers\.\d+", name) or ["rest"])[0]
    weight_map = {name: f"model-{layer(name)}.safetensors" for name in shapes}

    def tensor(size: tuple[int, ...]) -> torch.Tensor:
        if len(size) == 1:
            return torch.full(size, norm, dtype=torch.bfloat16)
        new = torch.empty(size, dtype=torch.bfloat16, device=device)
        return new.normal_(0.0, 0.02, generator=generator).cpu()

    for file in sorted(set(weight_map.values())):
        mine = {n: tensor(size) for n, size in shapes.items() if weight_map[n] == file}
        write_safetensors(folder / file, mine)
    write_json(folder / INDEX, {"metadata": {}, "weight_map": weight_map})
    (folder / "config.json").write_text(json.dumps(raw, indent=2))
    tokenizer = Tokenizer.from_folder(DEMO)
    assert tokenizer is not None
    if len(tokenizer) <= config.vocab_size:
        tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    write_checkpoint(SHAPES[args.shape], args.folder)


if __name__ == "__main__":
    main()
