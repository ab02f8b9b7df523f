"""families."""

from typing import Any

# ── the families ──────────────────────────────────────────────────────────────────────────
# Defaults are those of transformers 5.23's configuration classes (tests/test_config.py compares).
DEFAULTS: dict[str, Any] = dict(
    num_key_value_heads=None,  # null: as many as query heads
    head_dim=None,  # null: hidden_size / num_attention_heads
    hidden_act="silu",
    max_position_embeddings=32768,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    tie_word_embeddings=False,
    attention_bias=False,
    mlp_bias=False,
    use_sliding_window=False,
    sliding_window=4096,
    max_window_layers=28,
    layer_types=None,
    no_rope_layers=None,
    no_rope_layer_interval=4,
)

_NO_WINDOW = dict(use_sliding_window=False, sliding_window=None, layer_types=None)

_ALL_ROPE = dict(no_rope_layers=None, no_rope_layer_interval=None)

_ALL_SPARSE: dict[str, Any] = dict(mlp_only_layers=None, decoder_sparse_step=1)


# model_type -> (what an absent field means, what holds whatever the file says).
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": (
        dict(max_position_embeddings=2048, bos_token_id=1, eos_token_id=2),
        _NO_WINDOW | _ALL_ROPE | dict(max_window_layers=0),
    ),
    "mistral": (
        dict(num_key_value_heads=8, max_position_embeddings=131072, bos_token_id=1, eos_token_id=2),
        # One window for all layers.
        _ALL_ROPE
        | dict(attention_bias=False, mlp_bias=False, use_sliding_window=True, max_window_layers=0),
    ),
    "qwen2": (
        dict(num_key_value_heads=32),
        _ALL_ROPE | dict(attention_bias=True, mlp_bias=False),
    ),
    "qwen3": (dict(num_key_value_heads=32, head_dim=128), _ALL_ROPE | dict(mlp_bias=False)),
    # Both have one window for all layers, or none.
    "mixtral": (
        dict(
            num_key_value_heads=8,
            max_position_embeddings=131072,
            rms_norm_eps=1e-5,
            rope_theta=1e6,
            sliding_window=None,
            bos_token_id=1,
            eos_token_id=2,
            num_local_experts=8,
            num_experts_per_tok=2,
        ),
        _ALL_ROPE
        | _ALL_SPARSE
        | dict(attention_bias=False, mlp_bias=False, use_sliding_window=True, max_window_layers=0)
        | dict(layer_types=None, norm_topk_prob=True),
    ),
    "qwen3_moe": (
        dict(
            num_key_value_heads=4,
            num_experts=128,
            num_experts_per_tok=8,
            norm_topk_prob=False,
            moe_intermediate_size=768,
            **_ALL_SPARSE,
        ),
        _ALL_ROPE | dict(mlp_bias=False, max_window_layers=0, layer_types=None),
    ),
    "smollm3": (
        dict(
            num_key_value_heads=4,
            rope_theta=2e6,
            sliding_window=None,
            tie_word_embeddings=True,
            bos_token_id=128000,
            eos_token_id=128001,
            pad_token_id=128004,
        ),
        dict(max_window_layers=0),
    ),
}
