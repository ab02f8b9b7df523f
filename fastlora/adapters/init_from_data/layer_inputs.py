"""layer_inputs."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from fastlora.models.attention import attention_output, queries_keys_values
from fastlora.models.decoder import Positions, position_tables
from fastlora.models.params import Base, LayerParams
from fastlora.models.projections import LayerSpec, layer_spec, project
from fastlora.models.spec import Spec, Target
from fastlora.models.state import Batch, ModelState
from fastlora.ops.attention.attention import attention
from fastlora.ops.loss.linear_cross_entropy import IGNORE
from fastlora.ops.rms_norm import rms_norm

# Projections that read the same input, by the first of them.
SHARED_INPUT = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


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


def start_passes(model: ModelState, batches: Sequence[Batch], use_label_mask: bool) -> list[_Pass]:
    return [_pass(model.base, model.spec, batch, use_label_mask) for batch in batches]


def _pass(base: Base, spec: Spec, batch: Batch, use_label_mask: bool) -> _Pass:
    x = F.embedding(batch["input_ids"], base["embed_tokens"])
    counted = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    if use_label_mask and "labels" in batch:
        counted = counted & (batch["labels"] != IGNORE)
    return _Pass(x.cpu(), batch, counted)


def batch_positions(spec: Spec, batch: Batch, dtype: torch.dtype) -> Positions:
    """Made again for every layer: masks [b, 1, t, t] of all batches would not be little."""
    optional = [batch.get(n) for n in ("attention_mask", "position_ids", "segment_ids")]
    return position_tables(spec.config, batch["input_ids"], dtype, *optional)


Rows = Iterator[dict[str, Float[Tensor, "n _"]]]


def layer_rows(model: ModelState, passes: list[_Pass]) -> Iterator[tuple[int, Rows]]:
    """(layer, for each batch: projection -> its counted inputs), the first layer first.

    Rows of one layer are read to the end before the next layer is asked for; what is left of them
    is run then, for the hidden states that follow.
    """
    for i, params in enumerate(model.base["layers"]):
        rows = _rows(model, passes, i, params)
        yield i, rows
        exhaust(rows)


def exhaust(rows: Rows) -> None:
    for _ in rows:
        pass


def _rows(model: ModelState, passes: list[_Pass], i: int, params: LayerParams) -> Rows:
    spec, kind = layer_spec(model.spec, i), model.spec.config.layer_types[i]
    for n, (x, batch, counted) in enumerate(passes):
        x = x.to(params["input_layernorm"].device)
        at = batch_positions(model.spec, batch, x.dtype)
        inputs, out = layer_inputs(x, params, at.cos, at.sin, at.masks[kind], spec)
        passes[n] = _Pass(out.cpu(), batch, counted)
        wide = torch.promote_types(x.dtype, torch.float32)
        yield {name: y[counted].to(wide) for name, y in inputs.items()}


def targets_by_source(targets: Sequence[Target]) -> dict[str, list[Target]]:
    """Projection whose input is read -> the targets that read it."""
    found: dict[str, list[Target]] = {}
    for t in targets:
        found.setdefault(SHARED_INPUT.get(t.name, t.name), []).append(t)
    return found
