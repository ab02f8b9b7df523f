"""Arguments of fastlora.lora that peft.LoraConfig does not have."""

from oracles.peft_cases import SEVEN

U, T = "llama2", "llama3.2"
ENDS = ["embed_tokens", "lm_head"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]

# Name -> (family, arguments of fastlora.lora).
UNKNOWN_TO_PEFT = {
    f"recompute={recompute}": (U, dict(recompute=recompute))
    for recompute in ("none", "selective", "full", "offload", 0.4)
}

UNKNOWN_TO_PEFT |= {
    f"use_gradient_checkpointing={value}": (U, dict(use_gradient_checkpointing=value))
    for value in (False, True, "unsloth")
}

UNKNOWN_TO_PEFT |= {
    "recompute=full, experts": (
        "qwen3_moe",
        dict(target_modules=["q_proj"], target_parameters=EXPERTS, recompute="full"),
    ),
    "recompute=full, kept tied": (
        T,
        dict(target_modules=[*SEVEN, *ENDS], ensure_weight_tying=True, recompute="full"),
    ),
    "recompute=0.4, norms and biases": (
        "llama_bias",
        dict(modules_to_save=["norm"], bias="all", recompute=0.4),
    ),
    "finetune_last_n_layers=1": (U, dict(finetune_last_n_layers=1)),
    "random_state=1": (U, dict(random_state=1)),
    "max_seq_length=64": (U, dict(max_seq_length=64)),
    "adapter_dtype=float64": (U, dict(adapter_dtype="float64")),
    "temporary_location": (U, dict(modules_to_save=ENDS, temporary_location="not-written-on-cpu")),
}

UNKNOWN_TO_PEFT = {
    name: (family, dict(r=4, target_modules=SEVEN) | settings)
    for name, (family, settings) in UNKNOWN_TO_PEFT.items()
}
