"""Arguments that mean the same to fastlora.lora and to peft.LoraConfig."""

from typing import Any

from oracles.checkpoints import FAMILIES

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# Arguments that mean the same to fastlora.lora and to peft.LoraConfig, over two layers.
ADAPTER_CASES = {
    "two names": dict(r=4, target_modules=["q_proj", "v_proj"]),
    "seven names": dict(r=4, target_modules=SEVEN),
    "all-linear": dict(r=3, lora_alpha=5, target_modules="all-linear"),
    "regex": dict(r=4, target_modules=r".*\.[01]\.(mlp\.down|self_attn\.v)_proj"),
    "exclude a list": dict(r=4, target_modules=SEVEN, exclude_modules=["0.mlp.up_proj", "k_proj"]),
    "exclude a regex": dict(r=4, target_modules=SEVEN, exclude_modules=r".*\.1\.mlp.*"),
    "one layer": dict(r=4, target_modules=SEVEN, layers_to_transform=[1]),
    "layers_pattern": dict(
        r=4, target_modules=["v_proj", "up_proj"], layers_to_transform=0, layers_pattern="layers"
    ),
    "full name and layers": dict(
        r=4, target_modules=["model.layers.0.mlp.up_proj", "v_proj"], layers_to_transform=[1]
    ),
    "dropout": dict(r=4, lora_alpha=8, target_modules=["v_proj", "o_proj"], lora_dropout=0.3),
    "rslora": dict(r=8, lora_alpha=4, target_modules=SEVEN, use_rslora=True),
    "rank_pattern": dict(r=4, target_modules=SEVEN, rank_pattern={r".*\.mlp\.\w+": 2, "q_proj": 6}),
    "alpha_pattern": dict(r=4, target_modules=SEVEN, alpha_pattern={"^model.layers.1.*": 24}),
    "both patterns, rslora": dict(
        r=4,
        target_modules=SEVEN,
        rank_pattern={r"layers\.0\.mlp\.down_proj": 2, "v_proj": 7},
        alpha_pattern={"down_proj": 3, "1.self_attn.o_proj": 6},
        use_rslora=True,
    ),
    "gaussian": dict(r=4, target_modules=["o_proj", "down_proj"], init_lora_weights="gaussian"),
    "lora_bias": dict(r=4, lora_alpha=8, target_modules=SEVEN, lora_bias=True),
    "lora_bias, one layer": dict(
        r=4, target_modules=["v_proj", "down_proj"], lora_bias=True, layers_to_transform=[1]
    ),
    "DoRA": dict(r=4, lora_alpha=8, target_modules=SEVEN, use_dora=True),
    "DoRA, rslora, patterns": dict(
        r=4, target_modules=SEVEN, use_dora=True, use_rslora=True, rank_pattern={"q_proj": 6}
    ),
    "orthogonal": dict(r=4, target_modules=SEVEN, init_lora_weights="orthogonal"),
    "pissa": dict(r=4, lora_alpha=8, target_modules=SEVEN, init_lora_weights="pissa"),
    "pissa, rslora, patterns": dict(
        r=4,
        lora_alpha=8,
        target_modules=SEVEN,
        init_lora_weights="pissa",
        use_rslora=True,
        rank_pattern={"q_proj": 6},
        alpha_pattern={"layers.1.mlp.down_proj": 3},
    ),
    "pissa, DoRA": dict(
        r=4, lora_alpha=8, target_modules=SEVEN, init_lora_weights="pissa", use_dora=True
    ),
    "olora": dict(r=4, lora_alpha=8, target_modules=SEVEN, init_lora_weights="olora"),
    "rank above the width": dict(r=70, target_modules=["v_proj", "down_proj"]),
}

# PEFT cannot read these initialisations. fastlora saves them as plain LoRA, which it can.
FASTLORA_ONLY_INITS = {
    "pissa_niter_4": dict(init_lora_weights="pissa_niter_4"),
    "loftq, 8 bits": dict(
        init_lora_weights="loftq", loftq_config={"loftq_bits": 8, "loftq_iter": 2}
    ),
    "loftq, 4 bits": dict(init_lora_weights="loftq"),
}

FORWARD = "llama2"  # the family of the cases; the others are run with `every_projection`

# Phi-3's: q, k and v are one layer, and so are gate and up.
FOUR = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


def every_projection(family: str) -> dict[str, Any]:
    """The arguments of the test that runs for every family."""
    own = {"phi3": FOUR, "granitemoehybrid": [*SEVEN[:4], "input_linear", "output_linear"]}
    return dict(r=4, target_modules=own.get(FAMILIES[family]["model_type"], SEVEN))


# Name -> (family, arguments that mean the same to fastlora.lora and to peft.LoraConfig).
FUSED_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "fused: all-linear": ("phi3", dict(r=3, lora_alpha=5, target_modules="all-linear")),
    "fused: regex": ("phi4_mini", dict(r=4, target_modules=r".*\.1\..*(qkv|gate_up)_proj")),
    "fused: dropout": ("phi3", dict(r=4, target_modules=FOUR, lora_dropout=0.3)),
    "fused: patterns, rslora": (
        "phi4_mini",
        dict(
            r=4,
            target_modules=FOUR,
            rank_pattern={"qkv_proj": 7},
            alpha_pattern={"1.mlp.gate_up_proj": 3},
            use_rslora=True,
        ),
    ),
    "fused: lora_bias": ("phi3", dict(r=4, target_modules=FOUR, lora_bias=True)),
    "fused: DoRA": ("phi3", dict(r=4, lora_alpha=8, target_modules=FOUR, use_dora=True)),
    "fused: pissa": (
        "phi3",
        dict(r=4, lora_alpha=8, target_modules=FOUR, init_lora_weights="pissa"),
    ),
    "fused: save qkv_proj": (
        "phi3",
        dict(r=4, target_modules=["gate_up_proj"], modules_to_save=["0.self_attn.qkv_proj"]),
    ),
    "fused: parameters": (
        "phi3",
        dict(r=4, target_modules=["o_proj"], target_parameters=["qkv_proj.weight"]),
    ),
}
