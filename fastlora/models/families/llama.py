"""Llama 1 to 3, and the many models that use its model_type (TinyLlama, SmolLM2, ...)."""

from fastlora.models.families.family import ALL_BIASES, ALL_ROPE, GGUF, NO_WINDOW, Family

LLAMA = Family(
    name="llama",
    models="Llama 1 to 3.3, SmolLM2, TinyLlama",
    defaults=dict(max_position_embeddings=2048, bos_token_id=1, eos_token_id=2),
    fixed={**NO_WINDOW, **ALL_ROPE},
    gguf=GGUF("llama", rope_of_neighbours=True, rope_factors=True, biases=ALL_BIASES),
)
