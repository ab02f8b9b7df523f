"""expert_targets."""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

from fastlora.models.config import LlamaConfig
from fastlora.models.names import (
    EXPERT_SPELLINGS,
    FUSED_GATE_UP,
    base_tensors,
    former_names,
    is_mixture,
)
from fastlora.models.params import PROJECTIONS
from fastlora.models.spec import LoraConfig


def translate_targets(
    settings: LoraConfig,
    config: LlamaConfig,
    modules: Collection[str],
    matches: Callable[[str], bool],
) -> tuple[LoraConfig, list[str]]:
    """(settings without names of transformers 4, problems), as peft 0.21.2 translates them
    (utils/transformers_weight_conversion.py:402).

    In transformers 4 every expert's matrices were modules of their own; their names become target
    parameters. Gate and up are one tensor now: twice the rank, and twice alpha, keep each half's
    own. PEFT translates by bare name, so that a regex reaches every layer, and a dense MLP in a
    model of mixtures gets no adapter at all.

    Args:
        settings: as given.
        config: the model's shape; a dense family's settings come back as they are.
        modules: names of all modules.
        matches: whether `target_modules`, as given, matches a name.
    """
    if not is_mixture(config):
        return settings, []
    _, (gate, up, down) = EXPERT_SPELLINGS[config.model_type]
    new = {"gate": "gate.weight", gate: FUSED_GATE_UP, up: FUSED_GATE_UP, down: "down_proj"}
    targets = _target_names(settings.target_modules, config, new, modules, matches)
    if not targets and isinstance(settings.target_modules, str):
        return settings, []  # for the error that the pattern matches nothing
    old = {t: next((o for o in new if f".{t}".endswith(f".{o}")), None) for t in targets}
    present = [o for o in (gate, up) if o in old.values()]
    if len(present) == 1:
        missing = up if present == [gate] else gate
        return settings, [
            f"target_modules has {present[0]!r} without {missing!r}, but the experts hold both in"
            f" one tensor, {FUSED_GATE_UP!r}; name both, or target_parameters=['{FUSED_GATE_UP}']."
        ]
    ranks, alphas = dict(settings.rank_pattern), dict(settings.alpha_pattern)
    if present:
        pattern = rf".*\.{re.escape(FUSED_GATE_UP)}"
        ranks |= {pattern: 2 * settings.r}
        alphas |= {pattern: 2 * settings.lora_alpha}
    added = dict.fromkeys(new[o] for o in old.values() if o)
    translated = replace(
        settings,
        target_modules=tuple(t for t in targets if old[t] is None),
        target_parameters=(*settings.target_parameters, *added),
        rank_pattern=tuple(ranks.items()),
        alpha_pattern=tuple(alphas.items()),
    )
    return translated, []


def _target_names(
    rule: tuple[str, ...] | str,
    config: LlamaConfig,
    new: Mapping[str, str],
    modules: Collection[str],
    matches: Callable[[str], bool],
) -> tuple[str, ...]:
    """`target_modules` as bare names, where it is a regex, "all-linear", or the default seven."""
    attention = [n for n, module in PROJECTIONS.items() if module == "self_attn"]
    if rule == "all-linear":
        return (*attention, *new)
    if isinstance(rule, tuple):
        # lora()'s own default: where the experts have other names, PEFT leaves them alone.
        names_none = set(rule) == set(PROJECTIONS) and "w1" in new
        return tuple(attention) if names_none else rule
    parameters = list(base_tensors(config))
    ends = [m.rpartition(".")[2] for m in (*modules, *parameters) if matches(m)]
    ends += [m.rpartition(".")[2] for m in former_names(config) if matches(m)]
    known = {m.rpartition(".")[2] for m in modules} | set(new)
    return tuple(e for e in dict.fromkeys(ends) if e in known)


def matched_parameters(settings: LoraConfig, config: LlamaConfig) -> list[str]:
    """The parameters that `target_parameters` names, in full or by their dotted ends."""
    rules = settings.target_parameters
    return [n for n in base_tensors(config) if any(f".{n}".endswith(f".{r}") for r in rules)]
