"""The arguments of combine(), and which models can be combined."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastlora.adapters.extras import trained_extras
from fastlora.arguments import (
    RANDOM_SEED,
    Rule,
    argument_problems,
    describe,
    number,
    one_of,
    optional,
    setting,
    whole_number,
)
from fastlora.errors import raise_problems
from fastlora.models.input_checks import MODEL
from fastlora.models.names import projection_path
from fastlora.models.params import LINEARS, Adapter, LayerAdapter
from fastlora.models.spec import LoraConfig
from fastlora.models.stacks import one_adapter_problems
from fastlora.models.state import ModelState, require_adapter


@dataclass(frozen=True, slots=True, kw_only=True)
class CombineSettings:
    """The arguments of `combine` that belong to methods."""

    density: float | None = setting(
        Rule(number(above=0, high=1).accepts, "a number in (0, 1], the share of values to keep"),
        None,
    )
    majority_sign_method: str = setting(one_of("total", "frequency"), "total")
    svd_rank: int | None = setting(
        Rule(
            optional(whole_number(1, 2**31)).accepts,
            "a whole number of at least 1, or None for the largest rank of the models",
        ),
        None,
    )
    seed: int | None = setting(
        Rule(
            optional(RANDOM_SEED).accepts,
            f"{RANDOM_SEED.expected}, or None for a different seed each time",
        ),
        None,
    )


# Method -> the settings that it uses.
SETTINGS_OF_METHOD: dict[str, tuple[str, ...]] = {
    "cat": (),
    "svd": ("svd_rank",),
    "linear": (),
    "ties": ("density", "majority_sign_method"),
    "dare_linear": ("density", "seed"),
    "dare_ties": ("density", "majority_sign_method", "seed"),
    "magnitude_prune": ("density",),
}

_PRODUCT_METHODS = ("cat", "svd")  # they sum products B A, so that ranks may differ


def as_list(values: Any) -> list[Any] | None:
    """The items of a list, tuple, array or iterator; None for values that have no items."""
    if isinstance(values, str | bytes | Mapping):
        return None
    try:
        items = list(values.tolist() if hasattr(values, "tolist") else values)
    except TypeError:
        return None
    return [x.item() if getattr(x, "ndim", None) == 0 else x for x in items]  # NumPy's numbers


def model_list_problems(models: list[Any] | None, given: Any) -> list[str]:
    """Problems with the classes of the models. `given`: what `models` was made of."""
    if models is None:
        return [f"models={describe(given)}: expected a list of models"]
    if not models:
        return ["models is empty: expected at least one, with an adapter"]
    return argument_problems({f"models[{i}]": (model, MODEL) for i, model in enumerate(models)})


def weight_problems(weights: list[Any] | None, given: Any, n: int) -> list[str]:
    """Problems with the weights of n models. `given`: what `weights` was made of."""
    if weights is None:
        return [f"weights={describe(given)}: expected a list of numbers, one for each model"]
    problems = argument_problems({f"weights[{i}]": (w, number()) for i, w in enumerate(weights)})
    if len(weights) != n:
        problems.append(f"{len(weights)} weights for {n} models: expected one for each model")
    if weights and all(type(w) in (int, float) and w == 0 for w in weights):
        problems.append("weights are all 0, which is the base; use fastlora.disable(model)")
    return problems


def combined_model_problems(models: Sequence[ModelState], method: Any) -> list[str]:
    """Why these models cannot be combined with a method.

    Args:
        models: at least one.
        method: one of SETTINGS_OF_METHOD, or an unknown one.
    """
    problems = []
    for i, model in enumerate(models):
        if model.spec.lora is None or model.adapter is None:
            problems.append(f"models[{i}] has no adapter: give it one with lora or load_adapter")
        else:
            found = [f"cannot be combined: {line}" for line in one_adapter_problems(model)]
            found += _adapter_problems(model.adapter) + _target_problems(model.spec.lora)
            problems += [f"models[{i}] {problem}" for problem in found]
    # Memory is compared and not values: comparing two 8B bases would read 32 GB.
    others = [i for i, model in enumerate(models) if not _share_base(models[0], model)]
    problems += [
        f"models[{i}] has another base than models[0]: load one base, and give it each adapter with"
        " fastlora.load_adapter(base, folder)"
        for i in others
    ]
    adapted = [m for i, m in enumerate(models) if m.adapter and m.spec.lora and i not in others]
    return problems + ([] if method in _PRODUCT_METHODS else _rank_problems(adapted, method))


def _adapter_problems(adapter: Adapter) -> list[str]:
    """Tensors that no method combines, and values that are not finite."""
    # PEFT leaves a lora_bias out of the result in silence.
    others = sorted({k for loras in adapter["layers"] for k, x in loras.items() if len(x) > 2})
    others += sorted(adapter.keys() - {"layers"})
    problems = [f"has more than A and B in {others}, which no method combines"] if others else []
    return problems + [f"has NaN or infinity in {name}" for name in _broken(adapter["layers"])]


def _target_problems(lora: LoraConfig) -> list[str]:
    """Adapted tensors that no method combines."""
    problems = []
    names = sorted({t.name for targets in lora.targets for t in targets} - {*LINEARS})
    if names:  # PEFT's add_weighted_adapter refuses them as well (model.py:719)
        problems.append(
            f"adapts {names}, target_parameters of a mixture of experts: merge it into the base"
            " instead, fastlora.merge(model)"
        )
    if extras := trained_extras(lora):
        problems.append(f"trains more than projections, {extras}, which has no weighted sum")
    return problems


def _broken(layers: Sequence[LayerAdapter]) -> list[str]:
    """Names of the projections whose adapter is not finite."""
    return [
        projection_path(i, name)
        for i, loras in enumerate(layers)
        for name, lora in loras.items()
        if not all(x.isfinite().all() for x in tree_leaves(lora))
    ]


def _share_base(one: ModelState, other: ModelState) -> bool:
    """Whether two models have the same shape, and the same memory for the base's tensors."""
    leaves, others = tree_leaves(one.base), tree_leaves(other.base)
    return (
        one.spec.config == other.spec.config
        and len(leaves) == len(others)
        and all(_same_memory(x, y) for x, y in zip(leaves, others, strict=True))
    )


def _same_memory(x: Tensor, y: Tensor) -> bool:
    view = lambda t: (t.data_ptr(), t.device, t.dtype, t.shape, t.stride())
    return x is y or view(x) == view(y)


def _rank_problems(models: Sequence[ModelState], method: Any) -> list[str]:
    """Modules whose adapters differ in rank."""
    ranks: dict[str, list[int]] = {}
    for model in models:
        for i, targets in enumerate(require_adapter(model)[0].targets):
            for target in targets:
                ranks.setdefault(projection_path(i, target.name), []).append(target.r)
    return [
        f"{path} has ranks {of_models}: method={method!r} needs equal ones; use 'cat' or 'svd'"
        for path, of_models in ranks.items()
        if len(set(of_models)) > 1
    ]


def check_finite(layers: Sequence[LayerAdapter]) -> None:
    """Check a combined adapter.

    Raises:
        ValueError: naming every projection whose adapter holds NaN or infinity.
    """
    cure = "Give smaller weights."
    raise_problems(ValueError, "Combining puts NaN or infinity into:", _broken(layers), cure)
