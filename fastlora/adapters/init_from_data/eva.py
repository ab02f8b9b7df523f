"""eva."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fastlora.adapters.init_from_data.layer_inputs import (
    SHARED_INPUT,
    Rows,
    layer_rows,
    start_passes,
    targets_by_source,
)
from fastlora.adapters.init_from_data.settings import InitSettings, lora_config, max_components
from fastlora.adapters.targets import with_targets
from fastlora.errors import raise_problems
from fastlora.models.names import projection_path
from fastlora.models.params import Adapter
from fastlora.models.spec import LoraConfig, Target
from fastlora.models.state import Batch, StateT


# ── eva ───────────────────────────────────────────────────────────────────────────────────
class Components(NamedTuple):
    """Principal components of the rows seen so far."""

    vh: Float[Tensor, "c d"]
    s: Float[Tensor, "c"]
    mean: Float[Tensor, "d"]
    variance: Float[Tensor, ""]  # sum of squared distances from the mean
    n: int

    def explained(self) -> Float[Tensor, "c"]:
        """Share of the variance along each component."""
        return self.s.square() / self.variance


def updated(old: Components | None, rows: Float[Tensor, "n d"], components: int) -> Components:
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
    vh = vh * vh.gather(1, vh.abs().argmax(1, keepdim=True)).sign()  # one sign for one direction
    return Components(vh[:components], s[:components], mean, variance, n)


def eva(model: StateT, batches: Sequence[Batch], choices: InitSettings) -> StateT:
    lora, passes = lora_config(model), start_passes(model, batches, choices.use_label_mask)
    found: list[dict[str, Components]] = []
    for i, rows in layer_rows(model, passes):
        sources = targets_by_source(lora.targets[i])
        most = {n: max(max_components(t, choices) for t in ts) for n, ts in sources.items()}
        found.append(_converged(rows, most, choices.tau, i))
    targets = tuple(
        tuple(_with_rank(t, r, lora, choices) for t in ts if (r := ranks[t.name]))
        for ts, ranks in zip(lora.targets, _ranks(lora, found, choices), strict=True)
    )
    lora = replace(with_targets(lora, targets), init_lora_weights="eva")
    spec = replace(model.spec, lora=lora)
    assert model.adapter is not None
    layers = tuple(
        {t.name: _eva_record(old[t.name], own, t, choices.whiten) for t in ts}
        for old, own, ts in zip(model.adapter["layers"], found, targets, strict=True)
    )
    adapter = Adapter(**model.adapter | {"layers": layers})
    return replace(model, spec=spec, adapter=adapter)


def _converged(
    rows: Rows, most: Mapping[str, int], tau: float, layer: int
) -> dict[str, Components]:
    """Components of each input after as many batches as it takes them to settle."""
    found: dict[str, Components] = {}
    settled: set[str] = set()
    for batch in rows:
        for name in most.keys() - settled:
            if batch[name].shape[0] < most[name]:
                continue  # too few to tell so many directions apart; the next batch may do
            old = found.get(name)
            found[name] = updated(old, batch[name], most[name])
            if old is not None:
                alike = F.cosine_similarity(found[name].vh, old.vh)
                settled |= {name} if bool((alike >= tau).all()) else set()
    problems = [
        f"{projection_path(layer, name)} needs {n} counted tokens in one batch; no batch has them."
        for name, n in most.items()
        if name not in found
    ]
    cure = "Give larger batches, a smaller rho or r, or use_label_mask=False."
    raise_problems(ValueError, "fastlora.initialize: 'eva' has too little data:", problems, cure)
    return found


def _ranks(
    lora: LoraConfig, found: Sequence[Mapping[str, Components]], choices: InitSettings
) -> list[dict[str, int]]:
    """Projection -> rank by layer: the budget sum r goes to the components that explain most."""
    shares = [
        (share, i, t.name)
        for i, targets in enumerate(lora.targets)
        for source, ts in targets_by_source(targets).items()
        for t in ts
        for share in found[i][source].explained()[: max_components(t, choices)].tolist()
    ]
    budget = sum(t.r for targets in lora.targets for t in targets)
    ranks = [dict.fromkeys((t.name for t in targets), 0) for targets in lora.targets]
    # A stable sort: equal shares, as q, k and v have them, are served in model order.
    for _, i, name in sorted(shares, key=lambda x: -x[0])[:budget]:
        ranks[i][name] += 1
    return ranks


def _with_rank(t: Target, r: int, lora: LoraConfig, choices: InitSettings) -> Target:
    alpha = t.lora_alpha * r / t.r if choices.adjust_scaling_factors and r != t.r else t.lora_alpha
    return replace(t, r=r, lora_alpha=alpha, scaling=alpha / (r**0.5 if lora.use_rslora else r))


def _eva_record(old: Any, found: Mapping[str, Components], t: Target, whiten: bool) -> Any:
    components = found[SHARED_INPUT.get(t.name, t.name)]
    a = components.vh[: t.r]
    if whiten:
        a = a / components.s[: t.r, None].sqrt()
    return old._replace(a=a.to(old.a), b=old.b.new_zeros(old.b.shape[0], t.r))
