"""Batches and models for the initialisations from data (EVA, CorDA, LoRA-GA)."""

import torch
from peft import LoraConfig as PeftConfig

from fastlora.adapters.create import lora
from fastlora.adapters.init_from_data.dispatch import initialize
from oracles.init_offset import shaken
from oracles.peft_cases import FORWARD, SEVEN
from oracles.peft_side import difference, fast, hf_logits, logits, peft_read


def ids(*shape, seed=3):
    return torch.randint(0, 96, shape, generator=torch.Generator().manual_seed(seed))


def batches(n=2, rows=4, tokens=20):
    drawn = [ids(rows, tokens, seed=seed) for seed in range(n)]
    return [{"input_ids": x, "labels": x} for x in drawn]


def padded(n=2):
    """Batches with padding on the left and prompts without labels."""
    found = []
    for batch in batches(n):
        mask = torch.ones_like(batch["input_ids"])
        mask[0, :7] = mask[1, :2] = 0
        labels = batch["labels"].masked_fill(mask == 0, -100)
        labels[:, :9] = -100
        found.append({"input_ids": batch["input_ids"], "labels": labels, "attention_mask": mask})
    return found


def fresh(**settings):
    return lora(fast(FORWARD), **dict(r=4, lora_alpha=8) | settings)


def peft_config(init, **more):
    return PeftConfig(
        **dict(r=4, lora_alpha=8, target_modules=SEVEN, task_type="CAUSAL_LM") | more,
        init_lora_weights=init,
    )


def export_difference(method, folder, **how):
    """PEFT's logits with an adapter initialised from data, moved and saved here, against ours."""
    base = fast(FORWARD)
    model = shaken(initialize(lora(base, r=4, lora_alpha=8, **how), padded(), method))
    model.save_pretrained(folder)
    return difference(hf_logits(peft_read(FORWARD, folder)), logits(model), logits(base))


METHODS = ("eva", "corda", "lora_ga")
