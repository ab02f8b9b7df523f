"""combine(): makes one adapter of several over one base; disable(): drops the adapter.

There are seven methods, with the numbers of PEFT's add_weighted_adapter (peft 0.21.2,
tuners/lora/model.py:786 and utils/merge_utils.py). "cat" and "svd" combine the products B A: the
result is the weighted sum of the adapters' deltas, up to the rank that "svd" keeps. The other
methods combine the As with each other and the Bs with each other. Their result is smaller, and in
general not that sum: it contains cross terms B_i A_j.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial, reduce
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastlora.adapters.edits.combine_checks import (
    SETTINGS_OF_METHOD,
    CombineSettings,
    as_list,
    check_finite,
    combined_model_problems,
    model_list_problems,
    weight_problems,
)
from fastlora.adapters.targets import with_targets
from fastlora.arguments import check_arguments, method_problems, settings_from
from fastlora.errors import raise_problems
from fastlora.models.input_checks import MODEL
from fastlora.models.params import LINEARS, Adapter, LayerAdapter, LoRA
from fastlora.models.self_contained import self_contained
from fastlora.models.spec import LoraConfig, Target
from fastlora.models.state import ModelState, StateT, require_adapter
from fastlora.ops.dispatch import refuse_transforms


class _Part(NamedTuple):
    """One model's contribution to one projection: delta_W = scale * b @ a."""

    scale: float  # the model's weight times its scaling
    a: Float[Tensor, "r d_in"]
    b: Float[Tensor, "d_out r"]


_Combination = Callable[[Sequence[_Part]], LoRA]

_HEADING = "fastlora.combine cannot do this:"


def disable(model: StateT) -> StateT:
    """The base alone, over the same tensors; the given model keeps its adapter.

    Raises:
        ValueError: `model` is not a model.
    """
    check_arguments("fastlora.disable", model=(model, MODEL))
    model = self_contained(model)
    return replace(model, spec=replace(model.spec, lora=None), adapter=None)


def combine(
    models: Sequence[StateT],
    weights: Sequence[float],
    method: str = "cat",
    *,
    density: float | None = None,
    majority_sign_method: str = "total",
    svd_rank: int | None = None,
    seed: int | None = None,
) -> StateT:
    """One model whose adapter, of scaling 1, combines the adapters of all models over their base.

        models[0].adapter {"layers": ({"q_proj": (A_1, B_1)}, ...)}
        models[1].adapter {"layers": ({"q_proj": (A_2, B_2)}, ...)}
    ->  adapter           {"layers": ({"q_proj": ([s_1 A_1; s_2 A_2], [B_1, B_2])}, ...)}   "cat"

    The given models are unchanged. The numbers are PEFT's. Three settings that PEFT ignores in some
    cases are always honoured: `density` and `svd_rank` with one model only, modules that the first
    model does not adapt (layers_to_transform, exclude_modules), and the scaling with use_rslora.

    Sums are in float32 (in float64 for "svd", and if an adapter has that dtype) and then rounded to
    the widest dtype of the adapters. Gradients do not flow to the given adapters. A model that does
    not adapt a module contributes nothing to it. Adapters with an initial offset (PiSSA and others)
    contribute at twice their rank, with the offset folded in. Everything besides the adapter comes
    from the first model, also its lora_dropout.

    Args:
        models: with adapters over the same base tensors, as `load_adapter` on one model makes them.
        weights: one for each model; may be negative, and 0, but not all 0.
        method: how each module is combined, with s_i = weight times scaling:
            "cat": A = [s_1 A_1; ...], B = [B_1, ...]: exactly the weighted sum, of rank sum r_i.
            "svd": the best approximation of that sum of rank `svd_rank`.
            "linear": A = sum sign(s_i) sqrt|s_i| A_i, B = sum sqrt|s_i| B_i. It needs equal ranks,
            as do all methods below.
            "magnitude_prune": the same, with only the largest values of each matrix.
            "ties": the same, and at each position only the models with the majority's sign count;
            the sum is divided by their number (Yadav et al. 2023, arXiv:2306.01708).
            "dare_linear", "dare_ties": "linear" and "ties" of values kept at random and divided by
            `density` (Yu et al. 2023, arXiv:2311.03099).
        density: share of values to keep, in (0, 1]; for methods that prune.
        majority_sign_method: the majority's sign is the sign of the sum of the values, "total", or
            of the sum of their signs, "frequency".
        svd_rank: None is the largest rank of the models. The result never has a larger rank than
            the sum.
        seed: seeds a private generator, drawn on the CPU: same masks on every device. None takes a
            random seed.

    Raises:
        ValueError: listing every wrong argument, every setting that `method` does not use, every
            model without an adapter, with another base or with NaN or infinity, and every module
            with different ranks if `method` needs equal ones; or the result is not finite.
    """
    refuse_transforms("fastlora.combine")
    settings = settings_from(CombineSettings, locals())
    model_list, numbers = as_list(models), as_list(weights)
    problems = method_problems(method, settings, SETTINGS_OF_METHOD)
    problems += weight_problems(numbers, weights, len(model_list or ()))
    # The checks below read the models' fields.
    if class_problems := model_list_problems(model_list, models):
        raise_problems(ValueError, _HEADING, class_problems + problems)
    originals: list[StateT] = [self_contained(model) for model in model_list or ()]
    problems += combined_model_problems(originals, method)
    raise_problems(ValueError, _HEADING, problems)

    if method == "cat":
        combination = _concatenated
    elif method == "svd":
        largest = max(_largest_rank(m) for m in originals)
        combination = partial(_truncated_sum, rank=svd_rank or largest)
    else:
        combination = _value_by_value(method, density, majority_sign_method, seed)
    dtype = _widest_dtype(originals)
    layers: tuple[LayerAdapter, ...] = tuple(
        {name: _rounded(combination(parts), dtype) for name, parts in by_name.items()}
        for by_name in _parts(originals, numbers or ())
    )
    check_finite(layers)
    first, _ = require_adapter(originals[0])
    spec = replace(originals[0].spec, lora=_combined_settings(first, layers))
    return replace(originals[0], spec=spec, adapter=Adapter(layers=layers))


def _parts(models: Sequence[ModelState], weights: Sequence[float]) -> list[dict[str, list[_Part]]]:
    """For each layer: projection -> parts of the models that adapt it, in LINEARS order."""
    wide = torch.promote_types(_widest_dtype(models), torch.float32)
    layers = []
    for i in range(models[0].spec.config.num_hidden_layers):
        by_name: dict[str, list[_Part]] = {name: [] for name in LINEARS}
        for model, weight in zip(models, weights, strict=True):
            settings, adapter = require_adapter(model)
            for target in settings.targets[i]:
                lora = adapter["layers"][i][target.name]
                a, b = (x.detach().to(wide) for x in (lora.a, lora.b))
                by_name[target.name].append(_Part(weight * target.scaling, a, b))
        layers.append({name: parts for name, parts in by_name.items() if parts})
    return layers


def _largest_rank(model: ModelState) -> int:
    lora, _ = require_adapter(model)
    return max([lora.r, *(r for _, r in lora.rank_pattern)])


def _widest_dtype(models: Sequence[ModelState]) -> torch.dtype:
    """The widest of the adapters' dtypes."""
    return reduce(torch.promote_types, (x.dtype for m in models for x in tree_leaves(m.adapter)))


def _rounded(lora: LoRA, dtype: torch.dtype) -> LoRA:
    return LoRA(lora.a.to(dtype), lora.b.to(dtype))


def _combined_settings(first: LoraConfig, layers: Sequence[LayerAdapter]) -> LoraConfig:
    """Settings that resolve to these modules and ranks, with alpha = rank for a scaling of 1."""
    target = lambda name, rank: Target(name=name, r=rank, lora_alpha=rank, scaling=1.0)
    targets = tuple(
        tuple(target(name, lora.a.shape[0]) for name, lora in loras.items()) for loras in layers
    )
    r = max(t.r for ts in targets for t in ts)
    lora = replace(first, r=r, lora_alpha=r, use_rslora=False, init_lora_weights=True)
    return with_targets(lora, targets)


# Methods that combine products B A.


def _concatenated(parts: Sequence[_Part]) -> LoRA:
    return LoRA(torch.cat([s * a for s, a, _ in parts]), torch.cat([b for _, _, b in parts], dim=1))


def _truncated_sum(parts: Sequence[_Part], rank: int) -> LoRA:
    """The largest singular directions of the sum: A orthonormal, B with the singular values.

    QR of both factors leaves an SVD of [sum r_i, sum r_i]; delta_W [d_out, d_in] is never formed.
    It runs in float64. In float32 the three decompositions err by 1e-6 of the largest value, where
    a sum errs by 1e-7 (two adapters of rank 5 and 6, torch 2.13, CPU).
    """
    a, b = (x.double() for x in _concatenated(parts))
    q_a, r_a = torch.linalg.qr(a.mT)
    q_b, r_b = torch.linalg.qr(b)
    u, s, vh = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    return LoRA(vh[:rank] @ q_a.mT, q_b @ (u[:, :rank] * s[:rank]))


# Methods that combine As with As and Bs with Bs.


def _value_by_value(
    method: str, density: float | None, sign: str, seed: int | None
) -> _Combination:
    keep = partial(_keep, method=method, density=density, generator=_generator(seed))
    merge = partial(_elected_mean, method=sign) if method.endswith("ties") else _weighted_sum

    def combination(parts: Sequence[_Part]) -> LoRA:
        scales = parts[0].a.new_tensor([part.scale for part in parts])[:, None, None]
        root = scales.abs().sqrt()
        # All As before any B: PEFT's order of random draws, so equal seeds give equal masks.
        a = torch.stack([keep(part.a) for part in parts])
        b = torch.stack([keep(part.b) for part in parts])
        # The sign is on one side only: on both, it would cancel in B A.
        return LoRA(merge(a, root * scales.sign()), merge(b, root))

    return combination


def _keep(
    x: Float[Tensor, "rows columns"], method: str, density: float | None, generator: torch.Generator
) -> Float[Tensor, "rows columns"]:
    """The matrix with the values that a method does not use set to 0."""
    if density is None or density == 1:
        return x
    if method.startswith("dare"):
        share = torch.full(x.shape, density, dtype=torch.float32, device="cpu")
        mask = torch.bernoulli(share, generator=generator)
        return x * mask.to(x) / density  # the division keeps the expected value
    largest = x.abs().flatten().topk(int(density * x.numel())).indices
    return x * torch.zeros_like(x).flatten().index_fill(0, largest, 1).view_as(x)


def _weighted_sum(
    stack: Float[Tensor, "n rows columns"], weights: Float[Tensor, "n 1 1"]
) -> Float[Tensor, "rows columns"]:
    return (stack * weights).sum(0)


def _elected_mean(
    stack: Float[Tensor, "n rows columns"], weights: Float[Tensor, "n 1 1"], method: str
) -> Float[Tensor, "rows columns"]:
    """At each position, the sum of the values with the majority's sign, divided by their number.

    The majority is that of the values without their weights, as in PEFT: a negative weight changes
    what is added, but not which models count. A tie counts as positive. A zero has no sign and
    never counts.
    """
    signs = stack.sign()
    vote = (stack if method == "total" else signs).sum(0)
    counts = signs == torch.where(vote >= 0, 1, -1)
    return (stack * weights * counts).sum(0) / counts.sum(0).clamp(min=1)


def _generator(seed: int | None) -> torch.Generator:
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator
