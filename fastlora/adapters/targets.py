"""Which modules carry an adapter, with which rank and scaling: patterns in, names out.

Matching follows PEFT's rules (peft 0.21.2, tuners_utils.py:2337-2412 and utils/other.py:1524) over
the module names that transformers gives these models. `lora` and the reader of PEFT folders
(formats/peft/config_reading.py) both call `resolve_targets`; all other code uses its result.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import regex

from fastlora.adapters.expert_targets import matched_parameters, translate_targets
from fastlora.adapters.extras import EDGE_MODULES, resolve_extras
from fastlora.adapters.lora_arguments import lora_setting_problems
from fastlora.adapters.patterns import first_match, is_target, regex_problems
from fastlora.adapters.refusals import weight_init_problems
from fastlora.adapters.unmatched import match_problems
from fastlora.errors import raise_problems
from fastlora.models.config import LlamaConfig
from fastlora.models.names import layer_targets, linear_names, module_names, projection_path
from fastlora.models.params import EXPERTS, LINEARS
from fastlora.models.spec import Extras, LoraConfig, Target, lora_scaling


def resolve_targets(
    settings: LoraConfig,
    config: LlamaConfig,
    heading: str,
    problems: Iterable[str] = (),
    *,
    error: type[ValueError] = ValueError,
    strict: bool = True,
    spoken: Callable[[str], str] = str,
) -> LoraConfig:
    """The settings with `targets` and `extras` filled in: PEFT's modules, ranks and scalings.

        target_modules ("q_proj",), r 4, lora_alpha 8
    ->  targets ((Target(name="q_proj", r=4, lora_alpha=8, scaling=2.0),), ...), one tuple per layer

    Args:
        settings: as given; the `targets` and `extras` in it are not read.
        config: the model's shape.
        heading: first line of the error.
        problems: problems that the caller found, to be raised together with those found here.
        error: the class to raise.
        strict: also refuse what PEFT would ignore, with or without a warning.
        spoken: a module's name -> the name that the settings' names and patterns are matched with.

    Raises:
        ValueError: (or `error`) listing wrong values, matched modules that are neither linear
            layers nor the embedding, and names and patterns that match nothing.
    """
    problems = [*problems, *lora_setting_problems(settings)]
    given, pattern_problems = settings, regex_problems(settings, config)
    modules, matched, parameters = module_names(config), [], []
    # Only patterns that compile, and match in time, may be used.
    if not pattern_problems:
        matches = lambda name: is_target(name, given)
        settings, expert_problems = translate_targets(given, config, modules, matches)
        problems += expert_problems
        matched = [m for m in modules if is_target(spoken(m), settings)]
        parameters = matched_parameters(settings, config)
    adapted, parameter_problems = _adapted_names(settings, config, matched, parameters, spoken)
    problems += [
        f"target_modules matches {m}, which is not a linear layer; expected among"
        f" {list(linear_names(config))}"
        for m in matched
        if m.rpartition(".")[2] not in LINEARS and m not in EDGE_MODULES
    ]
    problems += parameter_problems
    problems += pattern_problems or match_problems(
        settings, config, [*matched, *parameters], strict
    )
    extras = Extras()
    if not (pattern_problems or problems):  # only valid ranks and patterns give targets
        target = lambda name, module: _target(settings, name, spoken(module))
        extras, problems = resolve_extras(
            settings, config, modules, matched, target, strict, spoken
        )
        problems += weight_init_problems(settings, extras, adapted)
    raise_problems(error, heading, problems)
    return replace(given, targets=_targets_by_layer(settings, config, adapted), extras=extras)


def _adapted_names(
    s: LoraConfig,
    config: LlamaConfig,
    modules: list[str],
    parameters: list[str],
    spoken: Callable[[str], str],
) -> tuple[dict[str, str], list[str]]:
    """(projection_path -> the name that patterns are matched with, problems).

    A projection that `target_modules` matches has its module's name; one that `target_parameters`
    matches has its parameter's.
    """
    # Patterns of rank and alpha see the module's name, or the parameter's, as in PEFT.
    by_module = {m: spoken(m) for m in modules if m.rpartition(".")[2] in LINEARS}
    paths = {
        path if name in EXPERTS else f"{path}.weight": path
        for layer in range(config.num_hidden_layers)
        for name in layer_targets(config, layer)
        for path in [projection_path(layer, name)]
    }
    problems = [
        f"target_parameters matches {p}, which is neither a projection's weight nor a tensor of"
        " experts; name embedding and head in target_modules"
        for p in parameters
        if p not in paths
    ]
    problems += [
        f"target_parameters matches {p}, whose module target_modules matches too; keep one of them"
        for p in parameters
        if paths.get(p) in by_module
    ]
    excluded = {"lora_dropout": s.lora_dropout, "use_dora": s.use_dora, "lora_bias": s.lora_bias}
    problems += [
        f"{name}={value!r} does not go with target_parameters ({parameters[0]}, ...): a parameter"
        " has no input of its own; leave it at its default, or leave the parameters out"
        for name, value in excluded.items()
        if parameters and value
    ]
    return by_module | {paths[p]: p for p in parameters if p in paths}, problems


def _targets_by_layer(
    s: LoraConfig, config: LlamaConfig, adapted: Mapping[str, str]
) -> tuple[tuple[Target, ...], ...]:
    return tuple(
        tuple(
            _target(s, name, adapted[path])
            for name in layer_targets(config, layer)
            if (path := projection_path(layer, name)) in adapted
        )
        for layer in range(config.num_hidden_layers)
    )


def _target(settings: LoraConfig, name: str, path: str) -> Target:
    """The target of this name, with the rank and alpha of the first patterns that match `path`."""
    r = first_match(settings.rank_pattern, path, settings.r)
    alpha = first_match(settings.alpha_pattern, path, settings.lora_alpha)
    scaling = lora_scaling(r, alpha, settings.use_rslora)
    return Target(name=name, r=r, lora_alpha=alpha, scaling=scaling)


def with_targets(lora: LoraConfig, targets: tuple[tuple[Target, ...], ...]) -> LoraConfig:
    """The settings with these targets, written so that `resolve_targets` gives the same targets.

    Modules and patterns are full names, so that no two patterns match the same module and their
    order does not matter.
    """
    named = {projection_path(i, t.name): t for i, ts in enumerate(targets) for t in ts}
    edges = {module: getattr(lora.extras, key) for module, key in EDGE_MODULES.items()}
    named |= {module: t for module, t in edges.items() if t is not None}
    ranks = {path: t.r for path, t in named.items() if t.r != lora.r}
    alphas = {path: t.lora_alpha for path, t in named.items() if t.lora_alpha != lora.lora_alpha}
    # The filters are dropped, because the names are those that passed them. Patterns are escaped,
    # because a dot would match any character.
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
