"""OLMo 2: RMSNorm after attention and MLP, and on q and k over all heads (arXiv:2501.00656)."""

from fastlora.models.families.family import ALL_ROPE, GGUF, NO_WINDOW, Family, TokenizerClass

OLMO2 = Family(
    name="olmo2",
    models="OLMo 2",
    defaults=dict(
        max_position_embeddings=2048, rms_norm_eps=1e-5, eos_token_id=50279, pad_token_id=1
    ),
    fixed={**NO_WINDOW, **ALL_ROPE, "mlp_bias": False},
    norms="after",
    norm_kind="wide",
    qk_norm=True,
    qk_norm_joint=True,
    tokenizer_class=TokenizerClass("PreTrainedTokenizerFast", ignores_declared=True),
    peft_has_default=False,
    gguf=GGUF("olmo2", any_head_dim=False),
)
