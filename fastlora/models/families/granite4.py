"""Granite 4, dense: Granite 3 with another MLP.

Its model_type, granitemoehybrid, also has mixtures of experts and Mamba layers, which are refused.
"""

from fastlora.models.families.family import ALL_ROPE, GGUF, QKV_BIASES, Family, TokenizerClass

GRANITE4 = Family(
    name="granitemoehybrid",
    models="Granite 4, dense and without Mamba layers",
    defaults=dict(
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        num_local_experts=8,
        position_embedding_type=None,
        layer_types=["linear_attention"],  # of every layer
    ),
    fixed={
        **ALL_ROPE,
        "mlp_bias": False,
        "intermediate_size": 1024,  # if the file has no shared_intermediate_size
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": 0,
    },
    spellings=(("intermediate_size", "shared_intermediate_size"),),
    reads=(
        "embedding_multiplier",
        "attention_multiplier",
        "residual_multiplier",
        "logits_scaling",
    ),
    only=(("num_local_experts", 0), ("position_embedding_type", "rope")),
    layer_type_names=(("attention", "full_attention"),),
    shared_mlp=True,
    tokenizer_class=TokenizerClass("PreTrainedTokenizerFast", ignores_declared=True),
    peft_has_default=False,
    # Without Mamba layers and experts llama.cpp's converter writes it as Granite 3, too.
    gguf=GGUF(
        "granite",
        rope_of_neighbours=True,
        rope_factors=True,
        biases=(*QKV_BIASES, "o_proj"),
        multipliers=True,
        parts=(("input_linear", ("gate_proj", "up_proj")), ("output_linear", ("down_proj",))),
    ),
)
