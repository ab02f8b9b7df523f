"""How names, dotted ends and regular expressions match modules, by PEFT's rules."""

from collections.abc import Collection, Iterable
from time import perf_counter
from typing import Any

import regex

from fastlora.adapters.extras import keeps_lora_away
from fastlora.models.config import LlamaConfig
from fastlora.models.names import base_tensors, is_mixture, legacy_expert_names, module_names
from fastlora.models.params import LINEARS
from fastlora.models.spec import LoraConfig

# Time limit for matching all patterns with all names, before they are used. A file may hold any
# pattern: "([a-z.]+)+!" takes 2**40 steps on a name of 40 characters. The standard library's `re`
# has no time limit; the regex library has.
_REGEX_SECONDS = 0.5


def first_match(patterns: tuple[tuple[str, Any], ...], path: str, default: Any) -> Any:
    """The value of the first pattern of `rank_pattern` or `alpha_pattern` that matches a name."""
    return next((v for key, v in patterns if regex.match(pattern_regex(key), path)), default)


def is_target(module: str, settings: LoraConfig) -> bool:
    """Whether `target_modules` and its filters choose a module."""
    targets = settings.target_modules
    if settings.exclude_modules and names_module(settings.exclude_modules, module):
        return False
    if keeps_lora_away(settings.modules_to_save, module):
        return False
    if targets == "all-linear":
        return module.rpartition(".")[2] in LINEARS
    if isinstance(targets, tuple) and module in targets:
        return True  # PEFT does not filter a full name by its layer
    return names_module(targets, module) and _in_layers(module, settings)


def names_module(rule: tuple[str, ...] | str, module: str) -> bool:
    """Whether a rule matches: a regex for the whole name, or a tuple of names and dotted ends."""
    if isinstance(rule, str):
        return regex.fullmatch(rule, module) is not None
    return any(f".{module}".endswith(f".{end}") for end in rule)


def _in_layers(module: str, settings: LoraConfig) -> bool:
    """Whether the first number after a `layers_pattern` is in `layers_to_transform`."""
    if not settings.layers_to_transform:
        return True
    patterns = settings.layers_pattern or (r"[^.]*",)
    matches = (regex.match(layer_regex(p), module) for p in patterns)
    first = next((m for m in matches if m), None)
    return first is not None and int(first["idx"]) in settings.layers_to_transform


def pattern_regex(key: str) -> str:
    """The regex of a key of `rank_pattern` or `alpha_pattern`: it matches a name's dotted end."""
    return rf"(.*\.)?({key})$"


def layer_regex(pattern: str) -> str:
    """The regex whose group "idx" is the layer's index after a `layers_pattern`."""
    return rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\."


def as_tuple(value: Collection[Any] | str | int | None) -> tuple[Any, ...] | None:
    """A collection as a tuple, a set in sorted order; one name or number as a tuple of one."""
    if value is None:
        return None
    if isinstance(value, str | int):
        return (value,)
    return tuple(sorted(value)) if isinstance(value, set | frozenset) else tuple(value)


def names_or_regex(value: Collection[str] | str) -> tuple[str, ...] | str:
    """A collection as a tuple; a string unchanged, except that "all-linear" is in lower case."""
    if isinstance(value, str):
        return value.lower() if value.lower() == "all-linear" else value
    return as_tuple(value) or ()


def regex_problems(s: LoraConfig, config: LlamaConfig) -> list[str]:
    """Patterns that are not regular expressions, or that take too long on this model's names."""
    if wrong := [p for p in s.layers_pattern or () if regex.search(r"[|(){}?#]", p)]:
        return [f"layers_pattern={wrong!r:.200}: expected names of module lists"]
    patterns = [("rank_pattern", k, pattern_regex(k)) for k, _ in s.rank_pattern]
    patterns += [("alpha_pattern", k, pattern_regex(k)) for k, _ in s.alpha_pattern]
    patterns += [("layers_pattern", p, layer_regex(p)) for p in s.layers_pattern or ()]
    for field in ("target_modules", "exclude_modules"):
        if isinstance(rule := getattr(s, field), str):
            patterns.append((field, rule, rule))
    names, deadline = module_names(config), perf_counter() + _REGEX_SECONDS
    if is_mixture(config) or s.target_parameters:
        names += [*base_tensors(config), *legacy_expert_names(config)]
    problems = []
    for field, given, pattern in patterns:
        # Skip patterns without repetition: there may be 882 full names (Llama 3.1 405B).
        repeats = regex.search(r"[*+?{(]", given) is not None
        if problem := _matching_problem(pattern, names if repeats else (), deadline):
            problems.append(f"{field}: {given!r:.200} {problem}")
    return problems


def _matching_problem(pattern: str, names: Iterable[str], deadline: float) -> str:
    """What goes wrong when a pattern is matched with all names; "" if nothing does."""
    try:
        compiled = regex.compile(pattern)
        for name in names:
            compiled.fullmatch(name, timeout=max(deadline - perf_counter(), 1e-3))
    except TimeoutError:
        return "takes too long to match; list names instead"
    except (regex.error, RecursionError, OverflowError, MemoryError) as error:
        return f"is not a regular expression: {error}"
    return ""
