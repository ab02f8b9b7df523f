"""config."""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from fastlora.adapters.extras import EDGE_MODULES, token_indices
from fastlora.adapters.init.from_weights import factor_problems
from fastlora.adapters.patterns import as_tuple, names_or_regex
from fastlora.adapters.targets import peft_targets, resolve_targets
from fastlora.errors import CheckpointError, raise_problems
from fastlora.models.config import LlamaConfig
from fastlora.models.names import EMBED_TOKENS, is_mixture, layer_targets, projection_path
from fastlora.models.params import EXPERTS, PROJECTIONS, ROUTER, TARGETS
from fastlora.models.spec import LoraConfig, Spec, Target

# adapter_config.json, what is read of it: field -> PEFT's default where it is absent, types, types
# of what a list or dict holds.
_NULL = type(None)

_FIELDS: dict[str, tuple[Any, tuple[type, ...], tuple[type, ...]]] = {
    "peft_type": (None, (str,), ()),
    "task_type": (None, (str, _NULL), ()),
    "r": (8, (int,), ()),
    "lora_alpha": (8, (int, float), ()),
    "lora_dropout": (0.0, (int, float), ()),
    "target_modules": (None, (list, str, _NULL), (str,)),
    "target_parameters": (None, (list, _NULL), (str,)),
    "exclude_modules": (None, (list, str, _NULL), (str,)),
    "layers_to_transform": (None, (list, int, _NULL), (int,)),
    "layers_pattern": (None, (list, str, _NULL), (str,)),
    "use_rslora": (False, (bool,), ()),
    "rank_pattern": ({}, (dict,), (int,)),
    "alpha_pattern": ({}, (dict,), (int, float)),
    "init_lora_weights": (True, (bool, str), ()),
    "lora_bias": (False, (bool,), ()),
    "use_dora": (False, (bool,), ()),
    "bias": ("none", (str,), ()),
    "modules_to_save": (None, (list, _NULL), (str,)),
    "ensure_weight_tying": (False, (bool, _NULL), ()),
    "trainable_token_indices": (None, (list, dict, _NULL), (int, list)),
}


# Fields that change nothing in y = W x + scaling * B A x over frozen linear layers. The *_config
# ones only say how A and B were first filled; PEFT itself undoes fan_in_fan_out on a Linear.
_NEUTRAL = {
    *("auto_mapping", "base_model_name_or_path", "revision", "peft_version", "inference_mode"),
    *("eva_config", "corda_config", "lora_ga_config", "loftq_config", "qalora_group_size"),
    *("megatron_core", "runtime_config", "fan_in_fan_out"),
}


# Ways of filling A and B that leave the base alone.
_KIND_INITS = (True, False, "gaussian", "orthogonal", "eva", "mica")


# Others subtract from the base's weights, and the adapter is only right over what they left. These
# subtract the same every time, so that it can be found again, as PEFT does when it loads.
REPEATABLE_INITS = ("pissa", "olora")


# Why it cannot be with the rest.
_UNREPEATABLE = {
    r"pissa_niter_\d+": "a randomised decomposition of",
    "loftq": "what a quantised copy lost of",
    "corda": "what data said about",
    "lora_ga": "what gradients said about",
}


# The forward of these PEFT classes is the causal language model's.
_TASKS = (None, "CAUSAL_LM", "FEATURE_EXTRACTION")


def peft_config(spec: Spec, lora: LoraConfig) -> dict[str, Any]:
    """adapter_config.json: what the adapter is, not how the user's patterns were spelled.

    PEFT writes its JSON with sorted keys but reads patterns in file order, so overlapping patterns
    change their meaning on the way (peft 0.21.2: ranks that no longer load, scalings off in
    silence). The resolved targets are written instead, and their patterns never overlap.
    `init_lora_weights` is true, because A and B count from the base as it is: with any other PEFT
    would move the base once more.
    """
    parameters = _target_names(spec.config, lora, parameters=True)
    indices = _token_indices(lora)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": spec.name_or_path,
        "revision": None,
        "inference_mode": True,
        "r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "bias": lora.bias,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": lora.use_rslora,
        "use_dora": lora.use_dora,
        "target_modules": _target_names(spec.config, lora, parameters=False),
        "modules_to_save": _modules_to_save(lora),
        "rank_pattern": _patterns(spec.config, lora, lambda t: t.r, lora.r),
        "alpha_pattern": _patterns(spec.config, lora, lambda t: t.lora_alpha, lora.lora_alpha),
        "layers_to_transform": None,
        "layers_pattern": None,
        # Only where it is used: to older PEFT every unknown field is a warning.
        **({"lora_bias": True} if lora.lora_bias else {}),
        **({"target_parameters": parameters} if parameters else {}),
        **({"ensure_weight_tying": True} if lora.extras.tied else {}),
        **({"trainable_token_indices": indices} if indices else {}),
    }


def _modules_to_save(lora: LoraConfig) -> list[str] | None:
    """As given; of a tied pair with one copy the embedding, as PEFT has it."""
    names = list(lora.modules_to_save)
    if lora.extras.tied and EMBED_TOKENS in lora.extras.replaced:
        names = [n for n in names if not any(m.endswith(n) for m in EDGE_MODULES)]
        names.append("model.embed_tokens")
    return names or None


def _token_indices(lora: LoraConfig) -> list[int] | dict[str, list[int]]:
    given = lora.trainable_token_indices
    if given and isinstance(given[0], tuple):
        return {name: list(ids) for name, ids in given}
    return list(given)


def edge_targets(lora: LoraConfig) -> dict[str, Target]:
    """Module name -> target, of embedding and head. Of a tied pair both, though one is written."""
    found = {module: getattr(lora.extras, end) for module, end in EDGE_MODULES.items()}
    return {module: target for module, target in found.items() if target is not None}


def targets_by_name(lora: LoraConfig) -> dict[str, dict[int, Target]]:
    """Projection name -> layer -> target, without the names that carry no adapter."""
    named = {
        name: {i: t for i, ts in enumerate(lora.targets) for t in ts if t.name == name}
        for name in TARGETS
    }
    return {name: layers for name, layers in named.items() if layers}


def _parameter(config: LlamaConfig, name: str) -> str | None:
    """The end of the parameter that PEFT must be told to adapt; None for what it takes as a module.

    In a mixture of experts it takes the dense MLP's names for experts'.
    """
    if name in EXPERTS:
        return name
    of_mlp = name == ROUTER or (is_mixture(config) and PROJECTIONS[name] == "mlp")
    return f"{name}.weight" if of_mlp else None


def _target_names(config: LlamaConfig, lora: LoraConfig, *, parameters: bool) -> list[str]:
    """A bare name where every layer that has the target carries it, else one full name per layer.

    Those of modules, or with `parameters` those of parameters.
    """
    having = Counter(n for i in range(len(lora.targets)) for n in layer_targets(config, i))
    names = []
    for name, layers in targets_by_name(lora).items():
        parameter = _parameter(config, name)
        if (parameter is not None) != parameters:
            continue
        short = parameter or name
        everywhere = len(layers) == having[name]
        full = [_full_name(i, name, short) for i in layers]
        names += [short] if everywhere else full
    ends = [m for m in edge_targets(lora) if not (lora.extras.tied and m == "lm_head")]
    return names + ([] if parameters else ends)


def _full_name(layer: int, name: str, short: str) -> str:
    return projection_path(layer, name).removesuffix(name) + short


def _patterns(
    config: LlamaConfig, lora: LoraConfig, value: Callable[[Target], Any], default: Any
) -> dict[str, Any]:
    """Pattern -> value, for what differs from the default; no two match the same module.

    Full names without "model.", as old PEFT wants a dot before the pattern (peft issue 2194).
    """
    patterns = {}
    for name, layers in targets_by_name(lora).items():
        short = _parameter(config, name) or name
        values = {i: value(t) for i, t in layers.items()}
        if len(set(values.values())) == 1:
            values = {re.escape(short): next(iter(values.values()))}
        else:
            full = {i: _full_name(i, name, short).removeprefix("model.") for i in values}
            values = {re.escape(full[i]): v for i, v in values.items()}
        patterns |= {key: v for key, v in values.items() if v != default}
    ends = {re.escape(m.removeprefix("model.")): value(t) for m, t in edge_targets(lora).items()}
    return patterns | {key: v for key, v in ends.items() if v != default}


def config_from_peft(raw: Mapping[str, Any], config: LlamaConfig, where: str) -> LoraConfig:
    """adapter_config.json's dict as settings, resolved for a model; patterns in the file's order.

    Args:
        raw: the file's content. A field that fastlora does not know is no matter while it is null,
            false or empty.
        config: the base model's shape.
        where: the file's name, for the message.

    Raises:
        CheckpointError: listing every field that is wrong or not represented.
    """
    problems = _field_problems(raw) + _refusals(raw, config)
    raise_problems(CheckpointError, f"{where} is no LoRA that fastlora can represent:", problems)
    value = {field: raw.get(field, default) for field, (default, _, _) in _FIELDS.items()}
    targets, exclude = value["target_modules"], value["exclude_modules"]
    settings = LoraConfig(
        r=value["r"],
        lora_alpha=value["lora_alpha"],
        lora_dropout=value["lora_dropout"],
        target_modules=peft_targets(config) if targets is None else names_or_regex(targets),
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
    heading = f"{where} does not fit this model:"
    lora = resolve_targets(settings, config, heading, error=CheckpointError, strict=False)
    init = lora.init_lora_weights
    problems = factor_problems(lora, config, init) if init in REPEATABLE_INITS else []
    raise_problems(CheckpointError, heading, problems)
    return lora


def _field_problems(raw: Mapping[str, Any]) -> list[str]:
    problems = []
    for field, (_, types, elements) in _FIELDS.items():
        if field not in raw:
            continue
        value = raw[field]
        inner = (
            list(value.values() if isinstance(value, dict) else value)
            if (isinstance(value, list | dict))
            else []
        )
        deep = [e for item in inner if isinstance(item, list) for e in item]
        if type(value) not in types or any(type(e) not in elements for e in inner):
            expected = " or ".join("null" if t is _NULL else t.__name__ for t in types)
            of = f" of {' or '.join(t.__name__ for t in elements)}" if elements else ""
            problems.append(f"{field}={value!r:.200}: expected {expected}{of}.")
        elif any(type(e) is int and abs(e) >= 2**31 for e in (value, *inner, *deep)):
            problems.append(f"{field}={value!r:.200}: expected less than 2**31.")
        elif (size := _text_size(value)) > _MAX_TEXT_CHARS:
            problems.append(f"{field}: {size:,} characters; expected at most {_MAX_TEXT_CHARS:,}.")
    return problems


# All 882 projections of Llama 3.1 405B by their full names are 35,000 characters.
_MAX_TEXT_CHARS = 100_000


def _text_size(value: Any) -> int:
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if not isinstance(value, list):
        return len(value) if isinstance(value, str) else 0
    return len(value) + sum(len(e) for e in value if isinstance(e, str | list))


def _refusals(raw: Mapping[str, Any], config: LlamaConfig) -> list[str]:
    problems = []
    if (kind := raw.get("peft_type")) != "LORA":
        given = f"peft_type={kind!r:.200}" if "peft_type" in raw else "peft_type is missing"
        problems.append(f"{given}: only 'LORA' adapters are read.")
    if (task := raw.get("task_type")) not in _TASKS:
        problems.append(f"task_type={task!r:.200}: expected 'CAUSAL_LM'.")
    if (init := raw.get("init_lora_weights", True)) not in _KIND_INITS + REPEATABLE_INITS:
        problems.append(_init_refusal(init))
    if raw.get("target_modules") is None and config.model_type == "smollm3":
        problems.append("target_modules=None: PEFT has no default for 'smollm3'; name them.")
    for field in sorted(raw.keys() - _FIELDS.keys() - _NEUTRAL):
        if raw[field] not in (None, False, {}, [], "", "none"):
            problems.append(f"{field}={raw[field]!r:.200}: not in this version of fastlora.")
    return problems


def _init_refusal(init: Any) -> str:
    reasons = (why for kind, why in _UNREPEATABLE.items() if re.fullmatch(kind, str(init)))
    if not (why := next(reasons, None)):
        return f"init_lora_weights={init!r:.200}: unknown to fastlora."
    return (
        f"init_lora_weights={init!r:.200}: this adapter counts from a base that lacks {why} its"
        " weights, which is not in the folder (PEFT itself loads it wrong). Convert it where it was"
        " trained: save the fresh adapter first, then peft_model.save_pretrained(folder,"
        " path_initial_model_for_weight_conversion=fresh_folder)."
    )
