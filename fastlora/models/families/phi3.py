"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: fused projections, LongRoPE, RoPE of a part of each head.

Its files may set resid_pdrop and embd_pdrop, which transformers applies in training mode. fastlora
has no dropout in the base.
"""

from fastlora.models.families.family import (
    ALL_ROPE,
    GGUF,
    NO_BIAS,
    ONE_WINDOW,
    Family,
    TokenizerClass,
)

PHI3 = Family(
    name="phi3",
    models="Phi-3, Phi-3.5, Phi-4, Phi-4-mini",
    defaults=dict(
        max_position_embeddings=4096,
        original_max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        sliding_window=None,
        bos_token_id=1,
        eos_token_id=32000,
        pad_token_id=32000,
    ),
    fixed={**ALL_ROPE, **NO_BIAS, **ONE_WINDOW, "layer_types": None},
    partial_rotary=True,
    rope_type_names=(("su", "longrope"), ("yarn", "longrope")),
    fused_projections=True,
    tokenizer_class=TokenizerClass("PreTrainedTokenizerFast", ignores_declared=True),
    default_targets=("qkv_proj",),
    peft_has_default=False,
    gguf=GGUF("phi3", length_factors=True),
)
