"""The groups of an adapter's tensors, which may have different learning rates, and their norms."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from fastlora.arguments import Rule, argument_problems, describe, instance

# The keys of learning_rates. "A" and "other" (biases, magnitudes, whole matrices) have no key: they
# are trained at learning_rate.
RATE_GROUPS = ("B", "embeddings", "norms")

RATES = instance(Mapping, "a dict with rates of B, embeddings or norms")


def group_of(name: str, leaf: Tensor) -> str:
    """The group of a tensor: "A", "B", "embeddings", "norms" or "other".

    Args:
        name: PEFT's (`formats.peft.names`).
        leaf: the tensor.
    """
    edge = any(f".{module}." in name for module in ("embed_tokens", "lm_head"))
    if "lora_embedding_" in name or "token_adapter" in name:
        return "embeddings"
    if name.endswith(("lora_A.weight", "lora_B.weight")):
        return name[-len("A.weight")]
    if name.endswith("weight") and edge:  # a trained copy
        return "embeddings"
    return "norms" if name.endswith("norm.weight") and leaf.dim() == 1 else "other"


def rates_problems(rates: Any, rule: Rule) -> list[str]:
    """A line for each entry of learning_rates that is unknown or no rate.

    Args:
        rates: the argument.
        rule: of one learning rate.
    """
    if not isinstance(rates, Mapping):  # None, or its rule reports it
        return []
    problems = [
        f"learning_rates has the key {describe(key)}: expected {', '.join(RATE_GROUPS)}"
        for key in rates
        if key not in RATE_GROUPS
    ]
    given = {key: (rates[key], rule) for key in RATE_GROUPS if key in rates}
    return problems + [f"learning_rates: {line}" for line in argument_problems(given)]


def unused_rates(rates: Mapping[str, object], leaves: Mapping[str, Tensor]) -> list[str]:
    """A line for each entry of learning_rates that no trained tensor has a use for."""
    there = {group_of(name, leaf) for name, leaf in leaves.items()}
    return [
        f"learning_rates has a rate for {key!r}, and the adapter trains no such tensor"
        for key in RATE_GROUPS
        if key in rates and key not in there
    ]


def rate_ratios(
    leaves: Mapping[str, Tensor], learning_rate: float, rates: Mapping[str, float] | None
) -> list[float]:
    """Each leaf's learning rate, divided by `learning_rate`.

    LoRA+ (Hayou et al. 2024, arXiv:2402.12354) is a ratio above 1 for B: B starts at zero, and in
    wide models its best rate is larger than A's.
    """
    given = rates or {}
    return [
        given.get(group_of(name, leaf), learning_rate) / learning_rate
        for name, leaf in leaves.items()
    ]


def group_norms(leaves: Mapping[str, Tensor], tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """Group -> Euclidean norm (0-d, float32 or wider) of its tensors; empty groups are left out.

    Args:
        leaves: PEFT's name -> leaf.
        tensors: one for each leaf, such as its gradient.
    """
    members: dict[str, list[Tensor]] = {}
    for (name, leaf), tensor in zip(leaves.items(), tensors, strict=True):
        members.setdefault(group_of(name, leaf), []).append(tensor)
    return {group: get_total_norm(members[group]) for group in sorted(members)}


def update_differences(leaves: Sequence[Tensor], before: Sequence[Tensor]) -> list[Tensor]:
    """leaf - before for each leaf, in float32 or wider: a bfloat16 norm would have two digits."""
    wide = lambda x: x.detach().to(torch.promote_types(x.dtype, torch.float32))
    return [wide(leaf) - wide(old) for leaf, old in zip(leaves, before, strict=True)]
