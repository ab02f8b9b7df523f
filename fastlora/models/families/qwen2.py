"""Qwen2 and Qwen2.5: biases on q, k and v, and a sliding window from some layer on."""

from fastlora.models.families.family import ALL_ROPE, GGUF, QKV_BIASES, Family, TokenizerClass

QWEN2 = Family(
    name="qwen2",
    models="Qwen2, Qwen2.5",
    defaults=dict(num_key_value_heads=32),
    fixed={**ALL_ROPE, "attention_bias": True, "mlp_bias": False},
    o_proj_bias=False,
    tokenizer_class=TokenizerClass("Qwen2Tokenizer", ignores_declared=True),
    gguf=GGUF("qwen2", any_head_dim=False, biases=QKV_BIASES),
)
