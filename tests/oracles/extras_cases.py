"""Arguments that train more than projections: biases, copies of modules, single rows."""

T, U, B = "llama3.2", "llama2", "llama_bias"  # tied, untied, with biases
Q = ["q_proj", "v_proj", "down_proj"]
ENDS = ["embed_tokens", "lm_head"]

# Name -> (family, arguments that mean the same to fastlora.lora and to peft.LoraConfig).
EXTRAS_CASES = {
    "bias=all": (B, dict(target_modules=Q, bias="all")),
    "bias=all, one layer adapted": (B, dict(target_modules=Q, bias="all", layers_to_transform=[1])),
    "bias=lora_only": (B, dict(target_modules=Q, bias="lora_only")),
    "bias=all, lora_bias": (B, dict(target_modules=Q, bias="all", lora_bias=True)),
    "bias=all, DoRA": (B, dict(target_modules=Q, bias="all", use_dora=True)),
    "bias=lora_only, Qwen2": ("qwen2", dict(target_modules=Q, bias="lora_only")),
    "bias=all, a bias saved whole": (
        B,
        dict(target_modules=Q, bias="all", modules_to_save=["0.self_attn.k_proj"]),
    ),
    "save norm (every norm)": (U, dict(target_modules=Q, modules_to_save=["norm"])),
    "save norm, Qwen3": ("qwen3", dict(target_modules=Q, modules_to_save=["norm"])),
    "save model.norm": (U, dict(target_modules=Q, modules_to_save=["model.norm"])),
    "save one layer's norm": (U, dict(target_modules=Q, modules_to_save=["1.input_layernorm"])),
    "save a projection": (U, dict(target_modules=Q, modules_to_save=["v_proj"])),
    "save both ends and norms": (U, dict(target_modules=Q, modules_to_save=[*ENDS, "norm"])),
    "save embed_tokens": (U, dict(target_modules=Q, modules_to_save=["embed_tokens"])),
    "save lm_head": (U, dict(target_modules=Q, modules_to_save=["lm_head"])),
    "tied, save lm_head": (T, dict(target_modules=Q, modules_to_save=["lm_head"])),
    "tied, save embed_tokens": (T, dict(target_modules=Q, modules_to_save=["embed_tokens"])),
    "tied, save both": (T, dict(target_modules=Q, modules_to_save=ENDS)),
    "kept tied, save lm_head": (
        T,
        dict(target_modules=Q, modules_to_save=["lm_head"], ensure_weight_tying=True),
    ),
    "kept tied, save embed_tokens": (
        T,
        dict(target_modules=Q, modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    ),
    "kept tied, save both": (
        T,
        dict(target_modules=Q, modules_to_save=ENDS, ensure_weight_tying=True),
    ),
    "LoRA on embed_tokens": (U, dict(target_modules=[*Q, "embed_tokens"])),
    "LoRA on lm_head": (U, dict(target_modules=[*Q, "lm_head"])),
    "LoRA on both": (U, dict(target_modules=[*Q, *ENDS], lora_alpha=7)),
    "LoRA on both, Granite": ("granite", dict(target_modules=[*Q, *ENDS])),
    "save both ends, Granite": ("granite", dict(target_modules=Q, modules_to_save=ENDS)),
    "LoRA on both, regex": (U, dict(target_modules=r".*(v_proj|embed_tokens|lm_head)")),
    "LoRA on both, patterns": (
        U,
        dict(
            target_modules=[*Q, *ENDS],
            rank_pattern={"embed_tokens": 3, "lm_head": 6},
            alpha_pattern={"lm_head": 5, "q_proj": 2},
            use_rslora=True,
        ),
    ),
    "LoRA on both, dropout": (U, dict(target_modules=[*Q, *ENDS], lora_dropout=0.3)),
    "LoRA on both, DoRA": (U, dict(target_modules=[*Q, *ENDS], use_dora=True)),
    "LoRA on lm_head, lora_bias": (U, dict(target_modules=[*Q, "lm_head"], lora_bias=True)),
    "LoRA on embed_tokens, lm_head saved": (
        U,
        dict(target_modules=[*Q, "embed_tokens"], modules_to_save=["lm_head"]),
    ),
    "tied, LoRA on embed_tokens": (T, dict(target_modules=[*Q, "embed_tokens"])),
    "tied, LoRA on lm_head": (T, dict(target_modules=[*Q, "lm_head"])),
    "tied, LoRA on both": (T, dict(target_modules=[*Q, *ENDS])),
    "tied, LoRA on both, DoRA": (T, dict(target_modules=[*Q, *ENDS], use_dora=True)),
    "tied, LoRA on lm_head, embed_tokens saved": (
        T,
        dict(target_modules=[*Q, "lm_head"], modules_to_save=["embed_tokens"]),
    ),
    "tied, LoRA on embed_tokens, lm_head saved": (
        T,
        dict(target_modules=[*Q, "embed_tokens"], modules_to_save=["lm_head"]),
    ),
    "kept tied, LoRA on embed_tokens": (
        T,
        dict(target_modules=[*Q, "embed_tokens"], ensure_weight_tying=True),
    ),
    "kept tied, LoRA on lm_head": (
        T,
        dict(target_modules=[*Q, "lm_head"], ensure_weight_tying=True),
    ),
    "kept tied, LoRA on both": (T, dict(target_modules=[*Q, *ENDS], ensure_weight_tying=True)),
    "kept tied, LoRA on both, patterns": (
        T,
        dict(
            target_modules=[*Q, *ENDS],
            ensure_weight_tying=True,
            rank_pattern={"embed_tokens": 3, "lm_head": 3},
            alpha_pattern={"embed_tokens": 5, "lm_head": 5},
        ),
    ),
    "rows": (U, dict(target_modules=Q, trainable_token_indices=[7, 3])),
    "rows, tied": (T, dict(target_modules=Q, trainable_token_indices=[7, 3, 95])),
    "rows of the head": (T, dict(target_modules=Q, trainable_token_indices={"lm_head": [7, 3]})),
    "rows of both alike, tied": (
        T,
        dict(target_modules=Q, trainable_token_indices={"embed_tokens": [3, 7], "lm_head": [3, 7]}),
    ),
    "rows of both, tied": (
        T,
        dict(target_modules=Q, trainable_token_indices={"embed_tokens": [3, 7], "lm_head": [1]}),
    ),
    "rows of both, untied": (
        U,
        dict(target_modules=Q, trainable_token_indices={"embed_tokens": [3, 7], "lm_head": [3, 1]}),
    ),
    "rows, kept tied": (
        T,
        dict(target_modules=Q, trainable_token_indices=[3, 7], ensure_weight_tying=True),
    ),
    "rows, lm_head saved": (
        U,
        dict(target_modules=Q, trainable_token_indices=[3, 7], modules_to_save=["lm_head"]),
    ),
    "rows, LoRA on lm_head": (
        U,
        dict(target_modules=[*Q, "lm_head"], trainable_token_indices=[3, 7]),
    ),
    "rows of the head, LoRA on embed_tokens": (
        U,
        dict(target_modules=[*Q, "embed_tokens"], trainable_token_indices={"lm_head": [3, 7]}),
    ),
}

EXTRAS_CASES = {
    name: (family, dict(r=4) | settings) for name, (family, settings) in EXTRAS_CASES.items()
}
