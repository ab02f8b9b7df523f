"""Arguments of fastlora.lora that PEFT does not know: what comes out is PEFT's all the same."""

import pytest
from test_export import SEVEN, export_difference, step_difference

U, T = "llama2", "llama3.2"
ENDS = ["embed_tokens", "lm_head"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]

# Name -> (family, arguments of fastlora.lora).
CASES = {
    f"recompute={recompute}": (U, dict(recompute=recompute))
    for recompute in ("none", "selective", "full", "offload", 0.4)
}
CASES |= {
    f"use_gradient_checkpointing={value}": (U, dict(use_gradient_checkpointing=value))
    for value in (False, True, "unsloth")
}
CASES |= {
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
CASES = {
    name: (family, dict(r=4, target_modules=SEVEN) | settings)
    for name, (family, settings) in CASES.items()
}


@pytest.mark.parametrize("case", CASES)
def test_saved_adapters_have_the_same_logits_in_peft(case, tmp_path):
    family, settings = CASES[case]
    assert export_difference(family, tmp_path, **settings) <= 1e-5


@pytest.mark.parametrize("case", CASES)
def test_a_step_of_training_is_pefts(case, tmp_path):
    family, settings = CASES[case]
    assert step_difference(family, tmp_path, **settings) <= 1e-6
