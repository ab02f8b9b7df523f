"""Initialisations that subtract an offset from the base, and models trained a little from there."""

import torch
from torch.utils._pytree import tree_leaves, tree_map

from fastlora.models.init_offset import offsets
from oracles.peft_cases import SEVEN

# Arguments that mean the same to fastlora.lora and to peft.LoraConfig, over two layers.
MOVING = {
    "pissa": dict(r=4, init_lora_weights="pissa"),
    "pissa, alpha": dict(r=4, lora_alpha=8, init_lora_weights="pissa", target_modules=SEVEN),
    "pissa, rslora": dict(r=8, lora_alpha=4, init_lora_weights="pissa", use_rslora=True),
    "pissa, patterns": dict(
        r=4,
        target_modules=SEVEN,
        init_lora_weights="pissa",
        rank_pattern={"q_proj": 6, r"layers\.1\.mlp\.\w+": 2},
        alpha_pattern={"down_proj": 3, "1.self_attn.o_proj": 6},
    ),
    "pissa, rslora, patterns": dict(
        r=4,
        init_lora_weights="pissa",
        use_rslora=True,
        rank_pattern={"v_proj": 7},
        alpha_pattern={"q_proj": 3},
    ),
    "pissa, one layer": dict(r=4, init_lora_weights="pissa", layers_to_transform=[1]),
    "pissa, DoRA": dict(r=4, lora_alpha=8, init_lora_weights="pissa", use_dora=True),
    "olora": dict(r=4, lora_alpha=8, init_lora_weights="olora", target_modules=SEVEN),
    "olora, rslora": dict(r=3, init_lora_weights="olora", use_rslora=True),
}

BOTH = {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 8}

OWN = {"pissa_niter_4": {}, "loftq": {"loftq_config": {"loftq_bits": 8, "loftq_iter": 2}}}
ALL = [*MOVING.values(), *({"r": 4, "init_lora_weights": i} | more for i, more in OWN.items())]


def shaken(model, std=0.05, seed=1):
    """The model with a little noise on every adapter tensor."""
    gen = torch.Generator().manual_seed(seed)
    noise = lambda t: t + (std * torch.randn(t.shape, generator=gen)).to(t.dtype)
    return model.with_adapter(tree_map(noise, model.adapter))


def same_objects(one, other):
    return all(x is y for x, y in zip(tree_leaves(one), tree_leaves(other), strict=True))


def start_leaves(model):
    return [x for params in model.base["layers"] for pair in offsets(params).values() for x in pair]
