"""ERNIE 4.5, the dense models: one switch for all biases, and RoPE that turns neighbours."""

from fastlora.models.families.family import (
    ALL_ROPE,
    GGUF,
    NO_BIAS,
    NO_WINDOW,
    Family,
    TokenizerClass,
)

ERNIE4_5 = Family(
    name="ernie4_5",
    models="ERNIE 4.5, dense",
    defaults=dict(
        num_key_value_heads=2,
        head_dim=128,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=5e5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    ),
    fixed={**NO_WINDOW, **ALL_ROPE, **NO_BIAS},
    spellings=(("attention_bias", "use_bias"), ("mlp_bias", "use_bias")),
    one_bias=True,
    rope_of_neighbours=True,
    tokenizer_class=TokenizerClass("PreTrainedTokenizerFast", ignores_declared=True),
    peft_has_default=False,
    gguf=GGUF("ernie4_5", rope_of_neighbours=True),
)
