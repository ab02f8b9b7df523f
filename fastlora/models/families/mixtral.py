"""Mixtral: Mistral with a mixture of experts in every layer (arXiv:2401.04088)."""

from fastlora.models.families.family import (
    ALL_ROPE,
    ALL_SPARSE,
    GGUF,
    NO_BIAS,
    ONE_WINDOW,
    Experts,
    Family,
    TokenizerClass,
)

MIXTRAL = Family(
    name="mixtral",
    models="Mixtral",
    defaults=dict(
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=1e6,
        sliding_window=None,
        bos_token_id=1,
        eos_token_id=2,
        num_local_experts=8,
        num_experts_per_tok=2,
    ),
    fixed={
        **ALL_ROPE,
        **ALL_SPARSE,
        **NO_BIAS,
        **ONE_WINDOW,
        "layer_types": None,
        "norm_topk_prob": True,
    },
    experts=Experts(
        module="block_sparse_moe",
        matrices=("w1", "w3", "w2"),
        count_fields=("num_experts", "num_local_experts"),
        size_field="intermediate_size",
    ),
    tokenizer_class=TokenizerClass("PreTrainedTokenizerFast", ignores_declared=True),
    default_targets=(),  # PEFT adapts nothing by default
    gguf=GGUF("llama", rope_of_neighbours=True, rope_factors=True),
)
