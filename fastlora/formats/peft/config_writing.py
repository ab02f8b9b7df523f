"""peft_config(): LoraConfig -> adapter_config.json, in terms that PEFT cannot misread."""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

from fastlora.adapters.extras import EDGE_MODULES
from fastlora.models.config import LlamaConfig
from fastlora.models.names import (
    EMBED_TOKENS,
    is_mixture,
    layer_targets,
    module_names,
    projection_path,
)
from fastlora.models.params import EXPERTS, LINEARS, ROUTER, TARGETS
from fastlora.models.spec import LoraConfig, Spec, Target
from fastlora.models.wrapped_names import OTHER_MODULES, wrapped_name

# The version whose fields are written. An older PEFT ignores fields that it does not know, with a
# warning (PeftConfigMixin.from_peft_type).
PEFT_VERSION = "0.21.2"

# PEFT's defaults of the fields that fastlora does not use, so that a file has all of them.
_PEFT_DEFAULTS = {
    "peft_version": PEFT_VERSION,
    "auto_mapping": None,
    "exclude_modules": None,
    "layer_replication": None,
    "alora_invocation_tokens": None,
    "loftq_config": {},
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "qalora_group_size": 16,
    "use_qalora": False,
    "use_bdlora": None,
    **{
        f"{name}_config": None
        for name in ("arrow", "corda", "eva", "kasa", "lora_ga", "monteclora", "velora")
    },
}


def peft_config(spec: Spec, lora: LoraConfig) -> dict[str, Any]:
    """The JSON object of adapter_config.json: the resolved targets, not the user's patterns.

    PEFT writes its JSON with sorted keys but reads patterns in file order, so overlapping patterns
    change their meaning (peft 0.21.2: ranks that no longer load, scalings silently wrong). The
    patterns written here never overlap.

    `init_lora_weights` is true because the adapter is relative to the checkpoint's weights: with
    "pissa", for example, PEFT would subtract factors from them when it loads.
    """
    parameters = _target_names(spec.config, lora, parameters=True)
    indices = _token_indices(lora)
    # Bare names match modules of a vision tower too.
    others = {} if spec.config.wrapper is None else {"exclude_modules": OTHER_MODULES}
    return (
        _PEFT_DEFAULTS
        | others
        | {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": spec.name_or_path or None,
            "revision": spec.revision,
            # PEFT's save_pretrained writes true; is_trainable=True of from_pretrained overrides it.
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
            "modules_to_save": _modules_to_save(spec.config, lora),
            "rank_pattern": _patterns(spec.config, lora, lambda t: t.r, lora.r),
            "alpha_pattern": _patterns(spec.config, lora, lambda t: t.lora_alpha, lora.lora_alpha),
            # The target names already say which layers are adapted.
            "layers_to_transform": None,
            "layers_pattern": None,
            "lora_bias": lora.lora_bias,
            "target_parameters": parameters or None,
            "ensure_weight_tying": bool(lora.extras.tied),
            "trainable_token_indices": indices or None,
        }
    )


def _in_peft(config: LlamaConfig, module: str) -> str:
    """A module's name in the model that PEFT adapts."""
    return module if config.wrapper is None else wrapped_name(module)


def _modules_to_save(config: LlamaConfig, lora: LoraConfig) -> list[str] | None:
    """The user's names. As in PEFT, a tied pair with one trained copy is named by the embedding.

    Of a text model beside a vision tower, the full names of the modules: the user's ends of names
    may match modules of the tower.
    """
    names = list(lora.modules_to_save)
    if lora.extras.tied and EMBED_TOKENS in lora.extras.replaced:
        names = [n for n in names if not any(m.endswith(n) for m in EDGE_MODULES)]
        names.append("model.embed_tokens")
    if config.wrapper is not None:
        names = [_in_peft(config, m) for m in module_names(config) if m.endswith((*names, " "))]
    return names or None


def _token_indices(lora: LoraConfig) -> list[int] | dict[str, list[int]]:
    given = lora.trainable_token_indices
    if given and isinstance(given[0], tuple):
        return {name: list(ids) for name, ids in given}
    return list(given)


def edge_targets(lora: LoraConfig) -> dict[str, Target]:
    """Module name -> target, of embedding and head. Both are listed for a tied pair."""
    targets = {module: getattr(lora.extras, key) for module, key in EDGE_MODULES.items()}
    return {module: target for module, target in targets.items() if target is not None}


def targets_by_name(lora: LoraConfig) -> dict[str, dict[int, Target]]:
    """Projection name -> layer -> target, for the projections that any layer adapts.

    ((Target("q_proj"), Target("v_proj")), (Target("q_proj"),))
    -> {"q_proj": {0: Target, 1: Target}, "v_proj": {0: Target}}
    """
    by_name = {
        name: {i: t for i, ts in enumerate(lora.targets) for t in ts if t.name == name}
        for name in TARGETS
    }
    return {name: layers for name, layers in by_name.items() if layers}


def _parameter(config: LlamaConfig, name: str) -> str | None:
    """The last part of the parameter's name, for a target that PEFT must adapt as a parameter.

    None for targets that PEFT adapts as modules. In a mixture of experts the dense MLP's targets
    are parameters too, because PEFT takes their module names for experts'.
    """
    if name in EXPERTS:
        return name
    of_mlp = name == ROUTER or (is_mixture(config) and LINEARS[name] == "mlp")
    return f"{name}.weight" if of_mlp else None


def _target_names(config: LlamaConfig, lora: LoraConfig, *, parameters: bool) -> list[str]:
    """Names for target_modules, or for target_parameters if `parameters` is True.

    The bare name if every layer that has the projection adapts it, else one full name per layer.
    """
    layers_with = Counter(n for i in range(len(lora.targets)) for n in layer_targets(config, i))
    names = []
    for name, layers in targets_by_name(lora).items():
        parameter = _parameter(config, name)
        if (parameter is not None) != parameters:
            continue
        short = parameter or name
        # A bare name in target_modules matches every layer that has the projection.
        everywhere = len(layers) == layers_with[name]
        full = lambda i, name=name, short=short: _in_peft(config, _full_name(i, name, short))
        names += [short] if everywhere else [full(i) for i in layers]
    if parameters:
        return names
    # Of a tied pair only the embedding is named; ensure_weight_tying adds the head.
    edges = [m for m in edge_targets(lora) if not (lora.extras.tied and m == "lm_head")]
    return names + [_in_peft(config, m) for m in edges]


def _full_name(layer: int, name: str, short: str) -> str:
    return projection_path(layer, name).removesuffix(name) + short


def _patterns(
    config: LlamaConfig, lora: LoraConfig, value: Callable[[Target], Any], default: Any
) -> dict[str, Any]:
    """Pattern -> value, for the targets whose value differs from the default.

    No two patterns match the same module. Full names are written without "model.", because older
    PEFT needs a dot before the part that the pattern matches (peft issue 2194).
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
    edges = {re.escape(m.removeprefix("model.")): value(t) for m, t in edge_targets(lora).items()}
    return patterns | {key: v for key, v in edges.items() if v != default}
