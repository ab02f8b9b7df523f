"""settings."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastlora.adapters.init.from_weights import OF_DATA, factor_problems, start_from_factors
from fastlora.models.names import projection_path, projection_shape
from fastlora.models.params import BiasedLoRA, LoRA
from fastlora.models.spec import LoraConfig, Target
from fastlora.models.state import ModelState, StateT


@dataclass(frozen=True, slots=True, kw_only=True)
class InitSettings:
    """The arguments of `initialize` beyond model, batches and method, with PEFT's defaults."""

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    whiten: bool = False
    adjust_scaling_factors: bool = True
    corda_method: str = "ipm"
    direction: str = "ArB2r"
    scale: str = "stable"
    stable_gamma: float = 16
    random_state: int = 3407


def lora_config(model: ModelState) -> LoraConfig:
    assert model.spec.lora is not None, model.spec
    return model.spec.lora


def max_components(target: Target, choices: InitSettings) -> int:
    return round(target.r * choices.rho)


def has_started(model: StateT, found: Sequence[Mapping[str, LoRA]], init: str) -> StateT:
    assert model.adapter is not None
    base, adapter = start_from_factors(model.base, model.adapter, found)
    spec = replace(model.spec, lora=replace(lora_config(model), init_lora_weights=init))
    return replace(model, spec=spec, base=base, adapter=adapter)


# ── what cannot be ────────────────────────────────────────────────────────────────────────
_TAKES = {
    "eva": ("rho", "tau", "use_label_mask", "whiten", "adjust_scaling_factors"),
    "corda": ("corda_method",),
    "lora_ga": ("direction", "scale", "stable_gamma", "random_state"),
}

_number = lambda x: type(x) in (int, float)


# Argument -> whether a value can be, and what was expected.
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "rho": (lambda x: _number(x) and 1 <= x < float("inf"), "a number of at least 1"),
    "tau": (lambda x: _number(x) and 0 <= x <= 1, "a number in [0, 1]"),
    "use_label_mask": (lambda x: type(x) is bool, "True or False"),
    "whiten": (lambda x: type(x) is bool, "True or False"),
    "adjust_scaling_factors": (lambda x: type(x) is bool, "True or False"),
    "corda_method": (lambda x: x in ("ipm", "kpm"), "'ipm' or 'kpm'"),
    "direction": (
        lambda x: x in ("ArBr", "A2rBr", "ArB2r", "random"),
        "'ArBr', 'A2rBr', 'ArB2r' or 'random'",
    ),
    "scale": (
        lambda x: x in ("stable", "weight_svd", "gd_scale", "unit"),
        "'stable', 'weight_svd', 'gd_scale' or 'unit'",
    ),
    "stable_gamma": (lambda x: _number(x) and 0 < x < float("inf"), "a number above 0"),
    # What torch.Generator takes.
    "random_state": (lambda x: type(x) is int and 0 <= x < 2**64, "an integer in [0, 2**64)"),
}


def choice_problems(method: str, choices: InitSettings) -> list[str]:
    if method not in OF_DATA:
        cure = f"method={method!r}: expected one of {list(OF_DATA)}"
        return [f"{cure}; what needs no data is fastlora.lora's init_lora_weights."]
    default, problems = InitSettings(), []
    for name, (can_be, expected) in _RULES.items():
        value = getattr(choices, name)
        if name in _TAKES[method]:
            problems += [] if can_be(value) else [f"{name}={value!r}: expected {expected}."]
        elif value != getattr(default, name):
            problems.append(f"{name}={value!r} means nothing to {method!r}; leave it out.")
    return problems


def fresh_adapter_problems(model: ModelState, method: str, choices: InitSettings) -> list[str]:
    lora, adapter = model.spec.lora, model.adapter
    if lora is None or adapter is None:
        return ["the model has no adapter to initialise; call fastlora.lora(model) first."]
    if any(model.spec.config.sparse_layers):
        return ["the model is a mixture of experts; its experts' inputs are not gathered yet."]
    if lora.qat_scheme is not None:
        return [f"qat_scheme={lora.qat_scheme!r} excludes an initialisation from data."]
    records = [record for layer in adapter["layers"] for record in layer.values()]
    if not records:
        return ["the adapter is on no projection, whose inputs would say how to begin."]
    if any(isinstance(record, BiasedLoRA) for record in records):
        return ["lora_bias=True cannot be combined with an initialisation from data."]
    if any(bool(record.b.any()) for record in records):
        fresh = "fastlora.lora(model) with init_lora_weights True or 'gaussian' gives a fresh one"
        return [f"the adapter is not fresh, its B is not zero: {fresh}."]
    if method != "eva":
        return factor_problems(lora, model.spec.config, method)
    return [
        f"{projection_path(i, t.name)}: {n} components, round(rho * r), of inputs of size {size};"
        " lower rho or r."
        for i, targets in enumerate(lora.targets)
        for t in targets
        if (n := max_components(t, choices))
        > (size := projection_shape(model.spec.config, t.name)[1])
    ]
