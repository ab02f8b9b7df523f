"""Runs the base layer by layer over batches, and yields what enters each projection.

The device holds one layer's statistics at a time; the batches' hidden states wait on the host.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from fastlora.models.attention import (
    add_residual,
    attention_output,
    layer_norm,
    plain_attention,
    queries_keys_values,
)
from fastlora.models.decoder import Positions, position_tables
from fastlora.models.embedding import scaled
from fastlora.models.layer_spec import LayerSpec, layer_spec
from fastlora.models.mlp import down_name, gated
from fastlora.models.params import Base, LayerParams
from fastlora.models.projections import project
from fastlora.models.spec import Spec, Target
from fastlora.models.state import Batch, ModelState
from fastlora.ops.loss.ignore import IGNORE
from fastlora.runtime.layer_fetching import resident

# Projection -> the one under whose name `layer_inputs` has its input.
SHARED_INPUT = {
    **dict.fromkeys(("k_proj", "v_proj", "qkv_proj"), "q_proj"),
    **dict.fromkeys(("up_proj", "gate_up_proj", "input_linear"), "gate_proj"),
    "output_linear": "down_proj",
}

# For each batch: projection -> its inputs at the counted tokens, in at least float32.
Inputs = Iterator[dict[str, Float[Tensor, "n _"]]]


def layer_inputs(
    x: Float[Tensor, "b t d"],
    params: LayerParams,
    cos: Float[Tensor, "#b t hd"],
    sin: Float[Tensor, "#b t hd"],
    mask: Bool[Tensor, "#b 1 t t"] | None,
    spec: LayerSpec,
) -> tuple[dict[str, Float[Tensor, "b t _"]], Float[Tensor, "b t d"]]:
    """(the inputs of q_proj, o_proj, gate_proj and down_proj, the layer's output), of the base.

    SHARED_INPUT has the other projections.
    """
    inside = layer_norm(x, params, spec.norms.attention_in, spec)
    q, k, v = queries_keys_values(x, params, {}, cos, sin, spec, None)
    heads = plain_attention(q, k, v, mask, spec)
    x = add_residual(x, attention_output(heads, params, {}, spec, None), spec)
    middle = layer_norm(x, params, spec.norms.mlp_in, spec)
    hidden = gated(middle, params, {}, spec, None)
    (down,) = project(hidden, (down_name(params),), params, {}, spec, None)
    out = add_residual(x, layer_norm(down, params, spec.norms.mlp_out, spec), spec)
    inputs = {"q_proj": inside, "o_proj": heads.transpose(1, 2).flatten(2)}
    return inputs | {"gate_proj": middle, "down_proj": hidden}, out


class BatchState(NamedTuple):
    """One batch between two layers."""

    x: Float[Tensor, "b t d"]  # hidden states that enter the next layer; on the host
    batch: Batch
    counted: Bool[Tensor, "b t"]  # the tokens that statistics count


def embed_batches(
    model: ModelState, batches: Sequence[Batch], *, use_label_mask: bool
) -> list[BatchState]:
    """The batches before the first layer. Padding does not count.

    Args:
        model: its base's embedding is used.
        batches: on the base's device.
        use_label_mask: tokens with label -100 do not count either, in batches with labels.
    """
    return [_embed(model.base, model.spec, batch, use_label_mask) for batch in batches]


def _embed(base: Base, spec: Spec, batch: Batch, use_label_mask: bool) -> BatchState:
    x = scaled(F.embedding(batch["input_ids"], resident(base["embed_tokens"])), spec)
    counted = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    if use_label_mask and "labels" in batch:
        counted = counted & (batch["labels"] != IGNORE)
    return BatchState(x.cpu(), batch, counted)


def inputs_by_layer(model: ModelState, states: list[BatchState]) -> Iterator[tuple[int, Inputs]]:
    """Yield (layer, its projections' inputs for each batch), from the first layer to the last.

    The entries of `states` are replaced while a layer runs. Read the inputs of a layer before
    asking for the next layer; batches that were not read are then run for their hidden states.
    """
    for i, params in enumerate(model.base["layers"]):
        inputs = _run_layer(model, states, i, params)
        yield i, inputs
        run_to_end(inputs)


def run_to_end(inputs: Inputs) -> None:
    """Run a layer over the batches that are left, and drop their inputs."""
    for _ in inputs:
        pass


def _run_layer(model: ModelState, states: list[BatchState], i: int, params: LayerParams) -> Inputs:
    spec, mask_type = layer_spec(model.spec, i), model.spec.config.layer_types[i]
    for n, (x, batch, counted) in enumerate(states):
        x = x.to(model.base["norm"].device)
        positions = batch_positions(model.spec, batch, x.dtype)
        mask = positions.masks[mask_type]
        inputs, out = layer_inputs(x, params, *positions.tables[mask_type], mask, spec)
        states[n] = BatchState(out.cpu(), batch, counted)
        dtype = torch.promote_types(x.dtype, torch.float32)
        yield {name: y[counted].to(dtype) for name, y in inputs.items()}


def batch_positions(spec: Spec, batch: Batch, dtype: torch.dtype) -> Positions:
    """Position tables and masks of a batch.

    Rebuilt for each layer: keeping the [b, 1, t, t] masks of all batches would use too much memory.
    """
    optional = [batch.get(n) for n in ("attention_mask", "position_ids", "segment_ids")]
    return position_tables(spec.config, batch["input_ids"], dtype, *optional)


def targets_by_input(targets: Sequence[Target]) -> dict[str, list[Target]]:
    """First projection with an input (SHARED_INPUT) -> all targets with that input."""
    groups: dict[str, list[Target]] = {}
    for t in targets:
        groups.setdefault(SHARED_INPUT.get(t.name, t.name), []).append(t)
    return groups
