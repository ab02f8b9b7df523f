"""The arguments of initialize(), and the models that it accepts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fastlora.adapters.init.from_weights import set_initial_factors
from fastlora.adapters.init.methods import factor_problems
from fastlora.arguments import FLAG, RANDOM_SEED, number, one_of, setting
from fastlora.models.names import projection_path, projection_shape
from fastlora.models.params import BiasedLoRA, LoRA
from fastlora.models.spec import LoraConfig, Target
from fastlora.models.state import ModelState, StateT, require_adapter


@dataclass(frozen=True, slots=True, kw_only=True)
class InitSettings:
    """The arguments of `initialize` that belong to methods, with PEFT's defaults."""

    # Below 1 no projection could get its rank r, and the sum of all ranks could not be kept.
    rho: float = setting(number(low=1, high=1e6), 2.0)
    tau: float = setting(number(low=0, high=1), 0.99)
    use_label_mask: bool = setting(FLAG, True)
    whiten: bool = setting(FLAG, False)
    adjust_scaling_factors: bool = setting(FLAG, True)
    corda_method: str = setting(one_of("ipm", "kpm"), "ipm")
    direction: str = setting(one_of("ArBr", "A2rBr", "ArB2r", "random"), "ArB2r")
    scale: str = setting(one_of("stable", "weight_svd", "gd_scale", "unit"), "stable")
    stable_gamma: float = setting(number(above=0), 16)
    random_state: int = setting(RANDOM_SEED, 3407)


# Method -> the settings that it uses.
SETTINGS_OF_METHOD = {
    "eva": ("rho", "tau", "use_label_mask", "whiten", "adjust_scaling_factors"),
    "corda": ("corda_method",),
    "lora_ga": ("direction", "scale", "stable_gamma", "random_state"),
}


def max_components(target: Target, settings: InitSettings) -> int:
    """The largest rank that EVA may give a projection."""
    return round(target.r * settings.rho)


def with_initial_factors(model: StateT, factors: Sequence[Mapping[str, LoRA]], init: str) -> StateT:
    """The model whose adapter starts at these A0 and B0, subtracted by an initial offset.

    Args:
        model: with an adapter on the same projections.
        factors: one dict per layer, projection name -> (A0, B0); see `set_initial_factors`.
        init: recorded as `init_lora_weights`.
    """
    lora, adapter = require_adapter(model)
    base, adapter = set_initial_factors(model.base, adapter, factors)
    spec = replace(model.spec, lora=replace(lora, init_lora_weights=init))
    return replace(model, spec=spec, base=base, adapter=adapter)


def init_model_problems(model: ModelState, method: str, settings: InitSettings) -> list[str]:
    """Why a model's adapter cannot be initialised with a method."""
    lora, adapter = model.spec.lora, model.adapter
    if lora is None or adapter is None:
        return ["model has no adapter to initialise; call fastlora.lora(model) first"]
    if any(model.spec.config.sparse_layers):
        return ["model is a mixture of experts; initialize does not read experts' inputs"]
    if lora.qat_scheme is not None:
        return [
            f"model has qat_scheme={lora.qat_scheme!r}, which excludes initialisation from data"
        ]
    records = [record for layer in adapter["layers"] for record in layer.values()]
    if not records:
        return ["model's adapter is on no projection, and only projections are initialised"]
    if any(isinstance(record, BiasedLoRA) for record in records):
        return ["model has lora_bias=True, which excludes initialisation from data"]
    # Any trained or shifted adapter has a B that is not zero.
    if any(bool(record.b.any()) for record in records):
        return [
            "model's adapter is not fresh: its B is not zero; attach a fresh one with"
            " fastlora.lora(model), init_lora_weights True or 'gaussian'"
        ]
    if method != "eva":
        return factor_problems(lora, model.spec.config, method)
    return _component_problems(lora, model, settings)


def _component_problems(lora: LoraConfig, model: ModelState, settings: InitSettings) -> list[str]:
    return [
        f"{projection_path(i, t.name)}: round(rho * r) is {n} components, but its inputs have size"
        f" {size}; lower rho or r"
        for i, targets in enumerate(lora.targets)
        for t in targets
        if (n := max_components(t, settings))
        > (size := projection_shape(model.spec.config, t.name)[1])
    ]
