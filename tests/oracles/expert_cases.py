"""Arguments that adapt experts and routers, each with its family."""

from oracles.peft_cases import SEVEN

BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
NONE: list[str] = []

# (family, arguments that mean the same to fastlora.lora and to peft.LoraConfig).
EXPERT_CASES = {
    "both": ("qwen3_moe", dict(r=4, target_modules=NONE, target_parameters=BOTH)),
    "both, Mixtral": ("mixtral", dict(r=4, target_modules=NONE, target_parameters=BOTH)),
    "gate_up_proj": ("qwen3_moe", dict(r=4, target_modules=NONE, target_parameters=BOTH[:1])),
    "down_proj": ("mixtral", dict(r=3, target_modules=NONE, target_parameters=["down_proj"])),
    "router": (
        "qwen3_moe",
        dict(r=2, lora_alpha=16, target_modules=NONE, target_parameters=["mlp.gate.weight"]),
    ),
    "experts, router and attention": (
        "qwen3_moe_mixed",
        dict(r=4, target_modules=["q_proj", "v_proj"], target_parameters=[*BOTH, "gate.weight"]),
    ),
    "rank_pattern": (
        "mixtral",
        dict(
            r=4,
            target_modules=["o_proj"],
            target_parameters=BOTH,
            rank_pattern={"experts.gate_up_proj": 6, "o_proj": 2},
        ),
    ),
    "alpha_pattern, rslora": (
        "qwen3_moe",
        dict(
            r=4,
            target_modules=NONE,
            target_parameters=[*BOTH, "gate.weight"],
            alpha_pattern={r".*\.1\.mlp.experts.down_proj": 24, "gate.weight": 3},
            use_rslora=True,
        ),
    ),
    "one layer's, in full": (
        "qwen3_moe",
        dict(
            r=4,
            target_modules=NONE,
            target_parameters=["model.layers.1.mlp.experts.down_proj", "experts.gate_up_proj"],
        ),
    ),
    "a projection's weight": (
        "qwen3_moe",
        dict(r=4, target_modules=["k_proj"], target_parameters=["o_proj.weight"]),
    ),
    "a dense layer of a mixture": (
        "qwen3_moe_mixed",
        dict(r=4, target_modules=NONE, target_parameters=["mlp.up_proj.weight", "down_proj"]),
    ),
    "seven names": ("qwen3_moe_mixed", dict(r=3, lora_alpha=5, target_modules=SEVEN)),
    "seven names, Mixtral": ("mixtral", dict(r=4, target_modules=SEVEN)),
    "w1, w2, w3": ("mixtral", dict(r=4, target_modules=["w1", "w2", "w3", "q_proj"])),
    "gate": ("mixtral", dict(r=4, lora_alpha=16, target_modules=["gate", "v_proj"])),
    "all-linear": ("qwen3_moe_mixed", dict(r=3, target_modules="all-linear")),
    "all-linear, Mixtral": ("mixtral", dict(r=3, target_modules="all-linear")),
    "a regex": ("qwen3_moe", dict(r=4, target_modules=r".*\.1\..*(gate_proj|up_proj|o_proj)")),
    "gaussian": (
        "mixtral",
        dict(r=4, target_modules=NONE, target_parameters=BOTH, init_lora_weights="gaussian"),
    ),
}
