"""Tiny checkpoints of text models beside vision towers, written by transformers."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from oracles.checkpoints import FAMILIES, randomise

_VISION = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
_VISION |= dict(image_size=8, patch_size=4, num_channels=3)

WRAPPED: dict[str, dict[str, Any]] = {
    "gemma3": dict(
        model_type="gemma3",
        # The model with a vision tower does not cap its logits, whatever the text's settings say.
        text_config=FAMILIES["gemma3"],
        vision_config=dict(_VISION, model_type="siglip_vision_model"),
        mm_tokens_per_image=4,
        image_token_index=90,
    ),
    "mistral3": dict(
        model_type="mistral3",
        text_config=FAMILIES["mistral"],
        vision_config=dict(_VISION, model_type="pixtral", head_dim=8),
        image_token_index=90,
        tie_word_embeddings=False,
    ),
}


def make_wrapped(
    kind: str, folder: Path, dtype: torch.dtype = torch.float32, **text: Any
) -> PreTrainedModel:
    """Write a random checkpoint into `folder`; return transformers' model of it.

    `text` overrides settings of the text model.
    """
    raw = WRAPPED[kind]
    with torch.random.fork_rng(devices=[]):
        config = AutoConfig.for_model(**raw | {"text_config": raw["text_config"] | text})
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    randomise(model, 0)
    model.to(dtype).save_pretrained(folder)
    return read_wrapped(folder, dtype)


def read_wrapped(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """transformers' model of a folder."""
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval()
