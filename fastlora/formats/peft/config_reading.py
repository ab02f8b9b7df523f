"""config_from_peft(): adapter_config.json -> LoraConfig, or every reason why not.

A field that fastlora does not know is refused, unless its value is null, false or empty: PEFT adds
fields that change the computation, and an adapter must never be loaded with another meaning.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from fastlora.adapters.extras import token_indices
from fastlora.adapters.init.methods import factor_problems
from fastlora.adapters.lora_arguments import MAX_PATTERN_CHARS
from fastlora.adapters.patterns import as_tuple, names_or_regex
from fastlora.adapters.targets import resolve_targets, with_targets
from fastlora.errors import CheckpointError, raise_problems
from fastlora.models.config import LlamaConfig
from fastlora.models.families.registry import family_of
from fastlora.models.spec import LoraConfig
from fastlora.models.wrapped_names import text_name, wrapped_name

_NULL = type(None)


class _Field(NamedTuple):
    """A field of adapter_config.json that is read."""

    default: Any  # PEFT's, for a file without the field
    types: tuple[type, ...]
    item_types: tuple[type, ...] = ()  # of the items of a list, or the values of a dict


_FIELDS = {
    "peft_type": _Field(None, (str,)),
    "task_type": _Field(None, (str, _NULL)),
    "r": _Field(8, (int,)),
    "lora_alpha": _Field(8, (int, float)),
    "lora_dropout": _Field(0.0, (int, float)),
    "target_modules": _Field(None, (list, str, _NULL), (str,)),
    "target_parameters": _Field(None, (list, _NULL), (str,)),
    "exclude_modules": _Field(None, (list, str, _NULL), (str,)),
    "layers_to_transform": _Field(None, (list, int, _NULL), (int,)),
    "layers_pattern": _Field(None, (list, str, _NULL), (str,)),
    "use_rslora": _Field(False, (bool,)),
    "rank_pattern": _Field({}, (dict,), (int,)),
    "alpha_pattern": _Field({}, (dict,), (int, float)),
    "init_lora_weights": _Field(True, (bool, str)),
    "lora_bias": _Field(False, (bool,)),
    "use_dora": _Field(False, (bool,)),
    "bias": _Field("none", (str,)),
    "modules_to_save": _Field(None, (list, _NULL), (str,)),
    "ensure_weight_tying": _Field(False, (bool, _NULL)),
    "trainable_token_indices": _Field(None, (list, dict, _NULL), (int, list)),
}

# Fields without effect on y = W x + scaling * B A x over frozen linear layers. The *_config fields
# only say how A and B were first filled, and PEFT undoes fan_in_fan_out on a Linear itself.
_NEUTRAL_FIELDS = {
    *("auto_mapping", "base_model_name_or_path", "revision", "peft_version", "inference_mode"),
    *("eva_config", "corda_config", "lora_ga_config", "loftq_config", "qalora_group_size"),
    *("megatron_core", "runtime_config", "fan_in_fan_out"),
}

# Values of init_lora_weights that leave the base's weights unchanged.
_NEUTRAL_INITS = (True, False, "gaussian", "orthogonal", "eva", "mica")

# Other values subtract s B0 A0 from the base's weights, and the adapter fits only what is left.
# These two compute the same B0 A0 every time, so loading can repeat it, as PEFT does.
REPEATABLE_INITS = ("pissa", "olora")

# Regex of other inits -> words of the error for their B0 A0, which loading cannot compute again.
_UNREPEATABLE_INITS = {
    r"pissa_niter_\d+": "a randomised decomposition of",
    "loftq": "the quantisation error of",
    "corda": "a decomposition, chosen by data, of",
    "lora_ga": "a decomposition, chosen by gradients, of",
}

# PEFT's classes for these tasks run the causal language model's forward pass.
_TASKS = (None, "CAUSAL_LM", "FEATURE_EXTRACTION")


def config_from_peft(raw: Mapping[str, Any], config: LlamaConfig, file: str) -> LoraConfig:
    """The settings of adapter_config.json, resolved for a model.

    Where rank and alpha patterns overlap, the first match in the file wins, as in PEFT.

    Args:
        raw: the file's JSON object.
        config: the base model's shape.
        file: the file's path, for messages.

    Raises:
        CheckpointError: listing every field that is wrong, unsupported, or does not fit the model.
    """
    problems = _field_problems(raw) + _unsupported(raw, config)
    raise_problems(CheckpointError, f"{file} is not a LoRA that fastlora supports:", problems)
    value = {name: raw.get(name, field.default) for name, field in _FIELDS.items()}
    targets, exclude = value["target_modules"], value["exclude_modules"]
    settings = LoraConfig(
        r=value["r"],
        lora_alpha=value["lora_alpha"],
        lora_dropout=value["lora_dropout"],
        target_modules=names_or_regex(
            family_of(config).default_targets if targets is None else targets
        ),
        exclude_modules=names_or_regex(exclude) if exclude else None,
        layers_to_transform=as_tuple(value["layers_to_transform"]),
        layers_pattern=as_tuple(value["layers_pattern"]),
        use_rslora=value["use_rslora"],
        rank_pattern=tuple(value["rank_pattern"].items()),
        alpha_pattern=tuple(value["alpha_pattern"].items()),
        init_lora_weights=value["init_lora_weights"],
        lora_bias=value["lora_bias"],
        use_dora=value["use_dora"],
        target_parameters=as_tuple(value["target_parameters"]) or (),
        bias=value["bias"],
        modules_to_save=as_tuple(value["modules_to_save"]) or (),
        ensure_weight_tying=bool(value["ensure_weight_tying"]),
        trainable_token_indices=token_indices(value["trainable_token_indices"]),
        targets=(),
    )
    heading = f"{file} does not fit this model:"
    # Not strict: what PEFT ignores with or without a warning is not an error here.
    resolve = partial(resolve_targets, settings, config, heading, error=CheckpointError)
    if config.wrapper is None:
        lora = resolve(strict=False)
    else:
        # The file's names and patterns are for the modules of the whole model; ours have others.
        lora = resolve(strict=False, spoken=wrapped_name)
        copied = tuple(text_name(name) or name for name in lora.modules_to_save)
        lora = replace(with_targets(lora, lora.targets), modules_to_save=copied)
    init = lora.init_lora_weights
    problems = factor_problems(lora, config, init) if init in REPEATABLE_INITS else []
    raise_problems(CheckpointError, heading, problems)
    return lora


def _field_problems(raw: Mapping[str, Any]) -> list[str]:
    """Problems with the types and sizes of fields."""
    problems = []
    for name, field in _FIELDS.items():
        if name not in raw:
            continue
        value = raw[name]
        # First, because looking at each item of a long value takes long. Long patterns would also
        # make matching slow.
        if (size := _text_size(value)) > MAX_PATTERN_CHARS:
            problems.append(f"{name}: {size:,} characters; expected at most {MAX_PATTERN_CHARS:,}.")
            continue
        items = _items(value)
        # Items of items: trainable_token_indices may be a dict of lists.
        deep = [x for item in items if isinstance(item, list) for x in item]
        if type(value) not in field.types or any(type(x) not in field.item_types for x in items):
            problems.append(f"{name}={value!r:.200}: expected {_type_names(field)}.")
        elif any(type(x) is int and abs(x) >= 2**31 for x in (value, *items, *deep)):
            problems.append(f"{name}={value!r:.200}: expected less than 2**31.")
    return problems


def _items(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _type_names(field: _Field) -> str:
    expected = " or ".join("null" if t is _NULL else t.__name__ for t in field.types)
    items = " or ".join(t.__name__ for t in field.item_types)
    return f"{expected} of {items}" if items else expected


def _text_size(value: Any) -> int:
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if not isinstance(value, list):
        return len(value) if isinstance(value, str) else 0
    return len(value) + sum([len(e) for e in value if type(e) is str or type(e) is list])


def _unsupported(raw: Mapping[str, Any], config: LlamaConfig) -> list[str]:
    """Problems with fields whose values fastlora does not support."""
    problems = []
    if (peft_type := raw.get("peft_type")) != "LORA":
        given = f"peft_type={peft_type!r:.200}" if "peft_type" in raw else "peft_type is missing"
        problems.append(f"{given}: only 'LORA' adapters are read.")
    if (task := raw.get("task_type")) not in _TASKS:
        problems.append(f"task_type={task!r:.200}: expected 'CAUSAL_LM'.")
    if (init := raw.get("init_lora_weights", True)) not in _NEUTRAL_INITS + REPEATABLE_INITS:
        problems.append(_init_problem(init))
    no_default = config.wrapper is not None or not family_of(config).peft_has_default
    if raw.get("target_modules") is None and no_default:
        problems.append(
            f"target_modules=None: PEFT has no default for {config.model_type!r}; name them."
        )
    for name in sorted(raw.keys() - _FIELDS.keys() - _NEUTRAL_FIELDS):
        if raw[name] not in (None, False, {}, [], "", "none"):
            problems.append(f"{name}={raw[name]!r:.200}: not in this version of fastlora.")
    return problems


def _init_problem(init: Any) -> str:
    matches = (
        words for regex, words in _UNREPEATABLE_INITS.items() if re.fullmatch(regex, str(init))
    )
    if not (words := next(matches, None)):
        return f"init_lora_weights={init!r:.200}: unknown to fastlora."
    return (
        f"init_lora_weights={init!r:.200}: this adapter belongs to a base from which {words} its"
        " weights was subtracted, and that is not in the folder (PEFT itself loads it wrong)."
        " Convert it where it was trained: save the fresh adapter first, then"
        " peft_model.save_pretrained(folder,"
        " path_initial_model_for_weight_conversion=fresh_folder)."
    )
