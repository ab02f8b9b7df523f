"""Losses beyond supervised fine-tuning.

    from fastlora import losses
    model, history = fastlora.train(model, tokenizer, "pairs.jsonl", loss="dpo")
    model, history = fastlora.train(model, tokenizer, rows, loss=losses.Distill(teacher=teacher))

In reading order: preferences.py holds dpo, orpo, kto and simpo, policy.py dft, grpo and
group_advantages: pure functions of log-probabilities, to be used by hand over
`functional.token_logprobs` or `row_logprobs` (row_logprobs.py). distillation.py compares two models
in chunks of logits. objectives.py holds the records that `train(loss=...)` takes.
preference_rows.py reads the rows of DPO, ORPO, SimPO and KTO, and preference_batches.py makes
batches of them. README.md has an example of each loss.
"""

from fastlora.losses.distillation import distill, divergence
from fastlora.losses.objectives import (
    DFT,
    DPO,
    KTO,
    ORPO,
    Distill,
    Objective,
    SimPO,
)
from fastlora.losses.policy import dft, group_advantages, grpo
from fastlora.losses.preference_batches import preference_batches
from fastlora.losses.preference_rows import encode_labelled, encode_pairs
from fastlora.losses.preferences import dpo, kto, orpo, simpo
from fastlora.losses.row_logprobs import row_logprobs

__all__ = [
    "DFT",
    "DPO",
    "KTO",
    "ORPO",
    "Distill",
    "Objective",
    "SimPO",
    "dft",
    "distill",
    "divergence",
    "dpo",
    "encode_labelled",
    "encode_pairs",
    "group_advantages",
    "grpo",
    "kto",
    "orpo",
    "preference_batches",
    "row_logprobs",
    "simpo",
]
