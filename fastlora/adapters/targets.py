"""Which modules carry an adapter, at which rank and scale: patterns in, names out.

Matching is PEFT's, rule for rule (peft 0.21.2, tuners_utils.py:2337-2412 and utils/other.py:1524),
over the module names that transformers gives these models. It is settled here once: `lora` and the
reader of PEFT folders (export.py) both end in `resolve_targets`, and nothing later sees a pattern.
"""

import math
from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import regex

from fastlora.adapters.expert_targets import matched_parameters, translate_targets
from fastlora.adapters.extras import EDGE_MODULES, resolve_extras
from fastlora.adapters.patterns import first_match, is_target, regex_problems
from fastlora.adapters.refusals import lora_setting_problems, match_problems, weight_init_problems
from fastlora.errors import raise_problems
from fastlora.models.config import LlamaConfig
from fastlora.models.names import is_mixture, layer_targets, module_names, projection_path
from fastlora.models.params import EXPERTS, PROJECTIONS
from fastlora.models.spec import Extras, LoraConfig, Target

PEFT_TARGETS = ("q_proj", "v_proj")  # PEFT's own choice for Llama, Mistral and Qwen


def resolve_targets(
    settings: LoraConfig,
    config: LlamaConfig,
    heading: str,
    problems: Iterable[str] = (),
    *,
    error: type[ValueError] = ValueError,
    strict: bool = True,
) -> LoraConfig:
    """The settings with `targets` filled in: PEFT's modules, ranks and scalings.

    Args:
        settings: as given; the `targets` in it are not read.
        config: the model's shape.
        heading: first line of the error.
        problems: what the caller found already, to be raised together with what is found here.
        error: what to raise.
        strict: also refuse what PEFT would ignore, with or without a warning.

    Raises:
        ValueError: (or `error`) if a value cannot be, a matched module is neither a linear layer
            nor the embedding, or none matches.
    """
    problems = [*problems, *lora_setting_problems(settings)]
    given, bad_patterns = settings, regex_problems(settings, config)
    modules, matched, parameters = module_names(config), [], []
    if not bad_patterns:
        matches = lambda name: is_target(name, given)
        settings, untranslated = translate_targets(given, config, modules, matches)
        problems += untranslated
        matched = [m for m in modules if is_target(m, settings)]
        parameters = matched_parameters(settings, config)
    found, parameter_problems = _adapted(settings, config, matched, parameters)
    problems += [
        f"target_modules matches {m}, which is no linear layer; expected among {list(PROJECTIONS)}."
        for m in matched
        if m.rpartition(".")[2] not in PROJECTIONS and m not in EDGE_MODULES
    ]
    problems += parameter_problems
    problems += bad_patterns or match_problems(settings, config, [*matched, *parameters], strict)
    extras = Extras()
    if not (bad_patterns or problems):  # whose ranks and patterns can be used
        of = partial(_target, settings)
        extras, problems = resolve_extras(settings, config, modules, matched, of, strict)
        problems += weight_init_problems(settings, extras, found)
    raise_problems(error, heading, problems)
    targets = tuple(
        tuple(
            _target(settings, name, found[path])
            for name in layer_targets(config, layer)
            if (path := projection_path(layer, name)) in found
        )
        for layer in range(config.num_hidden_layers)
    )
    return replace(given, targets=targets, extras=extras)


def _adapted(
    s: LoraConfig, config: LlamaConfig, modules: list[str], parameters: list[str]
) -> tuple[dict[str, str], list[str]]:
    """(projection_path -> the name that patterns are matched with, problems)."""
    found = {m: m for m in modules if m.rpartition(".")[2] in PROJECTIONS}
    paths = {
        p if n in EXPERTS else f"{p}.weight": p
        for layer in range(config.num_hidden_layers)
        for n in layer_targets(config, layer)
        for p in [projection_path(layer, n)]
    }
    problems = [
        f"target_parameters matches {p}, which is neither a projection's weight nor experts'; embed"
        "ding and head are targets of target_modules."
        for p in parameters
        if p not in paths
    ]
    problems += [
        f"target_parameters matches {p}, whose module target_modules matches too; leave it to one."
        for p in parameters
        if paths.get(p) in found
    ]
    wrong = {"lora_dropout": s.lora_dropout, "use_dora": s.use_dora, "lora_bias": s.lora_bias}
    problems += [
        f"{name}={value!r} does not go with target_parameters ({parameters[0]}, ...): a parameter"
        " has no input of its own; leave it at its default, or leave the parameters out."
        for name, value in wrong.items()
        if parameters and value
    ]
    return found | {paths[p]: p for p in parameters if p in paths}, problems


def with_targets(lora: LoraConfig, targets: tuple[tuple[Target, ...], ...]) -> LoraConfig:
    """The settings with these targets, chosen one by one, spelled so that they resolve to them.

    By full names, so that no two patterns match the same module and their order is no matter.
    """
    named = {projection_path(i, t.name): t for i, ts in enumerate(targets) for t in ts}
    ends = {module: getattr(lora.extras, end) for module, end in EDGE_MODULES.items()}
    named |= {module: t for module, t in ends.items() if t is not None}
    ranks = {path: t.r for path, t in named.items() if t.r != lora.r}
    alphas = {path: t.lora_alpha for path, t in named.items() if t.lora_alpha != lora.lora_alpha}
    return replace(
        lora,
        target_modules=tuple(named),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        rank_pattern=tuple((regex.escape(path), r) for path, r in ranks.items()),
        alpha_pattern=tuple((regex.escape(path), alpha) for path, alpha in alphas.items()),
        targets=targets,
    )


def peft_targets(config: LlamaConfig) -> tuple[str, ...]:
    """What PEFT adapts where it is told nothing; of a mixture of experts, nothing."""
    return () if is_mixture(config) else PEFT_TARGETS


def _target(settings: LoraConfig, name: str, path: str) -> Target:
    r = first_match(settings.rank_pattern, path, settings.r)
    alpha = first_match(settings.alpha_pattern, path, settings.lora_alpha)
    scaling = alpha / (math.sqrt(r) if settings.use_rslora else r)
    return Target(name=name, r=r, lora_alpha=alpha, scaling=scaling)
