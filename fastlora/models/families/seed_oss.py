"""Seed-OSS: Llama with biases on q, k and v, and a separate switch for o's.

Its files set attention_dropout and residual_dropout, which transformers applies in training mode.
fastlora has no dropout in the base.
"""

from fastlora.models.families.family import ALL_ROPE, GGUF, NO_WINDOW, QKV_BIASES, Family

SEED_OSS = Family(
    name="seed_oss",
    models="Seed-OSS",
    defaults=dict(
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=524288,
        attention_bias=True,
        attention_out_bias=False,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    ),
    fixed={**NO_WINDOW, **ALL_ROPE},
    o_proj_bias_field="attention_out_bias",
    peft_has_default=False,
    gguf=GGUF("seed_oss", biases=QKV_BIASES),
)
