"""Names, layers and patterns that match nothing in a model, or that filter nothing.

PEFT ignores most of these, with or without a warning. lora() refuses them.
"""

from dataclasses import replace

import regex

from fastlora.adapters.expert_targets import matched_parameters
from fastlora.adapters.extras import EDGE_MODULES
from fastlora.adapters.patterns import is_target, layer_regex, names_module, pattern_regex
from fastlora.models.config import LlamaConfig
from fastlora.models.names import linear_names, module_names
from fastlora.models.spec import LoraConfig


def match_problems(
    s: LoraConfig, config: LlamaConfig, matched: list[str], strict: bool
) -> list[str]:
    """Problems with the names and patterns of settings.

    Args:
        s: the settings.
        config: the model's shape.
        matched: names of the modules and parameters that the settings match.
        strict: also report what PEFT would ignore; False: report only settings that adapt nothing.
    """
    problems = _ignored_problems(s, config, matched) if strict else []
    # A name without a match is already reported; this is for valid names that filters exclude.
    if not matched and not problems:
        form = "" if isinstance(s.target_modules, tuple) else ", a regex for the whole module name,"
        filters = f" after exclude_modules={s.exclude_modules!r}" if s.exclude_modules else ""
        filters += f" beside modules_to_save={s.modules_to_save!r}" if s.modules_to_save else ""
        filters += f" in layers {s.layers_to_transform}" if s.layers_to_transform else ""
        problems.append(
            f"target_modules={s.target_modules!r}{form} matches no module of this model{filters};"
            f" its linear layers are {list(linear_names(config))} and lm_head, its embedding"
            " embed_tokens"
        )
    return problems


def _ignored_problems(s: LoraConfig, config: LlamaConfig, matched: list[str]) -> list[str]:
    """Names, layers and patterns that match nothing in this model."""
    modules, n = module_names(config), config.num_hidden_layers
    no_module = "matches no module of this model"
    problems = []
    if isinstance(s.target_modules, tuple):
        problems += [
            f"target_modules: {name!r} {no_module}; expected among {list(linear_names(config))}"
            for name in _without_match(s.target_modules, modules)
        ]
    problems += [
        f"target_parameters: {name!r} matches no parameter of this model"
        for name in s.target_parameters
        if not matched_parameters(replace(s, target_parameters=(name,)), config)
    ]
    problems += [
        f"exclude_modules: {name!r} {no_module}; leave it out"
        for name in _without_match(s.exclude_modules, modules)
    ]
    problems += _unfiltered_parameters(s, config)
    problems += [
        f"target_modules: {m} is in no layer; layers_to_transform leaves it out"
        for m in EDGE_MODULES
        if m not in matched and _left_out_by_layers(s, m)
    ]
    problems += [
        f"layers_to_transform: this model has no layer {i}; expected 0 to {n - 1}"
        for i in s.layers_to_transform or ()
        if i not in range(n)
    ]
    problems += [
        f"layers_pattern: {p!r} {no_module}; this model's is 'layers'"
        for p in s.layers_pattern or ()
        if not any(regex.match(layer_regex(p), m) for m in modules)
    ]
    # Without any match, every pattern would be reported: one message about targets is enough.
    problems += [
        f"{field}: {key!r} matches no module that has an adapter"
        for field in ("rank_pattern", "alpha_pattern")
        for key, _ in getattr(s, field)
        if matched and not any(regex.match(pattern_regex(key), m) for m in matched)
    ]
    return problems


def _without_match(rule: tuple[str, ...] | str | None, modules: list[str]) -> list[str]:
    """The names of a rule that match no module; the rule itself if it is a regex that does not."""
    # A string is one regex for the full name; a tuple holds names and dotted ends.
    if isinstance(rule, str):
        return [rule] if rule and not any(names_module(rule, m) for m in modules) else []
    return [name for name in rule or () if not any(names_module((name,), m) for m in modules)]


def _unfiltered_parameters(s: LoraConfig, config: LlamaConfig) -> list[str]:
    """Filters that would have to keep LoRA from `target_parameters`, but filter modules only."""
    parameters = matched_parameters(s, config)
    if not parameters:
        return []
    cure = "; name the parameters you want in full, 'model.layers.0.mlp.experts.down_proj', ..."
    problems = []
    if s.layers_to_transform:
        problems.append(
            f"layers_to_transform={s.layers_to_transform} does not filter target_parameters, which"
            f" match {parameters[0]}, ...{cure}"
        )
    exclude = s.exclude_modules or ()
    problems += [
        f"exclude_modules={exclude!r} does not keep target_parameters from {p}{cure}"
        for p in parameters
        if exclude and (names_module(exclude, p) or names_module(exclude, p.rpartition(".")[0]))
    ]
    return problems


def _left_out_by_layers(s: LoraConfig, module: str) -> bool:
    """Whether layers_to_transform alone keeps a module from being adapted."""
    anywhere = replace(s, layers_to_transform=None, layers_pattern=None)
    return bool(s.layers_to_transform) and is_target(module, anywhere)
