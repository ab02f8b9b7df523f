"""EVA: A from the principal components of each projection's inputs, with ranks moved to where they
explain most variance (Paischer et al. 2024, arXiv:2410.07170; peft 0.21.2, tuners/lora/eva.py)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fastlora.adapters.init_from_data.layer_inputs import (
    SHARED_INPUT,
    Inputs,
    embed_batches,
    inputs_by_layer,
    targets_by_input,
)
from fastlora.adapters.init_from_data.settings import InitSettings, max_components
from fastlora.adapters.targets import with_targets
from fastlora.errors import raise_problems
from fastlora.models.names import projection_path
from fastlora.models.params import Adapter
from fastlora.models.spec import LoraConfig, Target, lora_scaling
from fastlora.models.state import Batch, StateT, require_adapter


class Components(NamedTuple):
    """Principal components of the rows seen so far."""

    vh: Float[Tensor, "c d"]
    s: Float[Tensor, "c"]
    mean: Float[Tensor, "d"]
    variance: Float[Tensor, ""]  # sum of squared distances from the mean
    n: int  # rows

    def explained(self) -> Float[Tensor, "c"]:
        """Share of the variance along each component."""
        return self.s.square() / self.variance


def eva(model: StateT, batches: Sequence[Batch], settings: InitSettings) -> StateT:
    """The model with A set by EVA and B zero; ranks, and with them alphas, may differ.

        adapter {"layers": ({"q_proj": (A [8, d], B [q, 8]), "k_proj": (A [8, d], B [kv, 8])},)}
    ->  adapter {"layers": ({"q_proj": (A [16, d], 0 [q, 16])},)}
    """
    lora, adapter = require_adapter(model)
    states = embed_batches(model, batches, use_label_mask=settings.use_label_mask)
    components: list[dict[str, Components]] = []
    for i, inputs in inputs_by_layer(model, states):
        groups = targets_by_input(lora.targets[i])
        counts = {n: max(max_components(t, settings) for t in ts) for n, ts in groups.items()}
        components.append(layer_components(inputs, counts, settings.tau, i))
    targets = tuple(
        tuple(_with_rank(t, r, lora, settings) for t in ts if (r := ranks[t.name]))
        for ts, ranks in zip(lora.targets, _ranks(lora, components, settings), strict=True)
    )
    lora = replace(with_targets(lora, targets), init_lora_weights="eva")
    layers = tuple(
        {t.name: _eva_record(records[t.name], of_layer, t, settings.whiten) for t in ts}
        for records, of_layer, ts in zip(adapter["layers"], components, targets, strict=True)
    )
    adapter = Adapter(**adapter | {"layers": layers})
    return replace(model, spec=replace(model.spec, lora=lora), adapter=adapter)


def layer_components(
    inputs: Inputs, counts: Mapping[str, int], tau: float, layer: int
) -> dict[str, Components]:
    """Components of each input of a layer.

    An input has converged if every component has a cosine of at least tau with the one before the
    last batch. Later batches do not change it.

    Args:
        inputs: for each batch, input -> rows.
        counts: input -> number of components.
        tau: see above.
        layer: for the error.

    Raises:
        ValueError: no batch has as many rows as an input needs components.
    """
    components: dict[str, Components] = {}
    converged: set[str] = set()
    for batch in inputs:
        for name in counts.keys() - converged:
            if batch[name].shape[0] < counts[name]:
                continue  # too few rows for so many directions; another batch may have more
            old = components.get(name)
            components[name] = update_components(old, batch[name], counts[name])
            if old is not None:
                cosines = F.cosine_similarity(components[name].vh, old.vh)
                converged |= {name} if bool((cosines >= tau).all()) else set()
    problems = [
        f"{projection_path(layer, name)} needs {n} counted tokens in one batch; no batch has them"
        for name, n in counts.items()
        if name not in components
    ]
    cure = "Give larger batches, a smaller rho or r, or use_label_mask=False."
    raise_problems(ValueError, "fastlora.initialize: 'eva' has too little data:", problems, cure)
    return components


def update_components(old: Components | None, rows: Float[Tensor, "n d"], count: int) -> Components:
    """Components after more rows: of the old ones, the new rows and the shift between their means
    (Ross et al. 2008, Incremental Learning for Robust Visual Tracking, section 3.1.2)."""
    n, mean = rows.shape[0], rows.mean(0)
    centred = rows - mean
    variance = centred.square().sum()
    if old is not None:
        total = old.n + n
        shift = (old.n * n / total) ** 0.5 * (old.mean - mean)
        centred = torch.cat([old.s[:, None] * old.vh, centred, shift[None]])
        variance = old.variance + variance + shift.square().sum()
        n, mean = total, (old.n * old.mean + n * mean) / total
    _, s, vh = torch.linalg.svd(centred, full_matrices=False)
    vh = vh * vh.gather(1, vh.abs().argmax(1, keepdim=True)).sign()  # the same sign every time
    return Components(vh[:count], s[:count], mean, variance, n)


def _ranks(
    lora: LoraConfig, components: Sequence[Mapping[str, Components]], settings: InitSettings
) -> list[dict[str, int]]:
    """Projection -> rank, by layer: the sum of all r goes to the components that explain most."""
    shares = [
        (share, i, t.name)
        for i, targets in enumerate(lora.targets)
        for source, ts in targets_by_input(targets).items()
        for t in ts
        for share in components[i][source].explained()[: max_components(t, settings)].tolist()
    ]
    # The number of trained parameters changes only as far as the projections differ in width.
    budget = sum(t.r for targets in lora.targets for t in targets)
    ranks = [dict.fromkeys((t.name for t in targets), 0) for targets in lora.targets]
    # A stable sort: equal shares, such as those of q, k and v, are served in model order.
    for _, i, name in sorted(shares, key=lambda x: -x[0])[:budget]:
        ranks[i][name] += 1
    return ranks


def _with_rank(t: Target, r: int, lora: LoraConfig, settings: InitSettings) -> Target:
    grows = settings.adjust_scaling_factors and r != t.r
    alpha = t.lora_alpha * r / t.r if grows else t.lora_alpha
    return replace(t, r=r, lora_alpha=alpha, scaling=lora_scaling(r, alpha, lora.use_rslora))


def _eva_record(record: Any, components: Mapping[str, Components], t: Target, whiten: bool) -> Any:
    inputs = components[SHARED_INPUT.get(t.name, t.name)]
    a = inputs.vh[: t.r]
    if whiten:
        a = a / inputs.s[: t.r, None].sqrt()
    return record._replace(a=a.to(record.a), b=record.b.new_zeros(record.b.shape[0], t.r))
