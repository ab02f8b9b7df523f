"""patterns."""

from collections.abc import Collection, Iterable
from time import perf_counter
from typing import Any

import regex

from fastlora.adapters.extras import keeps_lora_away
from fastlora.models.config import LlamaConfig
from fastlora.models.names import base_tensors, former_names, is_mixture, module_names
from fastlora.models.params import PROJECTIONS
from fastlora.models.spec import LoraConfig

# To match all patterns with all names, before they are used: patterns of a file are anybody's, and
# `re`, which has no time limit, takes 2**40 steps for "([a-z.]+)+!" on a name of 40 characters.
# The regex library has one.
_REGEX_SECONDS = 0.5


def first_match(patterns: tuple[tuple[str, Any], ...], path: str, default: Any) -> Any:
    return next((v for key, v in patterns if regex.match(pattern_regex(key), path)), default)


def is_target(module: str, settings: LoraConfig) -> bool:
    targets = settings.target_modules
    if settings.exclude_modules and names_module(settings.exclude_modules, module):
        return False
    if keeps_lora_away(settings.modules_to_save, module):
        return False
    if targets == "all-linear":
        return module.rpartition(".")[2] in PROJECTIONS
    if isinstance(targets, tuple) and module in targets:
        return True  # before the layers are asked: PEFT does not filter a full name by its layer
    return names_module(targets, module) and _in_layers(module, settings)


def names_module(rule: tuple[str, ...] | str, module: str) -> bool:
    """A string is a regular expression for the whole name, a tuple holds names or dotted ends."""
    if isinstance(rule, str):
        return regex.fullmatch(rule, module) is not None
    return any(f".{module}".endswith(f".{end}") for end in rule)


def _in_layers(module: str, settings: LoraConfig) -> bool:
    """Whether the first number after a `layers_pattern` is among `layers_to_transform`."""
    if not settings.layers_to_transform:
        return True
    patterns = settings.layers_pattern or (r"[^.]*",)
    found = (regex.match(layer_regex(p), module) for p in patterns)
    first = next((m for m in found if m), None)
    return first is not None and int(first["idx"]) in settings.layers_to_transform


def pattern_regex(key: str) -> str:
    return rf"(.*\.)?({key})$"


def layer_regex(pattern: str) -> str:
    return rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\."


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


def regex_problems(s: LoraConfig, config: LlamaConfig) -> list[str]:
    """Patterns that are none, or that could not be matched with this model's names in time."""
    if wrong := [p for p in s.layers_pattern or () if regex.search(r"[|(){}?#]", p)]:
        return [f"layers_pattern={wrong!r:.200}: expected names of module lists."]
    patterns = [("rank_pattern", k, pattern_regex(k)) for k, _ in s.rank_pattern]
    patterns += [("alpha_pattern", k, pattern_regex(k)) for k, _ in s.alpha_pattern]
    patterns += [("layers_pattern", p, layer_regex(p)) for p in s.layers_pattern or ()]
    for field in ("target_modules", "exclude_modules"):
        if isinstance(rule := getattr(s, field), str):
            patterns.append((field, rule, rule))
    names, end = module_names(config), perf_counter() + _REGEX_SECONDS
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
