"""Qwen3-MoE: Qwen3 with a mixture of experts in some or all layers."""

from fastlora.models.families.family import (
    ALL_ROPE,
    ALL_SPARSE,
    GGUF,
    Experts,
    Family,
    TokenizerClass,
)

QWEN3_MOE = Family(
    name="qwen3_moe",
    models="Qwen3-MoE",
    defaults=dict(
        num_key_value_heads=4,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=False,
        moe_intermediate_size=768,
        **ALL_SPARSE,
    ),
    # Its sliding window, if it has one, belongs to all layers.
    fixed={**ALL_ROPE, "mlp_bias": False, "max_window_layers": 0, "layer_types": None},
    qk_norm=True,
    experts=Experts(
        module="mlp",
        matrices=("gate_proj", "up_proj", "down_proj"),
        count_fields=("num_local_experts", "num_experts"),
        size_field="moe_intermediate_size",
    ),
    tokenizer_class=TokenizerClass("Qwen2Tokenizer"),
    default_targets=(),  # PEFT adapts nothing by default
    gguf=GGUF("qwen3moe"),
)
