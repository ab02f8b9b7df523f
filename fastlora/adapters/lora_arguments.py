"""The arguments of lora(): each with its rule, and as the LoraConfig that they mean."""

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from fastlora.adapters.extras import BIAS, token_indices
from fastlora.adapters.init.methods import INIT
from fastlora.adapters.parked_originals import DEFAULT_PARKING_FOLDER
from fastlora.adapters.patterns import as_tuple, names_or_regex
from fastlora.arguments import (
    FLAG,
    PATH,
    RANDOM_SEED,
    TEXT,
    Rule,
    argument_problems,
    int_list,
    number,
    one_of,
    optional,
    setting,
    setting_problems,
    whole_number,
)
from fastlora.models.config import LlamaConfig
from fastlora.models.families.registry import family_of
from fastlora.models.input_checks import SPEC_CHOICES
from fastlora.models.names import linear_names
from fastlora.models.params import DTYPES, PROJECTIONS
from fastlora.models.spec import LoraConfig, Recompute
from fastlora.ops.quant.fake_quantize import SCHEMES

# No model is as wide as the bound; a rank of 10**9 would fill the memory before anything fails.
RANK = whole_number(1, 2**16)
# Scalings are multiplied in float32, whose largest number is 3.4e38.
ALPHA = number(low=-3e38, high=3e38)
DROPOUT = number(low=0, high=1)  # PEFT's files may hold 1; lora() refuses it

# The default of `recompute`. It equals every other "selective", but is a separate object, so that
# `is` tells the default from a text that the user gave.
DEFAULT_RECOMPUTE: Recompute = str(b"selective", "ascii")  # pyright: ignore[reportAssignmentType]

# use_gradient_checkpointing -> recompute.
_POLICY_OF_CHECKPOINTING: dict[bool | str, Recompute] = {
    False: "none",
    True: "full",
    "unsloth": "selective",
}


# Longer texts would make matching slow. The names of all 882 projections of Llama 3.1 405B have
# 35,000 characters.
MAX_PATTERN_CHARS = 100_000
_MAX_ELEMENTS = 1_000_000  # of a list of layers or of token ids


def _elements(value: Any) -> list[Any] | None:
    """The elements of a list, tuple, set or array; None for other values and for endless lists.

    Iterators are refused, because checking them would use them up.
    """
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Collection):
        return None
    try:
        return list(value) if len(value) <= _MAX_ELEMENTS else None
    except TypeError:  # a tensor without dimensions is a Collection to isinstance
        return None


def _are_texts(value: Any) -> bool:
    elements = _elements(value)
    if elements is None or not all(map(TEXT.accepts, elements)):
        return False
    return sum(map(len, elements)) <= MAX_PATTERN_CHARS


def _is_short_text(value: Any) -> bool:
    return TEXT.accepts(value) and len(value) <= MAX_PATTERN_CHARS


def _are_layers(value: Any) -> bool:
    if _elements(value) is None:
        return False
    layers = int_list(value)  # returns a list with other elements unchanged
    return type(layers) is list and all(type(x) is int for x in layers)


def _are_token_ids(value: Any) -> bool:
    collections = value.values() if isinstance(value, Mapping) else [value]
    return all(_elements(ids) is not None for ids in collections)


def _is_pattern_mapping(value: Any) -> bool:
    # Values are checked by lora_setting_problems, which names the pattern.
    return isinstance(value, Mapping) and _are_texts(list(value))


_SHORT = f", at most {MAX_PATTERN_CHARS:,} characters"
_TEXTS = Rule(_are_texts, f"a list of names{_SHORT}")
_NAMES = optional(
    Rule(lambda x: _is_short_text(x) or _are_texts(x), f"a name or a list of names{_SHORT}")
)
_NAMES_OR_REGEX = optional(
    Rule(
        lambda x: _is_short_text(x) or _are_texts(x),
        f"a list of module names, or a regular expression as text{_SHORT}",
    )
)
_LAYERS = optional(
    Rule(lambda x: type(x) is int or _are_layers(x), "a layer's index or a list of them")
)
_PATTERNS = optional(Rule(_is_pattern_mapping, f"a dict of regular expression -> value{_SHORT}"))
_TOKEN_IDS = Rule(
    lambda x: x is None or _are_token_ids(x),
    "a list of ids, a dict such as {'embed_tokens': ids}, or None",
)
_CHECKPOINTING = Rule(
    lambda x: x is None or type(x) is bool or (isinstance(x, str) and x == "unsloth"),
    "None, True, False or 'unsloth'; or use recompute",
)
_DTYPE = Rule(
    lambda x: isinstance(x, str | torch.dtype) and str(x).removeprefix("torch.") in DTYPES,
    f"one of {list(DTYPES)}, or a torch.dtype of such a name",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraArguments:
    """The arguments of `lora` except `model` and `loftq_config`, under the same names."""

    r: int = setting(RANK, 16)
    target_modules: Collection[str] | str | None = setting(_NAMES_OR_REGEX, tuple(PROJECTIONS))
    lora_alpha: float = setting(ALPHA, 16)
    lora_dropout: float = setting(DROPOUT, 0.0)
    bias: str = setting(BIAS, "none")
    layers_to_transform: Collection[int] | int | None = setting(_LAYERS, None)
    layers_pattern: Collection[str] | str | None = setting(_NAMES, None)
    use_gradient_checkpointing: bool | str | None = setting(_CHECKPOINTING, None)
    random_state: int = setting(RANDOM_SEED, 3407)
    max_seq_length: int | None = setting(optional(whole_number(1)), None)
    use_rslora: bool = setting(FLAG, False)
    modules_to_save: Collection[str] | str | None = setting(_NAMES, None)
    init_lora_weights: bool | str = setting(INIT, True)
    temporary_location: str | os.PathLike[str] = setting(PATH, DEFAULT_PARKING_FOLDER)
    qat_scheme: str | None = setting(optional(one_of(*SCHEMES)), None)
    target_parameters: Collection[str] | None = setting(optional(_TEXTS), None)
    ensure_weight_tying: bool = setting(FLAG, False)
    recompute: Recompute = setting(SPEC_CHOICES["recompute"], DEFAULT_RECOMPUTE)
    use_dora: bool = setting(FLAG, False)
    lora_bias: bool = setting(FLAG, False)
    rank_pattern: Mapping[str, int] | None = setting(_PATTERNS, None)
    alpha_pattern: Mapping[str, float] | None = setting(_PATTERNS, None)
    exclude_modules: Collection[str] | str | None = setting(_NAMES_OR_REGEX, None)
    finetune_last_n_layers: int | None = setting(optional(whole_number(1)), None)
    trainable_token_indices: Collection[Any] | Mapping[str, Collection[Any]] | None = setting(
        _TOKEN_IDS, None
    )
    adapter_dtype: str | torch.dtype = setting(_DTYPE, "float32")

    @property
    def recompute_policy(self) -> Recompute | None:
        """The policy that `recompute` or `use_gradient_checkpointing` names; None if none does."""
        if self.use_gradient_checkpointing is None:
            return None if self.recompute is DEFAULT_RECOMPUTE else self.recompute
        return _POLICY_OF_CHECKPOINTING[self.use_gradient_checkpointing]


def checked_arguments(arguments: LoraArguments) -> tuple[LoraArguments, list[str]]:
    """(arguments that later checks can work with, problems).

    An argument that breaks its rule is reported, and replaced by its default, so that the other
    arguments can still be checked in the same call.
    """
    problems, defaults = [], {}
    for f in fields(arguments):
        if wrong := setting_problems(arguments, [f.name]):
            problems += wrong
            # The default is valid, so the checks that follow need no second check of this value.
            defaults[f.name] = f.default
    return replace(arguments, **defaults), problems


def lora_settings(arguments: LoraArguments, config: LlamaConfig) -> LoraConfig:
    """The same choices as a LoraConfig, whose collections are tuples; `targets` is still empty."""
    modules, exclude = arguments.target_modules, arguments.exclude_modules
    return LoraConfig(
        r=arguments.r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=_target_modules(modules, config),
        exclude_modules=names_or_regex(exclude) if exclude is not None and len(exclude) else None,
        layers_to_transform=_layers(arguments, config.num_hidden_layers),
        layers_pattern=as_tuple(arguments.layers_pattern),
        use_rslora=arguments.use_rslora,
        rank_pattern=tuple((arguments.rank_pattern or {}).items()),
        alpha_pattern=tuple((arguments.alpha_pattern or {}).items()),
        init_lora_weights=arguments.init_lora_weights,
        lora_bias=arguments.lora_bias,
        use_dora=arguments.use_dora,
        target_parameters=as_tuple(arguments.target_parameters) or (),
        qat_scheme=arguments.qat_scheme,
        bias=arguments.bias,
        modules_to_save=as_tuple(arguments.modules_to_save) or (),
        ensure_weight_tying=arguments.ensure_weight_tying,
        trainable_token_indices=token_indices(arguments.trainable_token_indices),
        targets=(),
    )


def _target_modules(
    modules: Collection[str] | str | None, config: LlamaConfig
) -> tuple[str, ...] | str:
    """`target_modules` as LoraConfig has it."""
    if modules is None:
        modules = family_of(config).default_targets
    rule = names_or_regex(modules)
    # The default of lora() names Llama's seven layers, of which this model has fused ones.
    if isinstance(rule, tuple) and set(rule) == set(PROJECTIONS):
        own = linear_names(config)
        return rule if set(own) == set(PROJECTIONS) else own
    return rule


def _layers(arguments: LoraArguments, n: int) -> tuple[int, ...] | None:
    """The indices of layers_to_transform, or of the last layers of n."""
    # More layers than the model has are reported by refusals.py; here they mean all.
    if (last := arguments.finetune_last_n_layers) is not None:
        return tuple(range(max(n - last, 0), n))
    layers = as_tuple(arguments.layers_to_transform)
    return None if layers is None else tuple(int_list(layers))


def lora_setting_problems(s: LoraConfig) -> list[str]:
    """Problems with values of settings that come from arguments or from PEFT's file."""
    ranks = {"r": s.r} | {f"rank_pattern[{k!r}]": v for k, v in s.rank_pattern}
    alphas = {"lora_alpha": s.lora_alpha} | {f"alpha_pattern[{k!r}]": v for k, v in s.alpha_pattern}
    rules = dict.fromkeys(ranks, RANK) | dict.fromkeys(alphas, ALPHA)
    problems = argument_problems(
        {name: (value, rules[name]) for name, value in (ranks | alphas).items()}
        | {"lora_dropout": (s.lora_dropout, DROPOUT), "bias": (s.bias, BIAS)}
    )
    # PEFT raises here too (peft 0.21.2, tuners/lora/config.py, __post_init__).
    if isinstance(s.target_modules, str) and (s.layers_to_transform or s.layers_pattern):
        problems.append(
            "layers_to_transform, layers_pattern and finetune_last_n_layers only filter a list, but"
            f" target_modules is the string {s.target_modules!r}; list the projections instead"
        )
    if s.layers_pattern and s.layers_to_transform is None:
        problems.append(f"layers_pattern={s.layers_pattern} needs layers_to_transform beside it")
    return problems
