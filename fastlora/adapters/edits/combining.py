"""combine(): several adapters over one base as one adapter; disable(): none of them.

Seven rules, with the numbers of PEFT's add_weighted_adapter (peft 0.21.2, tuners/lora/model.py:786
and utils/merge_utils.py). "cat" and "svd" combine the products B A: the result is the weighted sum
of what the adapters do, up to the rank that "svd" keeps. The others combine the As with each other
and the Bs with each other, which is cheaper to hold and, in general, not that sum: it brings in
cross terms B_i A_j.
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
    argument_problems,
    check_finite,
    combined_model_problems,
    lora_config,
    weight_problems,
)
from fastlora.adapters.targets import with_targets
from fastlora.errors import raise_problems
from fastlora.models.params import PROJECTIONS, Adapter, LayerAdapter, LoRA
from fastlora.models.self_contained import self_contained
from fastlora.models.spec import LoraConfig, Target
from fastlora.models.state import ModelState, StateT


class _Part(NamedTuple):
    """One model's share of one projection: delta_W = scale * b @ a."""

    scale: float  # the model's weight times its scaling
    a: Float[Tensor, "r d_in"]
    b: Float[Tensor, "d_out r"]


_Mix = Callable[[Sequence[_Part]], LoRA]


def disable(model: StateT) -> StateT:
    """The base alone, over the same tensors; the given model keeps its adapter."""
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
    """The shared base with one adapter of scaling 1 made of all of theirs; no model is changed.

    The numbers are PEFT's. Three things that PEFT loses in silence hold here: `density` and
    `svd_rank` where there is one model only, modules that the first model does not adapt
    (layers_to_transform, exclude_modules), and the scaling with use_rslora.

    Summed in float32 ("svd", and where an adapter is, in float64), then rounded to the adapters'
    dtype, the widest where they differ. Gradients do not flow to the given adapters. A model that
    does not adapt a module has no say in it. Adapters with start factors (PiSSA and the like) enter
    as what they are over the base itself, at twice their rank. All but the adapter is the first
    model's, its lora_dropout too.

    Args:
        models: adapted, over the very same base tensors, as `load_adapter` on one model gives them.
        weights: one for each model; may be negative, and 0 but not all.
        method: what is done with each module, s_i = weight times scaling:
            "cat": A = [s_1 A_1; ...], B = [B_1, ...]: exactly the weighted sum, of rank sum r_i.
            "svd": the best approximation of that sum of rank `svd_rank`.
            "linear": A = sum sign(s_i) sqrt|s_i| A_i, B = sum sqrt|s_i| B_i; like all below it
            needs equal ranks.
            "magnitude_prune": the same, of each matrix's largest values only.
            "ties": of those, value by value, only the models that have the majority's sign, divided
            by their number (Yadav et al. 2023, arXiv:2306.01708).
            "dare_linear", "dare_ties": "linear" and "ties" of values kept at random and divided by
            `density` (Yu et al. 2023, arXiv:2311.03099).
        density: share of values to keep, in (0, 1]; where `method` prunes.
        majority_sign_method: the sign is that of the sum of the values, "total", or of the sum of
            their signs, "frequency".
        svd_rank: None is the largest rank given. Never more than the sum has.
        seed: of a private generator, drawn on the CPU: same masks on every device. None draws fresh
            entropy.

    Raises:
        ValueError: listing every argument that cannot be or means nothing to `method`, every model
            without an adapter, with another base or with NaN or infinity, and every module whose
            ranks differ where they must not; or if the result is not finite.
    """
    given = dict(
        density=density, majority_sign_method=majority_sign_method, svd_rank=svd_rank, seed=seed
    )
    models = [self_contained(model) for model in models]
    problems = argument_problems(method, given) + weight_problems(weights, len(models))
    problems += combined_model_problems(models, method)
    raise_problems(ValueError, "fastlora.combine cannot do this:", problems)

    if method == "cat":
        mix = _concatenated
    elif method == "svd":
        mix = partial(_decomposed, rank=svd_rank or max(_largest_rank(m) for m in models))
    else:
        mix = _value_by_value(method, density, majority_sign_method, seed)
    dtype = _dtype(models)
    layers: tuple[LayerAdapter, ...] = tuple(
        {name: _rounded(mix(parts), dtype) for name, parts in found.items()}
        for found in _parts(models, weights)
    )
    check_finite(layers)
    spec = replace(models[0].spec, lora=_settings(lora_config(models[0]), layers))
    adapter = Adapter(layers=layers)
    return replace(models[0], spec=spec, adapter=adapter)


def _parts(models: Sequence[ModelState], weights: Sequence[float]) -> list[dict[str, list[_Part]]]:
    """Per layer: projection name, in PROJECTIONS order -> what each model that adapts it adds."""
    wide = torch.promote_types(_dtype(models), torch.float32)
    layers = []
    for i in range(models[0].spec.config.num_hidden_layers):
        found: dict[str, list[_Part]] = {name: [] for name in PROJECTIONS}
        for model, weight in zip(models, weights, strict=True):
            assert model.adapter is not None
            for target in lora_config(model).targets[i]:
                lora = model.adapter["layers"][i][target.name]
                a, b = (x.detach().to(wide) for x in (lora.a, lora.b))
                found[target.name].append(_Part(weight * target.scaling, a, b))
        layers.append({name: parts for name, parts in found.items() if parts})
    return layers


def _largest_rank(model: ModelState) -> int:
    lora = lora_config(model)
    return max([lora.r, *(r for _, r in lora.rank_pattern)])


def _dtype(models: Sequence[ModelState]) -> torch.dtype:
    """The widest of the adapters' dtypes."""
    return reduce(torch.promote_types, (x.dtype for m in models for x in tree_leaves(m.adapter)))


def _rounded(lora: LoRA, dtype: torch.dtype) -> LoRA:
    return LoRA(lora.a.to(dtype), lora.b.to(dtype))


def _settings(first: LoraConfig, layers: Sequence[LayerAdapter]) -> LoraConfig:
    """What resolves to these modules, these ranks and a scaling of 1: alpha is the rank."""
    target = lambda name, rank: Target(name=name, r=rank, lora_alpha=rank, scaling=1.0)
    targets = tuple(
        tuple(target(name, lora.a.shape[0]) for name, lora in loras.items()) for loras in layers
    )
    r = max(t.r for ts in targets for t in ts)
    lora = replace(first, r=r, lora_alpha=r, use_rslora=False, init_lora_weights=True)
    return with_targets(lora, targets)


# ── sums of products ──────────────────────────────────────────────────────────────────────
def _concatenated(parts: Sequence[_Part]) -> LoRA:
    return LoRA(torch.cat([s * a for s, a, _ in parts]), torch.cat([b for _, _, b in parts], dim=1))


def _decomposed(parts: Sequence[_Part], rank: int) -> LoRA:
    """The sum's largest singular directions: A orthonormal, B with the singular values.

    QR of both factors leaves an SVD of [sum r_i, sum r_i]; delta_W [d_out, d_in] is never formed.
    In float64: in float32 three decompositions in a row err by 1e-6 of the largest value (two
    adapters of rank 5 and 6, torch 2.13, CPU), a plain sum by 1e-7.
    """
    a, b = (x.double() for x in _concatenated(parts))
    q_a, r_a = torch.linalg.qr(a.mT)
    q_b, r_b = torch.linalg.qr(b)
    u, s, vh = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    return LoRA(vh[:rank] @ q_a.mT, q_b @ (u[:, :rank] * s[:rank]))


# ── As with As, Bs with Bs ────────────────────────────────────────────────────────────────
def _value_by_value(method: str, density: float | None, sign: str, seed: int | None) -> _Mix:
    keep = partial(_keep, method=method, density=density, generator=_generator(seed))
    merge = partial(_elected_mean, method=sign) if method.endswith("ties") else _weighted_sum

    def mix(parts: Sequence[_Part]) -> LoRA:
        scales = parts[0].a.new_tensor([part.scale for part in parts])[:, None, None]
        root = scales.abs().sqrt()
        a = torch.stack([keep(part.a) for part in parts])  # every A before any B: PEFT's draws
        b = torch.stack([keep(part.b) for part in parts])
        # The sign on one side only: (-1)(-1) would lose it.
        return LoRA(merge(a, root * scales.sign()), merge(b, root))

    return mix


def _keep(
    x: Float[Tensor, "rows columns"], method: str, density: float | None, generator: torch.Generator
) -> Float[Tensor, "rows columns"]:
    """The values that a method looks at, the others 0."""
    if density is None or density == 1:
        return x
    if method.startswith("dare"):
        share = torch.full(x.shape, density, dtype=torch.float32)
        mask = torch.bernoulli(share, generator=generator)
        return x * mask.to(x) / density  # divided, so that the mean stays
    largest = x.abs().flatten().topk(int(density * x.numel())).indices
    return x * torch.zeros_like(x).flatten().index_fill(0, largest, 1).view_as(x)


def _weighted_sum(
    stack: Float[Tensor, "n rows columns"], weights: Float[Tensor, "n 1 1"]
) -> Float[Tensor, "rows columns"]:
    return (stack * weights).sum(0)


def _elected_mean(
    stack: Float[Tensor, "n rows columns"], weights: Float[Tensor, "n 1 1"], method: str
) -> Float[Tensor, "rows columns"]:
    """Sum of the values of the majority's sign, divided by how many these are.

    The vote is on the values without their weights, as in PEFT: a negative weight changes what is
    added, not who is heard. A draw goes to plus; a zero has no sign and is never counted.
    """
    signs = stack.sign()
    vote = (stack if method == "total" else signs).sum(0)
    heard = signs == torch.where(vote >= 0, 1, -1)
    return (stack * weights * heard).sum(0) / heard.sum(0).clamp(min=1)


def _generator(seed: int | None) -> torch.Generator:
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator
