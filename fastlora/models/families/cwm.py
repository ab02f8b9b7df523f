"""CWM: Llama in which one of four layers sees all tokens and three have a sliding window."""

from fastlora.models.families.family import ALL_ROPE, GGUF, Family

CWM = Family(
    name="cwm",
    models="CWM",
    defaults=dict(
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=1e6,
        rope_parameters=dict(
            rope_type="llama3",
            rope_theta=1e6,
            factor=16.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
        sliding_window=8192,
        bos_token_id=128000,
        eos_token_id=[128001, 128008, 128009],
    ),
    fixed={**ALL_ROPE, "attention_bias": False, "use_sliding_window": True, "max_window_layers": 0},
    full_attention_every=4,
    full_attention_first=True,
    peft_has_default=False,
    gguf=GGUF("llama", rope_of_neighbours=True, rope_factors=True),
)
