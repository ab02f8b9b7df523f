"""Targets of mixtures of experts: names of transformers 4 in target_modules, and parameters."""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

from fastlora.models.config import LlamaConfig
from fastlora.models.names import (
    FUSED_GATE_UP,
    base_tensors,
    expert_spelling,
    is_mixture,
    legacy_expert_names,
)
from fastlora.models.params import PROJECTIONS
from fastlora.models.spec import LoraConfig


def translate_targets(
    settings: LoraConfig,
    config: LlamaConfig,
    modules: Collection[str],
    matches: Callable[[str], bool],
) -> tuple[LoraConfig, list[str]]:
    """(settings with transformers 4's names of experts as target_parameters, problems).

        target_modules ("q_proj", "gate_proj", "up_proj"), r 8
    ->  target_modules ("q_proj",), target_parameters ("gate_up_proj",),
        rank_pattern {".*\\.gate_up_proj": 16}

    The translation is that of peft 0.21.2 (utils/transformers_weight_conversion.py:402). In
    transformers 4 the matrices of each expert were separate modules. Now gate and up are one
    tensor, which gets twice the rank and twice alpha, so that each half keeps its rank and scaling.
    PEFT translates bare names: a regex reaches every layer, and a dense MLP in a mixture's model
    gets no adapter.

    Args:
        settings: as given.
        config: the model's shape; settings for a dense family are returned unchanged.
        modules: names of all modules.
        matches: whether `target_modules`, as given, matches a name.
    """
    if not is_mixture(config):
        return settings, []
    gate, up, down = expert_spelling(config).matrices
    new_names = {"gate": "gate.weight", gate: FUSED_GATE_UP, up: FUSED_GATE_UP, down: "down_proj"}
    targets = _bare_targets(settings.target_modules, config, new_names, modules, matches)
    if not targets and isinstance(settings.target_modules, str):
        return settings, []  # match_problems reports that the pattern matches nothing
    old_names = {
        t: next((old for old in new_names if f".{t}".endswith(f".{old}")), None) for t in targets
    }
    halves = [old for old in (gate, up) if old in old_names.values()]
    if len(halves) == 1:
        missing = up if halves == [gate] else gate
        return settings, [
            f"target_modules has {halves[0]!r} without {missing!r}, but the experts hold both in"
            f" one tensor, {FUSED_GATE_UP!r}; name both, or target_parameters=['{FUSED_GATE_UP}']"
        ]
    ranks, alphas = dict(settings.rank_pattern), dict(settings.alpha_pattern)
    if halves:
        pattern = rf".*\.{re.escape(FUSED_GATE_UP)}"
        ranks |= {pattern: 2 * settings.r}
        alphas |= {pattern: 2 * settings.lora_alpha}
    parameters = dict.fromkeys(new_names[old] for old in old_names.values() if old)
    translated = replace(
        settings,
        target_modules=tuple(t for t in targets if old_names[t] is None),
        target_parameters=(*settings.target_parameters, *parameters),
        rank_pattern=tuple(ranks.items()),
        alpha_pattern=tuple(alphas.items()),
    )
    return translated, []


def _bare_targets(
    rule: tuple[str, ...] | str,
    config: LlamaConfig,
    new_names: Mapping[str, str],
    modules: Collection[str],
    matches: Callable[[str], bool],
) -> tuple[str, ...]:
    """`target_modules` as bare names, also if it is a regex, "all-linear" or the default."""
    attention = [n for n, module in PROJECTIONS.items() if module == "self_attn"]
    if rule == "all-linear":
        return (*attention, *new_names)
    if isinstance(rule, tuple):
        # The default of lora() names Llama's MLP. If the experts have other names (Mixtral's w1,
        # w2 and w3), PEFT does not adapt them.
        is_default = set(rule) == set(PROJECTIONS)
        names_no_expert = is_default and not new_names.keys() & PROJECTIONS.keys()
        return tuple(attention) if names_no_expert else rule
    parameters = list(base_tensors(config))
    matched = [m.rpartition(".")[2] for m in (*modules, *parameters) if matches(m)]
    matched += [m.rpartition(".")[2] for m in legacy_expert_names(config) if matches(m)]
    known = {m.rpartition(".")[2] for m in modules} | set(new_names)
    return tuple(name for name in dict.fromkeys(matched) if name in known)


def matched_parameters(settings: LoraConfig, config: LlamaConfig) -> list[str]:
    """The parameters that `target_parameters` names, in full or by their dotted ends."""
    rules = settings.target_parameters
    return [n for n in base_tensors(config) if any(f".{n}".endswith(f".{r}") for r in rules)]
