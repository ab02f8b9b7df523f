"""Granite 3, dense: multipliers of the embedding, of residuals, of scores and of logits."""

from fastlora.models.families.family import (
    ALL_BIASES,
    ALL_ROPE,
    GGUF,
    NO_WINDOW,
    Family,
    TokenizerClass,
)

GRANITE = Family(
    name="granite",
    models="Granite 3",
    defaults=dict(max_position_embeddings=2048, bos_token_id=1, eos_token_id=2),
    fixed={**NO_WINDOW, **ALL_ROPE},
    reads=(
        "embedding_multiplier",
        "attention_multiplier",
        "residual_multiplier",
        "logits_scaling",
    ),
    tokenizer_class=TokenizerClass("PreTrainedTokenizerFast", ignores_declared=True),
    peft_has_default=False,
    gguf=GGUF(
        "granite",
        rope_of_neighbours=True,
        rope_factors=True,
        biases=ALL_BIASES,
        multipliers=True,
    ),
)
