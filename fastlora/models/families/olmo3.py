"""OLMo 3: OLMo 2 with a window in three of four layers, which have their own RoPE settings."""

from fastlora.models.families.family import ALL_ROPE, GGUF, Family, SlidingRope, TokenizerClass

OLMO3 = Family(
    name="olmo3",
    models="OLMo 3",
    defaults=dict(
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        rope_theta=5e5,
        eos_token_id=50279,
        pad_token_id=1,
    ),
    fixed={**ALL_ROPE, "mlp_bias": False, "use_sliding_window": True, "max_window_layers": 0},
    norms="after",
    norm_kind="wide",
    qk_norm=True,
    qk_norm_joint=True,
    full_attention_every=4,
    sliding_rope=SlidingRope(theta=5e5),
    tokenizer_class=TokenizerClass("PreTrainedTokenizerFast", ignores_declared=True),
    peft_has_default=False,
    gguf=GGUF("olmo2", any_head_dim=False, windows=True),
)
