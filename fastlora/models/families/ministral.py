"""Ministral (8B-2410): Mistral whose layers may have different windows."""

from dataclasses import replace

from fastlora.models.families.mistral import MISTRAL

MINISTRAL = replace(
    MISTRAL,
    name="ministral",
    models="Ministral 8B (2410)",
    same_layer_types=False,
    peft_has_default=False,
)
