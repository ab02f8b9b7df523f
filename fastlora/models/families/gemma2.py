"""Gemma 2: norms around attention and MLP with weight 1 + w, GeGLU, soft caps of scores and logits,
and a window in every other layer (arXiv:2408.00118)."""

from fastlora.models.families.family import ALL_ROPE, GGUF, Family, TokenizerClass

GEMMA2 = Family(
    name="gemma2",
    models="Gemma 2",
    defaults=dict(
        num_key_value_heads=4,
        head_dim=256,
        hidden_activation="gelu_pytorch_tanh",
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
    ),
    fixed={**ALL_ROPE, "mlp_bias": False, "use_sliding_window": True, "max_window_layers": 0},
    norms="around",
    norm_kind="one_plus",
    activation="gelu_tanh",
    activation_field="hidden_activation",
    scaled_embedding=True,
    reads=("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
    refused_if_true=("use_bidirectional_attention",),
    full_attention_every=2,
    tokenizer_class=TokenizerClass("GemmaTokenizer"),
    gguf=GGUF("gemma2", windows=True, head_cap=True, score_cap=True, scaled_by_width=46),
)
