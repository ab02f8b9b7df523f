"""initialize(): first weights of an adapter from what data says about the base.

Layer by layer, by pure functions of layer.py's pieces: what enters each projection, and for
"lora_ga" the gradient of the loss by its weight. One layer's statistics are on the device at a
time; the batches' hidden states wait on the host in between.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastlora.adapter import ModelT
from fastlora.checks import raise_problems
from fastlora.factors import OF_DATA, balanced, factor_problems, randomised_svd
from fastlora.first_weights import started
from fastlora.functional import Batch, trained_labels
from fastlora.gradients import value_and_grad
from fastlora.llama.decoder import Where, where
from fastlora.llama.head import head
from fastlora.llama.layer import (
    LayerSpec,
    attention_block,
    attention_output,
    layer_spec,
    mlp_block,
    project,
    queries_keys_values,
)
from fastlora.llama.params import (
    Adapter,
    Base,
    BiasedLoRA,
    LayerParams,
    LoRA,
    projection_path,
    projection_shape,
)
from fastlora.llama.spec import LoraConfig, Spec, Target
from fastlora.ops.attention import attention
from fastlora.ops.dequantize import dense
from fastlora.ops.linear_cross_entropy import IGNORE, linear_logprobs
from fastlora.ops.rms_norm import rms_norm
from fastlora.originals import originals_away, with_originals
from fastlora.targets import with_targets

# Projections that read the same input, by the first of them.
_SHARED = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
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


def initialize(
    model: ModelT,
    batches: Iterable[Batch],
    method: str,
    *,
    rho: float = 2.0,
    tau: float = 0.99,
    use_label_mask: bool = True,
    whiten: bool = False,
    adjust_scaling_factors: bool = True,
    corda_method: str = "ipm",
    direction: str = "ArB2r",
    scale: str = "stable",
    stable_gamma: float = 16,
    random_state: int = 3407,
) -> ModelT:
    """The model with its fresh adapter's A and B taken from data; the given one is unchanged.

    It still equals its base, whose tensors stay as they are: "eva" leaves B zero; for "corda" and
    "lora_ga" what PEFT would subtract from the base is kept beside it (llama/start.py), and the
    model is saved as an adapter of twice the rank. Only the base is run, without dropout.

    Args:
        model: with a fresh adapter, as `fastlora.lora` gives it: B is zero.
        batches: dicts as `model.loss` takes them; labels may be absent, save for "lora_ga". Read
            once, and kept on the host with one hidden state a token ("lora_ga": one a layer).
        method: "eva": A is the main directions of each projection's inputs, and ranks move to where
            these explain most of their variance (Paischer et al. 2024, arXiv:2410.07170); a
            projection left with rank 0 loses its adapter.
            "corda": A and B are the main directions of W C, C the covariance of the inputs (Yang et
            al. 2024, arXiv:2406.05223).
            "lora_ga": A and B are directions of the loss's gradient by W, the mean over the batches
            (Wang et al. 2024, arXiv:2407.05000).
        rho: eva: the largest rank is round(rho * r); 1 moves none.
        tau: eva: a component has settled where its cosine with that of the batch before is at
            least this. Once all of an input have, later batches do not change them.
        use_label_mask: eva: tokens whose label is -100 do not count, where there are labels.
        whiten: eva: divide directions by the root of their singular value.
        adjust_scaling_factors: eva: alpha grows with the rank, so the scaling stays.
        corda_method: "ipm": the largest directions, to learn; "kpm": the smallest, to keep.
        direction: lora_ga: which of the first 2r directions go to A and to B: "ArB2r": A the first
            r, B the others; "A2rBr": the reverse; "ArBr": alternating; "random".
        scale: lora_ga: "stable": B grows with d_out**(1/4) / stable_gamma**(1/2); "weight_svd": B's
            largest value is W's; "gd_scale": both are divided by the scaling; "unit".
        stable_gamma: lora_ga: see `scale`.
        random_state: lora_ga: of a private generator that draws on the CPU.

    Raises:
        ValueError: listing everything that cannot be: an unknown method, an argument of another
            method, a batch that does not fit, an adapter that is not fresh, a rank without enough
            directions; or if the data has fewer counted tokens a batch than "eva" has components.

    Padding never counts. Statistics are in float32, float64 of a float64 base; sources of the rules
    where papers leave a choice: peft 0.21.2 (tuners/lora/eva.py, corda.py, layer.py:619), with
    exact decompositions in place of randomised ones, but for "lora_ga".
    """
    choices = Choices(
        rho=rho,
        tau=tau,
        use_label_mask=use_label_mask,
        whiten=whiten,
        adjust_scaling_factors=adjust_scaling_factors,
        corda_method=corda_method,
        direction=direction,
        scale=scale,
        stable_gamma=stable_gamma,
        random_state=random_state,
    )
    heading = "fastlora.initialize cannot do this:"
    raise_problems(ValueError, heading, _choice_problems(method, choices))
    raise_problems(ValueError, heading, _model_problems(model, method, choices))
    found = list(batches)
    raise_problems(ValueError, heading, _batch_problems(model.spec, found, method))
    device = model.base["norm"].device
    found = [{name: x.to(device) for name, x in batch.items()} for batch in found]
    whole = cast(ModelT, replace(cast(Any, model), base=with_originals(model.base)))
    with torch.no_grad():
        make = {"eva": _eva, "corda": _corda, "lora_ga": _lora_ga}[method]
        made = make(whole, found, choices)
    base = {**made.base, **originals_away(model.base)}
    return cast(ModelT, replace(cast(Any, made), base=base))


def _lora(model: Any) -> LoraConfig:
    assert model.spec.lora is not None, model.spec
    return model.spec.lora


# ── what enters each projection ───────────────────────────────────────────────────────────


def layer_inputs(
    x: Float[Tensor, "b t d"],
    params: LayerParams,
    cos: Float[Tensor, "#b t hd"],
    sin: Float[Tensor, "#b t hd"],
    mask: Bool[Tensor, "#b 1 t t"] | None,
    spec: LayerSpec,
) -> tuple[dict[str, Float[Tensor, "b t _"]], Float[Tensor, "b t d"]]:
    """(what q_proj, o_proj, gate_proj and down_proj multiply, the layer's output), base alone.

    k_proj and v_proj read what q_proj reads, up_proj what gate_proj does.
    """
    normed = rms_norm(x, params["input_layernorm"], spec.rms_norm_eps)
    q, k, v = queries_keys_values(x, params, {}, cos, sin, spec, None)
    heads = attention(q, k, v, mask, deterministic=spec.deterministic)
    x = x + attention_output(heads, params, {}, spec, None)
    middle = rms_norm(x, params["post_attention_layernorm"], spec.rms_norm_eps)
    gate, up = project(middle, ("gate_proj", "up_proj"), params, {}, spec, None)
    gated = F.silu(gate) * up
    out = x + project(gated, ("down_proj",), params, {}, spec, None)[0]
    inputs = {"q_proj": normed, "o_proj": heads.transpose(1, 2).flatten(2)}
    return inputs | {"gate_proj": middle, "down_proj": gated}, out


class _Pass(NamedTuple):
    """One batch on its way through the layers."""

    x: Float[Tensor, "b t d"]  # what enters the next layer; on the host
    batch: Batch
    counted: Bool[Tensor, "b t"]


def _passes(model: Any, batches: Sequence[Batch], use_label_mask: bool) -> list[_Pass]:
    return [_pass(model.base, model.spec, batch, use_label_mask) for batch in batches]


def _pass(base: Base, spec: Spec, batch: Batch, use_label_mask: bool) -> _Pass:
    x = F.embedding(batch["input_ids"], base["embed_tokens"])
    counted = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    if use_label_mask and "labels" in batch:
        counted = counted & (batch["labels"] != IGNORE)
    return _Pass(x.cpu(), batch, counted)


def _at(spec: Spec, batch: Batch, dtype: torch.dtype) -> Where:
    """Made again for every layer: masks [b, 1, t, t] of all batches would not be little."""
    optional = [batch.get(n) for n in ("attention_mask", "position_ids", "segment_ids")]
    return where(spec.config, batch["input_ids"], dtype, *optional)


Rows = Iterator[dict[str, Float[Tensor, "n _"]]]


def _layers(model: Any, passes: list[_Pass]) -> Iterator[tuple[int, Rows]]:
    """(layer, for each batch: projection -> its counted inputs), the first layer first.

    Rows of one layer are read to the end before the next layer is asked for; what is left of them
    is run then, for the hidden states that follow.
    """
    for i, params in enumerate(model.base["layers"]):
        rows = _rows(model, passes, i, params)
        yield i, rows
        _run_out(rows)


def _run_out(rows: Rows) -> None:
    for _ in rows:
        pass


def _rows(model: Any, passes: list[_Pass], i: int, params: LayerParams) -> Rows:
    spec, kind = layer_spec(model.spec, i), model.spec.config.layer_types[i]
    for n, (x, batch, counted) in enumerate(passes):
        x = x.to(params["input_layernorm"].device)
        at = _at(model.spec, batch, x.dtype)
        inputs, out = layer_inputs(x, params, at.cos, at.sin, at.masks[kind], spec)
        passes[n] = _Pass(out.cpu(), batch, counted)
        wide = torch.promote_types(x.dtype, torch.float32)
        yield {name: y[counted].to(wide) for name, y in inputs.items()}


def _sources(targets: Sequence[Target]) -> dict[str, list[Target]]:
    """Projection whose input is read -> the targets that read it."""
    found: dict[str, list[Target]] = {}
    for t in targets:
        found.setdefault(_SHARED.get(t.name, t.name), []).append(t)
    return found


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


def _eva(model: ModelT, batches: Sequence[Batch], choices: Choices) -> ModelT:
    lora, passes = _lora(model), _passes(model, batches, choices.use_label_mask)
    found: list[dict[str, Components]] = []
    for i, rows in _layers(model, passes):
        sources = _sources(lora.targets[i])
        most = {n: max(_most(t, choices) for t in ts) for n, ts in sources.items()}
        found.append(_settled(rows, most, choices.tau, i))
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
    return cast(ModelT, replace(cast(Any, model), spec=spec, adapter=adapter))


def _most(target: Target, choices: Choices) -> int:
    return round(target.r * choices.rho)


def _settled(rows: Rows, most: Mapping[str, int], tau: float, layer: int) -> dict[str, Components]:
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
    lora: LoraConfig, found: Sequence[Mapping[str, Components]], choices: Choices
) -> list[dict[str, int]]:
    """Projection -> rank by layer: the budget sum r goes to the components that explain most."""
    shares = [
        (share, i, t.name)
        for i, targets in enumerate(lora.targets)
        for source, ts in _sources(targets).items()
        for t in ts
        for share in found[i][source].explained()[: _most(t, choices)].tolist()
    ]
    budget = sum(t.r for targets in lora.targets for t in targets)
    ranks = [dict.fromkeys((t.name for t in targets), 0) for targets in lora.targets]
    # A stable sort: equal shares, as q, k and v have them, are served in model order.
    for _, i, name in sorted(shares, key=lambda x: -x[0])[:budget]:
        ranks[i][name] += 1
    return ranks


def _with_rank(t: Target, r: int, lora: LoraConfig, choices: Choices) -> Target:
    alpha = t.lora_alpha * r / t.r if choices.adjust_scaling_factors and r != t.r else t.lora_alpha
    return replace(t, r=r, lora_alpha=alpha, scaling=alpha / (r**0.5 if lora.use_rslora else r))


def _eva_record(old: Any, found: Mapping[str, Components], t: Target, whiten: bool) -> Any:
    components = found[_SHARED.get(t.name, t.name)]
    a = components.vh[: t.r]
    if whiten:
        a = a / components.s[: t.r, None].sqrt()
    return old._replace(a=a.to(old.a), b=old.b.new_zeros(old.b.shape[0], t.r))


# ── corda ─────────────────────────────────────────────────────────────────────────────────


def _corda(model: ModelT, batches: Sequence[Batch], choices: Choices) -> ModelT:
    lora, passes = _lora(model), _passes(model, batches, use_label_mask=False)
    found: list[dict[str, LoRA]] = []
    for i, rows in _layers(model, passes):
        sources = _sources(lora.targets[i])
        covariances = _covariances(rows, sources)
        params, dtype = model.base["layers"][i], model.base["norm"].dtype
        found.append(
            {
                t.name: _corda_pair(
                    dense(params[t.name]["weight"], dtype), *covariances[n], t, choices
                )
                for n, ts in sources.items()
                for t in ts
            }
        )
    return _begun(model, found, "corda")


def _covariances(rows: Rows, names: Iterable[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Name -> (damped covariance, its inverse): the mean over batches of X'X, X over its maximum.

    The maximum, not the largest magnitude: what PEFT and CorDA's own code divide by.
    """
    sums: dict[str, Tensor] = {}
    n = 0
    for batch in rows:
        n += 1
        for name in names:
            x = batch[name] / batch[name].max().abs()
            sums[name] = sums[name] + x.mT @ x if name in sums else x.mT @ x
    broken = [name for name, total in sums.items() if not total.isfinite().all()]
    cure = "Their inputs are not finite, or nowhere positive: look for NaN in the base."
    raise_problems(ValueError, "fastlora.initialize: no covariance of the inputs of", broken, cure)
    return {name: _damped(total / n) for name, total in sums.items()}


def _damped(covariance: Float[Tensor, "d d"]) -> tuple[Float[Tensor, "d d"], Float[Tensor, "d d"]]:
    """(C + damp * mean(diag C) * I, its inverse), damp doubled from 0.01 until the inverse is one:
    |C C^-1 - I| < 0.05 in the Frobenius norm."""
    unit = torch.eye(covariance.shape[0], dtype=covariance.dtype, device=covariance.device)
    level, damp = covariance.diagonal().mean(), 0.01
    while True:
        damped = covariance + damp * level * unit
        inverse = torch.linalg.inv(damped)
        if float((damped @ inverse - unit).norm()) < 0.05:
            return damped, inverse
        damp *= 2


def _corda_pair(weight: Tensor, covariance: Tensor, inverse: Tensor, t: Target, c: Choices) -> LoRA:
    u, s, vh = torch.linalg.svd(weight.to(covariance.dtype) @ covariance, full_matrices=False)
    kept = slice(None, t.r) if c.corda_method == "ipm" else slice(s.shape[0] - t.r, None)
    return balanced(u[:, kept], s[kept], vh[kept] @ inverse, t.scaling)


def _begun(model: ModelT, found: Sequence[Mapping[str, LoRA]], init: str) -> ModelT:
    assert model.adapter is not None
    base, adapter = started(model.base, model.adapter, found)
    spec = replace(model.spec, lora=replace(_lora(model), init_lora_weights=init))
    return cast(ModelT, replace(cast(Any, model), spec=spec, base=base, adapter=adapter))


# ── lora_ga ───────────────────────────────────────────────────────────────────────────────


def _lora_ga(model: ModelT, batches: Sequence[Batch], choices: Choices) -> ModelT:
    lora, generator = _lora(model), torch.Generator().manual_seed(choices.random_state)
    pair = partial(_lora_ga_pair, choices=choices, generator=generator)
    found: list[dict[str, LoRA]] = []
    for i, gradients in _gradients(model, batches):
        params = model.base["layers"][i]
        found.append({t.name: pair(gradients[t.name], params[t.name], t) for t in lora.targets[i]})
    return _begun(model, found[::-1], "lora_ga")


def _gradients(
    model: Any, batches: Sequence[Batch]
) -> Iterator[tuple[int, dict[str, Float[Tensor, "d_out d_in"]]]]:
    """(layer, gradient of the loss by the weight of each target), the last layer first."""
    base, spec = model.base, model.spec
    passes = _passes(model, batches, use_label_mask=False)
    entered = [[x for x, _, _ in passes]]  # by layer, by batch
    for _, rows in _layers(model, passes):
        _run_out(rows)
        entered.append([x for x, _, _ in passes])
    device = base["norm"].device
    arrived = zip(entered.pop(), batches, strict=True)
    flowing = [_head_gradient(x.to(device), base, spec, batch).cpu() for x, batch in arrived]
    for i in reversed(range(len(entered))):
        names = [t.name for t in _lora(model).targets[i]]
        total: dict[str, Tensor] = {}
        for n, x in enumerate(entered.pop()):
            weights = {name: dense(base["layers"][i][name]["weight"], x.dtype) for name in names}
            at = _at(spec, batches[n], x.dtype)
            run = partial(_layer_product, base=base, spec=spec, i=i, at=at)
            leaves = {"x": x.to(device), "weights": weights}
            _, grads = value_and_grad(run)(leaves, dy=flowing[n].to(device))
            flowing[n] = grads["x"].cpu()
            for name, g in grads["weights"].items():
                wide = g.to(torch.promote_types(g.dtype, torch.float32)) / len(batches)
                total[name] = total[name] + wide if name in total else wide
        yield i, total


def _head_gradient(x: Tensor, base: Base, spec: Spec, batch: Batch) -> Float[Tensor, "b t d"]:
    """Of the mean loss, by what enters the final norm."""
    following = F.pad(trained_labels(batch)[:, 1:], (0, 1), value=IGNORE)

    def loss(x: Float[Tensor, "b t d"]) -> Float[Tensor, ""]:
        normed = rms_norm(x, base["norm"], spec.config.rms_norm_eps)
        logp = linear_logprobs(
            normed.flatten(0, 1), head(None, base, spec)["weight"], following.flatten()
        )
        return -logp.sum() / (following != IGNORE).sum().clamp(min=1)

    return value_and_grad(loss)(x)[1]


def _layer_product(
    leaves: dict[str, Any], *, dy: Tensor, base: Base, spec: Spec, i: int, at: Where
) -> Float[Tensor, ""]:
    """<layer(x), dy>, whose gradients are those of the loss."""
    params = dict(base["layers"][i])
    params |= {n: {**params[n], "weight": w} for n, w in leaves["weights"].items()}
    static, mask = layer_spec(spec, i), at.masks[spec.config.layer_types[i]]
    x = leaves["x"]
    x = x + attention_block(x, params, {}, at.cos, at.sin, mask, static, None)
    y = mlp_block(x, params, {}, static, None)
    wide = torch.promote_types(y.dtype, torch.float32)
    return (y.to(wide) * dy.to(wide)).sum()


def _lora_ga_pair(
    gradient: Float[Tensor, "d_out d_in"],
    linear: Mapping[str, Any],
    t: Target,
    choices: Choices,
    generator: torch.Generator,
) -> LoRA:
    rank = min(4 * t.r, *gradient.shape)
    u, s, vh = randomised_svd(gradient, rank, 4, generator)
    for_a, for_b = _split(t.r, choices.direction, generator)
    a, b, largest = vh[for_a], u[:, for_b] * s[for_b], s[for_b][0]
    if choices.scale == "stable":
        b = b * (b.shape[0] ** 0.25 / choices.stable_gamma**0.5)
    elif choices.scale == "weight_svd" and largest > 0:
        weight = dense(linear["weight"], gradient.dtype).to(gradient.dtype)
        b = b * (torch.linalg.matrix_norm(weight, 2) / largest)
    elif choices.scale == "gd_scale":
        a, b = a / t.scaling, b / t.scaling
    return LoRA(a, b)


def _split(
    r: int, direction: str, generator: torch.Generator
) -> tuple[Int[Tensor, "r"], Int[Tensor, "r"]]:
    """Which of the first 2r directions A gets, and which B."""
    order = torch.arange(2 * r)
    if direction == "ArB2r":
        return order[:r], order[r:]
    if direction == "A2rBr":
        return order[r:], order[:r]
    if direction == "ArBr":
        return order[1::2], order[0::2]
    drawn = torch.randperm(2 * r, generator=generator)[:r]
    return drawn, drawn


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


def _choice_problems(method: str, choices: Choices) -> list[str]:
    if method not in OF_DATA:
        cure = f"method={method!r}: expected one of {list(OF_DATA)}"
        return [f"{cure}; what needs no data is fastlora.lora's init_lora_weights."]
    default, problems = Choices(), []
    for name, (can_be, expected) in _RULES.items():
        value = getattr(choices, name)
        if name in _TAKES[method]:
            problems += [] if can_be(value) else [f"{name}={value!r}: expected {expected}."]
        elif value != getattr(default, name):
            problems.append(f"{name}={value!r} means nothing to {method!r}; leave it out.")
    return problems


def _model_problems(model: Any, method: str, choices: Choices) -> list[str]:
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
        if (n := _most(t, choices)) > (size := projection_shape(model.spec.config, t.name)[1])
    ]


def _batch_problems(spec: Spec, batches: Sequence[Any], method: str) -> list[str]:
    if not batches:
        return ["batches is empty: expected at least one dict with input_ids."]
    problems = []
    for i, batch in enumerate(batches):
        if not isinstance(batch, Mapping):
            problems.append(
                f"batches[{i}] is a {type(batch).__name__}; expected a dict of tensors."
            )
        else:
            problems += [f"batches[{i}]: {p}" for p in _one_batch_problems(spec, batch, method)]
    return problems


_ENTRIES = ("input_ids", "labels", "attention_mask", "position_ids", "segment_ids")


def _one_batch_problems(spec: Spec, batch: Mapping[str, Any], method: str) -> list[str]:
    needed = ("input_ids", "labels") if method == "lora_ga" else ("input_ids",)
    problems = [f"missing {name}" for name in needed if name not in batch]
    problems += [f"unknown entry {name!r}" for name in sorted(batch.keys() - set(_ENTRIES))]
    if problems:
        return problems
    ids = batch["input_ids"]
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.dtype != torch.int64 or not ids.numel():
        return ["input_ids must be a non-empty int64 tensor [b, t]"]
    shapes = (tuple(ids.shape), (1, ids.shape[1]))
    problems = [
        f"{name} must be an integer tensor {list(ids.shape)}"
        for name, x in batch.items()
        if not isinstance(x, Tensor)
        or x.is_floating_point()
        or tuple(x.shape) not in shapes[: 1 + (name == "position_ids")]
    ]
    if ids.shape[1] > spec.max_seq_length:
        problems.append(f"{ids.shape[1]} tokens a row; max_seq_length is {spec.max_seq_length}")
    if "attention_mask" in batch and not problems and not batch["attention_mask"].any():
        problems.append("attention_mask has no real token")
    if int(ids.min()) < 0 or int(ids.max()) >= spec.config.vocab_size:
        problems.append(f"ids outside the vocabulary [0, {spec.config.vocab_size})")
    return problems
