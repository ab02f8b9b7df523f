"""Helium: Llama whose RoPE turns neighbours, as that of llama.cpp's architecture "llama" does."""

from fastlora.models.families.family import ALL_ROPE, GGUF, NO_WINDOW, Family

HELIUM = Family(
    name="helium",
    models="Helium",
    defaults=dict(
        num_key_value_heads=20,
        head_dim=128,
        max_position_embeddings=4096,
        rms_norm_eps=1e-8,
        rope_theta=1e5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    ),
    fixed={**NO_WINDOW, **ALL_ROPE},
    o_proj_bias=False,
    rope_of_neighbours=True,
    peft_has_default=False,
    gguf=GGUF("llama", rope_of_neighbours=True, rope_factors=True),
)
