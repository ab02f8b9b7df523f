"""SmolLM3: every fourth layer has no RoPE."""

from fastlora.models.families.family import GGUF, Family

SMOLLM3 = Family(
    name="smollm3",
    models="SmolLM3",
    defaults=dict(
        num_key_value_heads=4,
        rope_theta=2e6,
        sliding_window=None,
        tie_word_embeddings=True,
        bos_token_id=128000,
        eos_token_id=128001,
        pad_token_id=128004,
    ),
    fixed=dict(max_window_layers=0),
    window_without_rope=True,
    peft_has_default=False,
    gguf=GGUF("smollm3", rope_of_neighbours=True, no_rope_interval=4),
)
