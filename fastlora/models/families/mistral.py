"""Mistral: one sliding window for all layers, and no biases."""

from fastlora.models.families.family import (
    ALL_ROPE,
    GGUF,
    NO_BIAS,
    ONE_WINDOW,
    Family,
    TokenizerClass,
)

MISTRAL = Family(
    name="mistral",
    models="Mistral",
    defaults=dict(
        num_key_value_heads=8, max_position_embeddings=131072, bos_token_id=1, eos_token_id=2
    ),
    fixed={**ALL_ROPE, **NO_BIAS, **ONE_WINDOW},
    same_layer_types=True,
    tokenizer_class=TokenizerClass("PreTrainedTokenizerFast", ignores_declared=True),
    gguf=GGUF("llama", rope_of_neighbours=True, rope_factors=True),
)
