"""Which modules carry an adapter, at which rank and scale: patterns in, names out.

Matching is PEFT's, rule for rule (peft 0.21.2, tuners_utils.py:2337-2412 and utils/other.py:1524),
over the module names that transformers gives these models. It is settled here once: `lora` and the
reader of PEFT folders (export.py) both end in `resolve_targets`, and nothing later sees a pattern.
"""

import math
from collections.abc import Collection, Iterable
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import Any

import regex

from fastlora.checks import raise_problems
from fastlora.expert_keys import former_names, is_mixture, matched_parameters, translate_targets
from fastlora.factors import reads_weights
from fastlora.llama.config import LlamaConfig
from fastlora.llama.params import (
    EXPERTS,
    PROJECTIONS,
    base_tensors,
    layer_targets,
    projection_path,
)
from fastlora.llama.spec import LoraConfig, Outside, Target
from fastlora.outside import ENDS, keeps_lora_away, resolve_outside

PEFT_TARGETS = ("q_proj", "v_proj")  # PEFT's own choice for Llama, Mistral and Qwen
# To match all patterns with all names, before they are used: patterns of a file are anybody's, and
# `re`, which has no time limit, takes 2**40 steps for "([a-z.]+)+!" on a name of 40 characters.
# The regex library has one.
_SECONDS = 0.5


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
    problems = [*problems, *_setting_problems(settings)]
    given, bad_patterns = settings, _regex_problems(settings, config)
    modules, matched, parameters = module_names(config), [], []
    if not bad_patterns:
        is_target = lambda name: _is_target(name, given)
        settings, untranslated = translate_targets(given, config, modules, is_target)
        problems += untranslated
        matched = [m for m in modules if _is_target(m, settings)]
        parameters = matched_parameters(settings, config)
    found, parameter_problems = _adapted(settings, config, matched, parameters)
    problems += [
        f"target_modules matches {m}, which is no linear layer; expected among {list(PROJECTIONS)}."
        for m in matched
        if m.rpartition(".")[2] not in PROJECTIONS and m not in ENDS
    ]
    problems += parameter_problems
    problems += bad_patterns or _match_problems(settings, config, [*matched, *parameters], strict)
    outside = Outside()
    if not (bad_patterns or problems):  # whose ranks and patterns can be used
        of = partial(_target, settings)
        outside, problems = resolve_outside(settings, config, modules, matched, of, strict)
        problems += _start_problems(settings, outside, found)
    raise_problems(error, heading, problems)
    targets = tuple(
        tuple(
            _target(settings, name, found[path])
            for name in layer_targets(config, layer)
            if (path := projection_path(layer, name)) in found
        )
        for layer in range(config.num_hidden_layers)
    )
    return replace(given, targets=targets, outside=outside)


def _start_problems(s: LoraConfig, outside: Outside, projections: Collection[str]) -> list[str]:
    """Initialisations that read weights: not a head's, and nothing's where there is no other."""
    problems = []
    if not reads_weights(s.init_lora_weights):
        return problems
    given = f"init_lora_weights={s.init_lora_weights!r}"
    if outside.lm_head is not None:
        problems.append(
            f"{given} does not go with target_modules of lm_head; leave the head out, or choose"
            " another."
        )
    if not projections:
        problems.append(f"{given} reads projections' weights, but none is adapted; leave it True.")
    return problems


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
    ends = {module: getattr(lora.outside, end) for module, end in ENDS.items()}
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
    r = _first_match(settings.rank_pattern, path, settings.r)
    alpha = _first_match(settings.alpha_pattern, path, settings.lora_alpha)
    scaling = alpha / (math.sqrt(r) if settings.use_rslora else r)
    return Target(name=name, r=r, lora_alpha=alpha, scaling=scaling)


def _first_match(patterns: tuple[tuple[str, Any], ...], path: str, default: Any) -> Any:
    return next((v for key, v in patterns if regex.match(_pattern_regex(key), path)), default)


def _is_target(module: str, settings: LoraConfig) -> bool:
    targets = settings.target_modules
    if settings.exclude_modules and _names(settings.exclude_modules, module):
        return False
    if keeps_lora_away(settings.modules_to_save, module):
        return False
    if targets == "all-linear":
        return module.rpartition(".")[2] in PROJECTIONS
    if isinstance(targets, tuple) and module in targets:
        return True  # before the layers are asked: PEFT does not filter a full name by its layer
    return _names(targets, module) and _in_layers(module, settings)


def _names(rule: tuple[str, ...] | str, module: str) -> bool:
    """A string is a regular expression for the whole name, a tuple holds names or dotted ends."""
    if isinstance(rule, str):
        return regex.fullmatch(rule, module) is not None
    return any(f".{module}".endswith(f".{end}") for end in rule)


def _in_layers(module: str, settings: LoraConfig) -> bool:
    """Whether the first number after a `layers_pattern` is among `layers_to_transform`."""
    if not settings.layers_to_transform:
        return True
    patterns = settings.layers_pattern or (r"[^.]*",)
    found = (regex.match(_layer_regex(p), module) for p in patterns)
    first = next((m for m in found if m), None)
    return first is not None and int(first["idx"]) in settings.layers_to_transform


def _pattern_regex(key: str) -> str:
    return rf"(.*\.)?({key})$"


def _layer_regex(pattern: str) -> str:
    return rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\."


def module_names(config: LlamaConfig) -> list[str]:
    """Every module that transformers' model of this shape has: what patterns are matched with."""
    attention = ["q_norm", "k_norm"] if config.qk_norm else []
    inner = ["self_attn", "mlp", "input_layernorm", "post_attention_layernorm"]
    inner += [f"self_attn.{n}" for n in attention]
    mlps = {False: ["mlp.act_fn"], True: ["mlp.gate", "mlp.experts", "mlp.experts.act_fn"]}
    names = ["model", "model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb"]
    for layer in range(config.num_hidden_layers):
        own = [*inner, *mlps[config.sparse_layers[layer]]]
        names += [f"model.layers.{layer}", *(f"model.layers.{layer}.{n}" for n in own)]
        names += [
            projection_path(layer, n) for n in layer_targets(config, layer) if n in PROJECTIONS
        ]
    return [*names, "lm_head"]


def as_tuple(value: Collection[Any] | str | int | None) -> tuple[Any, ...] | None:
    """A collection as a tuple, a set in sorted order, and one name or number as a tuple of one."""
    if value is None:
        return None
    if isinstance(value, str | int):
        return (value,)
    return tuple(sorted(value)) if isinstance(value, set | frozenset) else tuple(value)


def names_or_regex(value: Collection[str] | str) -> tuple[str, ...] | str:
    """A collection as a tuple; a string as it is, with "all-linear" in lower case."""
    if isinstance(value, str):
        return value.lower() if value.lower() == "all-linear" else value
    return as_tuple(value) or ()


# ── what cannot be ────────────────────────────────────────────────────────────────────────


def _setting_problems(s: LoraConfig) -> list[str]:
    """Values that no model could take, by PEFT's rules."""
    ranks = {"r": s.r} | {f"rank_pattern[{k!r}]": v for k, v in s.rank_pattern}
    alphas = {"lora_alpha": s.lora_alpha} | {f"alpha_pattern[{k!r}]": v for k, v in s.alpha_pattern}
    problems = [
        f"{name}={v!r}: a rank is an integer of at least 1."
        for name, v in ranks.items()
        if type(v) is not int or v < 1
    ]
    problems += [
        f"{name}={v!r}: expected a finite number."
        for name, v in alphas.items()
        if type(v) not in (int, float) or not math.isfinite(v)
    ]
    if type(s.lora_dropout) not in (int, float) or not 0 <= s.lora_dropout <= 1:
        problems.append(f"lora_dropout={s.lora_dropout}: expected a probability in [0, 1).")
    if isinstance(s.target_modules, str) and (s.layers_to_transform or s.layers_pattern):
        problems.append(
            "layers_to_transform, layers_pattern and finetune_last_n_layers only filter a list, but"
            f" target_modules is the string {s.target_modules!r}; list the projections instead."
        )
    if s.layers_pattern and s.layers_to_transform is None:
        problems.append(f"layers_pattern={s.layers_pattern} needs layers_to_transform beside it.")
    return problems


def _regex_problems(s: LoraConfig, config: LlamaConfig) -> list[str]:
    """Patterns that are none, or that could not be matched with this model's names in time."""
    if wrong := [p for p in s.layers_pattern or () if regex.search(r"[|(){}?#]", p)]:
        return [f"layers_pattern={wrong!r:.200}: expected names of module lists."]
    patterns = [("rank_pattern", k, _pattern_regex(k)) for k, _ in s.rank_pattern]
    patterns += [("alpha_pattern", k, _pattern_regex(k)) for k, _ in s.alpha_pattern]
    patterns += [("layers_pattern", p, _layer_regex(p)) for p in s.layers_pattern or ()]
    for field in ("target_modules", "exclude_modules"):
        if isinstance(rule := getattr(s, field), str):
            patterns.append((field, rule, rule))
    names, end = module_names(config), perf_counter() + _SECONDS
    if is_mixture(config) or s.target_parameters:
        names += [*base_tensors(config), *former_names(config)]
    problems = []
    for field, pattern, x in patterns:
        # A full name, of which there may be 882 (Llama 3.1 405B), repeats nothing.
        repeats = regex.search(r"[*+?{(]", pattern) is not None
        if why := _refusal(x, names if repeats else (), end):
            problems.append(f"{field}: {pattern!r:.200} {why}.")
    return problems


def _refusal(pattern: str, names: Iterable[str], end: float) -> str:
    try:
        compiled = regex.compile(pattern)
        for name in names:
            compiled.fullmatch(name, timeout=max(end - perf_counter(), 1e-3))
    except TimeoutError:
        return "takes too long to match; list names instead"
    except (regex.error, RecursionError, OverflowError, MemoryError) as error:
        return f"is no regular expression: {error}"
    return ""


def _match_problems(
    s: LoraConfig, config: LlamaConfig, matched: list[str], strict: bool
) -> list[str]:
    problems = _without_effect(s, config, matched) if strict else []
    if not matched and not problems:
        left = f" after exclude_modules={s.exclude_modules!r}" if s.exclude_modules else ""
        only = f" in layers {s.layers_to_transform}" if s.layers_to_transform else ""
        left += f" beside modules_to_save={s.modules_to_save!r}" if s.modules_to_save else ""
        how = "" if isinstance(s.target_modules, tuple) else ", a regex for the whole module name,"
        problems.append(
            f"target_modules={s.target_modules!r}{how} matches no module of this model{left}{only};"
            f" its linear layers are {list(PROJECTIONS)} and lm_head, its embedding embed_tokens."
        )
    return problems


def _beside_parameters(s: LoraConfig, config: LlamaConfig) -> list[str]:
    """Filters that PEFT applies to modules only, where parameters are adapted as well."""
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
    homes = {p: p.rpartition(".")[0] for p in parameters}
    problems += [
        f"exclude_modules={exclude!r} does not keep target_parameters from {p}{cure}"
        for p in parameters
        if exclude and (_names(exclude, p) or _names(exclude, homes[p]))
    ]
    return problems


def _without_effect(s: LoraConfig, config: LlamaConfig, matched: list[str]) -> list[str]:
    """What PEFT ignores: names, layers and patterns that match nothing in this model."""
    modules, n = module_names(config), config.num_hidden_layers

    def idle(rule: tuple[str, ...] | str | None) -> list[str]:
        entries = rule if isinstance(rule, tuple) else [rule] if rule else []
        is_regex = isinstance(rule, str)
        return [e for e in entries if not any(_names(e if is_regex else (e,), m) for m in modules)]

    nothing = "matches no module of this model"
    linear = list(PROJECTIONS)
    problems = []
    if isinstance(s.target_modules, tuple):
        unknown = idle(s.target_modules)
        problems += [f"target_modules: {e!r} {nothing}; expected among {linear}." for e in unknown]
    problems += [
        f"target_parameters: {e!r} matches no parameter of this model."
        for e in s.target_parameters
        if not matched_parameters(replace(s, target_parameters=(e,)), config)
    ]
    problems += [
        f"exclude_modules: {e!r} {nothing}; leave it out." for e in idle(s.exclude_modules)
    ]
    problems += _beside_parameters(s, config)
    problems += [
        f"target_modules: {m} is in no layer; layers_to_transform leaves it out."
        for m in ENDS
        if m not in matched and _left_out_by_layers(s, m)
    ]
    beyond = [i for i in s.layers_to_transform or () if i not in range(n)]
    problems += [f"layers_to_transform: {i} is no layer; expected 0 to {n - 1}." for i in beyond]
    for p in s.layers_pattern or ():
        if not any(regex.match(_layer_regex(p), m) for m in modules):
            problems.append(f"layers_pattern: {p!r} {nothing}; this model's is 'layers'.")
    for field in ("rank_pattern", "alpha_pattern"):
        for key, _ in getattr(s, field):
            if matched and not any(regex.match(_pattern_regex(key), m) for m in matched):
                problems.append(f"{field}: {key!r} matches no module that carries an adapter.")
    return problems


def _left_out_by_layers(s: LoraConfig, module: str) -> bool:
    """Whether a module would be adapted, were it not for layers_to_transform."""
    anywhere = replace(s, layers_to_transform=None, layers_pattern=None)
    return bool(s.layers_to_transform) and _is_target(module, anywhere)
