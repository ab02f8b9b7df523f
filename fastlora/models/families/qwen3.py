"""Qwen3: RMSNorm on q and k, and a head_dim that does not depend on hidden_size."""

from fastlora.models.families.family import ALL_ROPE, GGUF, Family, TokenizerClass

QWEN3 = Family(
    name="qwen3",
    models="Qwen3",
    defaults=dict(num_key_value_heads=32, head_dim=128),
    fixed={**ALL_ROPE, "mlp_bias": False},
    qk_norm=True,
    tokenizer_class=TokenizerClass("Qwen2Tokenizer"),
    gguf=GGUF("qwen3"),
)
