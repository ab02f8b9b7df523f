"""Gemma 3's text model: Gemma 2 without a cap of scores, with RMSNorm on q and k, and a window with
its own RoPE in five of six layers (arXiv:2503.19786). The sizes above 1B have a vision tower."""

from fastlora.models.families.family import ALL_ROPE, GGUF, Family, SlidingRope, TokenizerClass
from fastlora.models.families.wrapper import Wrapper

GEMMA3_TEXT = Family(
    name="gemma3_text",
    models="Gemma 3, text",
    defaults=dict(
        num_key_value_heads=4,
        head_dim=256,
        hidden_activation="gelu_pytorch_tanh",
        max_position_embeddings=131072,
        rope_theta=1e6,
        tie_word_embeddings=True,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
    ),
    fixed={**ALL_ROPE, "mlp_bias": False, "use_sliding_window": True, "max_window_layers": 0},
    qk_norm=True,
    norms="around",
    norm_kind="one_plus",
    activation="gelu_tanh",
    activation_field="hidden_activation",
    scaled_embedding=True,
    reads=("query_pre_attn_scalar", "final_logit_softcapping", "sliding_window_pattern"),
    refused_if_true=("use_bidirectional_attention",),
    full_attention_every=6,
    sliding_rope=SlidingRope(theta=1e4, field="rope_local_base_freq"),
    tokenizer_class=TokenizerClass("GemmaTokenizer"),
    gguf=GGUF("gemma3", windows=True, sliding_theta=1e4, head_cap=True, scaled_by_width=62),
)

GEMMA3 = Wrapper(
    name="gemma3",
    texts={"gemma3_text": "Gemma3ForCausalLM"},
    defaults={},
    fixed={"final_logit_softcapping": None},  # the model with a vision tower has no such cap
)
