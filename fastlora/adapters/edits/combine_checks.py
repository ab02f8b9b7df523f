"""combine_checks."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastlora.adapters.extras import described
from fastlora.errors import raise_problems
from fastlora.models.names import projection_path
from fastlora.models.params import PROJECTIONS, Adapter, LayerAdapter
from fastlora.models.spec import LoraConfig
from fastlora.models.state import ModelState


def lora_config(model: ModelState) -> LoraConfig:
    assert model.spec.lora is not None, model.spec
    return model.spec.lora


# ── what cannot be ────────────────────────────────────────────────────────────────────────

# Method -> the arguments that mean something to it.
_TAKES: dict[str, tuple[str, ...]] = {
    "cat": (),
    "svd": ("svd_rank",),
    "linear": (),
    "ties": ("density", "majority_sign_method"),
    "dare_linear": ("density", "seed"),
    "dare_ties": ("density", "majority_sign_method", "seed"),
    "magnitude_prune": ("density",),
}

_SUMS = ("cat", "svd")  # sums of products, so that ranks may differ

_SIGNS = ("total", "frequency")


# Argument -> its default, whether a value can be, and what was expected.
_RULES: dict[str, tuple[Any, Callable[[Any], bool], str]] = {
    "density": (
        None,
        lambda x: x is not None and 0 < x <= 1,
        "a number in (0, 1], the share of values to keep",
    ),
    "majority_sign_method": ("total", lambda x: x in _SIGNS, f"one of {list(_SIGNS)}"),
    "svd_rank": (
        None,
        lambda x: x is None or (type(x) is int and x >= 1),
        "an integer of at least 1, or None for the largest rank given",
    ),
    # What torch.Generator takes.
    "seed": (
        None,
        lambda x: x is None or (type(x) is int and 0 <= x < 2**64),
        "an integer in [0, 2**64), or None for fresh entropy",
    ),
}


def argument_problems(method: str, given: Mapping[str, Any]) -> list[str]:
    changed = tuple(name for name, value in given.items() if value != _RULES[name][0])
    problems = [] if method in _TAKES else [f"method={method!r}: expected one of {list(_TAKES)}."]
    taken = _TAKES.get(method, changed)
    problems += [
        f"{name}={given[name]!r} means nothing to method={method!r}; leave it out."
        for name in changed
        if name not in taken
    ]
    return problems + [
        f"{name}={given[name]!r}: expected {expected}."
        for name, (_, can_be, expected) in _RULES.items()
        if name in taken and not can_be(given[name])
    ]


def weight_problems(weights: Sequence[float], n: int) -> list[str]:
    problems = [
        f"weights[{i}]={w!r}: expected a finite number."
        for i, w in enumerate(weights)
        if not math.isfinite(w)
    ]
    if len(weights) != n:
        problems.append(f"{len(weights)} weights for {n} models: expected one for each.")
    if len(weights) and not any(weights):
        problems.append("the weights are all 0: that is the base; use fastlora.disable(model).")
    return problems


def combined_model_problems(models: Sequence[ModelState], method: str) -> list[str]:
    if not len(models):
        return ["models is empty: expected at least one, with an adapter."]
    problems = []
    for i, model in enumerate(models):
        if model.spec.lora is None or model.adapter is None:
            problems.append(f"models[{i}] has no adapter: give it one with lora or load_adapter.")
        else:
            problems += [f"models[{i}]: {problem}" for problem in _adapter_problems(model.adapter)]
    # PEFT's add_weighted_adapter refuses them as well (model.py:719).
    problems += [
        f"models[{i}] adapts {names}, target_parameters of a mixture of experts: merge it into the"
        " base instead, fastlora.merge(model)."
        for i, model in enumerate(models)
        if model.spec.lora is not None
        and (
            names := sorted({t.name for ts in model.spec.lora.targets for t in ts} - {*PROJECTIONS})
        )
    ]
    problems += [
        f"models[{i}] trains more than LoRA on its layers, {asked}, which has no weighted sum."
        for i, model in enumerate(models)
        if model.spec.lora is not None and (asked := described(model.spec.lora))
    ]
    others = [i for i, model in enumerate(models) if not _share_base(models[0], model)]
    problems += [
        f"models[{i}] has another base than models[0]: load one base, and give it each adapter with"
        " fastlora.load_adapter(base, folder)."
        for i in others
    ]
    adapted = [m for i, m in enumerate(models) if m.adapter and m.spec.lora and i not in others]
    return problems + ([] if method in _SUMS else _rank_problems(adapted, method))


def _adapter_problems(adapter: Adapter) -> list[str]:
    # PEFT leaves a lora_bias out of the result in silence.
    more = sorted({k for loras in adapter["layers"] for k, x in loras.items() if len(x) > 2})
    more += sorted(adapter.keys() - {"layers"})
    problems = [f"{more} hold more than A and B, which no method combines."] if more else []
    return problems + [f"NaN or infinity in {name}." for name in _broken(adapter["layers"])]


def _broken(layers: Sequence[LayerAdapter]) -> list[str]:
    """Names of the projections whose adapter is not finite."""
    return [
        projection_path(i, name)
        for i, loras in enumerate(layers)
        for name, lora in loras.items()
        if not all(x.isfinite().all() for x in lora)
    ]


def _share_base(one: ModelState, other: ModelState) -> bool:
    """Whether shape and base are the same, the base's tensors by their memory."""
    ours, theirs = tree_leaves(one.base), tree_leaves(other.base)
    return (
        one.spec.config == other.spec.config
        and len(ours) == len(theirs)
        and all(_same_memory(x, y) for x, y in zip(ours, theirs, strict=True))
    )


def _same_memory(x: Tensor, y: Tensor) -> bool:
    kind = lambda t: (t.data_ptr(), t.device, t.dtype, t.shape, t.stride())
    return x is y or kind(x) == kind(y)


def _rank_problems(models: Sequence[ModelState], method: str) -> list[str]:
    """Modules where the matrices to be stacked differ in rank."""
    ranks: dict[str, list[int]] = {}
    for model in models:
        for i, targets in enumerate(lora_config(model).targets):
            for target in targets:
                ranks.setdefault(projection_path(i, target.name), []).append(target.r)
    return [
        f"{path} has ranks {found}: method={method!r} needs equal ones; use 'cat' or 'svd'."
        for path, found in ranks.items()
        if len(set(found)) > 1
    ]


def check_finite(layers: Sequence[LayerAdapter]) -> None:
    cure = "Give smaller weights."
    raise_problems(ValueError, "Combining puts NaN or infinity into:", _broken(layers), cure)
