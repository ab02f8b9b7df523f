"""Ministral (8B-2410): Mistral whose layers may have different windows."""

from fastlora.models.families.family import (
    ALL_ROPE,
    GGUF,
    NO_BIAS,
    ONE_WINDOW,
    Family,
    TokenizerClass,
)

MINISTRAL = Family(
    name="ministral",
    models="Ministral 8B (2410)",
    defaults=dict(
        num_key_value_heads=8, max_position_embeddings=131072, bos_token_id=1, eos_token_id=2
    ),
    fixed={**ALL_ROPE, **NO_BIAS, **ONE_WINDOW},
    tokenizer_class=TokenizerClass("PreTrainedTokenizerFast", ignores_declared=True),
    peft_has_default=False,
    gguf=GGUF("llama", rope_of_neighbours=True, rope_factors=True),
)
