"""One model for a base and adapters over it: a stack, of which a row of a batch uses one number.

Number 0 is the base, as an adapter that changes nothing. Every tensor is [n + 1, ...]. Ranks are
filled up with zeros, and each adapter's scaling is multiplied into its B, so that ranks, scalings
and adapted modules may differ. An adapter gets, for everything that only another one trains, values
that change nothing: zeros for A and B, the base's norms for DoRA's magnitude, the base's tensors
for copies of biases and norms and for trained token rows.

`fastlora.functional` has no `stack` yet. Once it has, it replaces `stack` below, whose only
caller is models.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastlora.adapters.targets import with_targets
from fastlora.errors import raise_problems
from fastlora.models.names import tensors_from_base
from fastlora.models.params import TARGETS, Adapter, Base, BiasedLoRA, DoRA, ExpertLoRA, LoRA
from fastlora.models.self_contained import self_contained
from fastlora.models.spec import Extras, LoraConfig, Target
from fastlora.models.state import ModelState, require_adapter
from fastlora.ops.linear.dora import row_norms
from fastlora.ops.quant.weights import Weight

Part = tuple[LoraConfig, Adapter]
Scaled = tuple[Any, float]  # an adapter record and its scaling
_EDGES = ("embed_tokens", "lm_head")


def stack(base: ModelState, models: Mapping[str, ModelState]) -> ModelState:
    """One model for the base (number 0) and all adapters (from 1 on, in this order).

    Raises:
        ValueError: an adapter has trained copies of matrices or fake quantisation, or two adapters
            do not fit together. Lists all problems.
    """
    originals = {name: self_contained(model) for name, model in models.items()}
    problems = [
        f"{name!r}: {reason}; merge it into its base (scripts/merge.py) and serve the folder alone"
        for name, model in originals.items()
        for reason in _not_stackable(base.base, model)
    ]
    parts = [require_adapter(model) for model in originals.values()]
    problems += _not_together(parts)
    raise_problems(ValueError, "these adapters cannot be served together:", problems)
    return _stack_of(base, parts)


def _stack_of(base: ModelState, parts: Sequence[Part]) -> ModelState:
    records = [x for _, tree in parts for x in tree_leaves(tree)]
    dtype = reduce(torch.promote_types, (x.dtype for x in records))
    layers, targets = [], []
    for i, params in enumerate(base.base["layers"]):
        scalings = [{t.name: t.scaling for t in lora.targets[i]} for lora, _ in parts]
        layer: dict[str, Any] = {}
        for name in (n for n in TARGETS if any(n in s for s in scalings)):
            given = [
                (tree["layers"][i][name], s[name]) if name in s else None
                for (_, tree), s in zip(parts, scalings, strict=True)
            ]
            weight = params[name]["weight"] if name in params else None  # None: experts
            layer[name] = _stacked(given, weight, dtype)
        layers.append(layer)
        targets.append(tuple(_target(name, record) for name, record in layer.items()))
    edges, extras = _edges(base.base, parts, dtype)
    copies, tokens = _copies(base, parts), _tokens(base.base, parts)
    extras = replace(
        extras,
        replaced=tuple(copies),
        tokens=tuple((module, ids) for module, (ids, _) in tokens.items()),
        shared_rows=any(lora.extras.shared_rows for lora, _ in parts),
    )
    adapter: dict[str, Any] = {"layers": tuple(layers), **edges}
    if copies:
        adapter["replaced"] = copies
    if tokens:
        adapter["tokens"] = {module: rows for module, (_, rows) in tokens.items()}
    spec = replace(base.spec, lora=_settings(parts, tuple(targets), extras))
    return replace(base, spec=spec, adapter=adapter)


def _settings(
    parts: Sequence[Part], targets: tuple[tuple[Target, ...], ...], extras: Extras
) -> LoraConfig:
    """A first adapter's settings, except that alpha is the rank, for a scaling of 1."""
    r = max((t.r for ts in targets for t in ts), default=1)
    plain: dict[str, Any] = dict(use_rslora=False, init_lora_weights=True, lora_dropout=0.0)
    settings = replace(parts[0][0], r=r, lora_alpha=r, extras=extras, **plain)
    return with_targets(settings, targets)


def _target(name: str, record: Any) -> Target:
    r = record.a.shape[-2]
    return Target(name=name, r=r, lora_alpha=r, scaling=1.0)


# ── tensors ───────────────────────────────────────────────────────────────────────────────


def _stacked(given: Sequence[Scaled | None], weight: Weight | None, dtype: torch.dtype) -> Any:
    """The records of one matrix as one, with scalings of 1. None, and number 0, change nothing.

    If one record is DoRA, all become DoRA; if one has a bias, all get one.
    """
    records = [record for record, _ in (x for x in given if x is not None)]
    first, r = records[0], max(record.a.shape[-2] for record in records)
    rows = [_factors(x or (first, 0.0), r, x is None, dtype) for x in (None, *given)]
    a, b = (torch.stack(x) for x in zip(*rows, strict=True))
    kinds = {type(record) for record in records}
    if DoRA in kinds and weight is not None:
        own = [x[0].magnitude if x and isinstance(x[0], DoRA) else None for x in (None, *given)]
        filled = [
            row_norms(weight, *factors, 1.0) if m is None else m.detach()
            for m, factors in zip(own, rows, strict=True)
        ]
        return DoRA(a, b, torch.stack([x.float() for x in filled]))
    if BiasedLoRA in kinds:
        zeros = b.new_zeros(b.shape[1])
        biases = [
            x[1] * x[0].bias.detach().to(dtype) if x and isinstance(x[0], BiasedLoRA) else zeros
            for x in (None, *given)
        ]
        return BiasedLoRA(a, b, torch.stack(biases))
    return (ExpertLoRA if ExpertLoRA in kinds else LoRA)(a, b)


def _factors(scaled: Scaled, r: int, zero: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A and scaling * B of rank r, or zeros of their shapes."""
    record, scaling = scaled
    more = r - record.a.shape[-2]
    a = F.pad(record.a.detach().to(dtype), (0, 0, 0, more))
    b = F.pad(scaling * record.b.detach().to(dtype), (0, more))
    return (torch.zeros_like(a), torch.zeros_like(b)) if zero else (a, b)


def _edges(base: Base, parts: Sequence[Part], dtype: torch.dtype) -> tuple[dict[str, Any], Extras]:
    """(the records of embedding and head, their settings)."""
    embedding = base["embed_tokens"]
    # The embedding's adapter is one of the transposed matrix.
    weights = {"embed_tokens": embedding.t(), "lm_head": base.get("lm_head", embedding)}
    found: dict[str, Any] = {}
    targets: dict[str, Target] = {}
    for key in _EDGES:
        own = [getattr(lora.extras, key) for lora, _ in parts]
        given: list[Scaled | None] = [
            (dict(tree)[key], target.scaling) if key in tree else None
            for (_, tree), target in zip(parts, own, strict=True)
        ]
        if any(given):
            found[key] = _stacked(given, weights[key], dtype)
            targets[key] = _target(key, found[key])
        elif any(own):  # a tied head uses the embedding's record
            targets[key] = replace(targets["embed_tokens"], name=key)
    tied = any(lora.extras.tied for lora, _ in parts)
    return found, Extras(
        tied=tied, embed_tokens=targets.get("embed_tokens"), lm_head=targets.get("lm_head")
    )


def _copies(base: ModelState, parts: Sequence[Part]) -> dict[str, Tensor]:
    """Copies of norms and biases: name on disk -> each adapter's, or the base's."""
    names = sorted({name for _, tree in parts for name in tree.get("replaced", {})})
    originals = tensors_from_base(base.spec.config, base.base)
    return {
        name: torch.stack(
            [
                originals[name],
                *({**originals, **tree.get("replaced", {})}[name].detach() for _, tree in parts),
            ]
        )
        for name in names
    }


def _tokens(base: Base, parts: Sequence[Part]) -> dict[str, tuple[tuple[int, ...], Tensor]]:
    """Embedding or head -> (ids that any adapter trains, their rows of each adapter)."""
    found = {}
    for key in _EDGES:
        own = [dict(lora.extras.tokens).get(key, ()) for lora, _ in parts]
        ids = tuple(sorted({i for ids in own for i in ids}))
        if not ids:
            continue
        matrix = base.get("lm_head", base["embed_tokens"]) if key == "lm_head" else base[key]
        rows = [matrix[list(ids)]]
        for mine, (_, tree) in zip(own, parts, strict=True):
            row = rows[0].clone()
            if mine:
                trained = tree.get("tokens", {})[key].detach()
                row = row.to(torch.promote_types(row.dtype, trained.dtype))
                row[[ids.index(i) for i in mine]] = trained.to(row.dtype)
            rows.append(row)
        dtype = reduce(torch.promote_types, (row.dtype for row in rows))
        found[key] = (ids, torch.stack([row.to(dtype) for row in rows]))
    return found


# ── adapters that are refused ─────────────────────────────────────────────────────────────


def _not_stackable(base: Base, model: ModelState) -> list[str]:
    """Reasons why an adapter cannot be a part of a stack."""
    lora, adapter = require_adapter(model)
    reasons = []
    copies = [name for name, x in adapter.get("replaced", {}).items() if x.ndim > 1]
    same = zip(tree_leaves(base), tree_leaves(model.base), strict=False)
    if copies:
        # A step of 64 rows would read 64 copies. Of an 8B model's head, each is 1 GB.
        shown = ", ".join(copies[:3])
        reasons.append(f"it trains copies of whole matrices ({shown}), and each row would read one")
    elif any(x is not y for x, y in same):
        reasons.append("its folder changes the base's embedding or head")
    if lora.qat_scheme is not None:
        reasons.append("it is fake quantised")
    return reasons


def _not_together(parts: Sequence[Part]) -> list[str]:
    """Reasons why adapters do not fit together."""
    problems = []
    extras = [lora.extras for lora, _ in parts]
    if any(lora.use_dora for lora, _ in parts) and any(lora.lora_bias for lora, _ in parts):
        problems.append("one adapter has DoRA magnitudes, and another one lora_bias")
    edges = {e.tied for e in extras if e.embed_tokens or e.lm_head}
    if len(edges) > 1:
        problems.append("adapters of embedding and head differ in ensure_weight_tying")
    if len({e.shared_rows for e in extras if e.tokens}) > 1:
        problems.append("only some adapters share their trained token rows with the head")
    # A trained row takes the place of the embedding's row with its low-rank term.
    if any(e.tokens for e in extras) and edges and len(parts) > 1:
        problems.append("one adapter trains token rows, and another one adapts embedding or head")
    return problems
