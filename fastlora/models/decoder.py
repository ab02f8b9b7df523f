"""The decoder: embedding, layers and final norm. Callers apply the head (head.py) to its output."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastlora.models.capture import Taps
from fastlora.models.config import LlamaConfig
from fastlora.models.context_part import ContextPart, part_noise, part_tables
from fastlora.models.embedding import embed, noise_scale
from fastlora.models.examples import ExampleRows, example_records
from fastlora.models.fetched_layer import run_layer
from fastlora.models.fused_qkv import with_fused_qkv
from fastlora.models.graph_input import attach_to_graph, requires_grad
from fastlora.models.init_offset import cast_offset
from fastlora.models.layer_spec import layer_spec
from fastlora.models.levels import layer_levels, mlp_chunks, offload_levels
from fastlora.models.names import with_replaced
from fastlora.models.neftune import with_noise
from fastlora.models.params import Adapter, Base, LayerAdapter
from fastlora.models.positions import attention_mask_2d, first_seen, positions, sequence_lengths
from fastlora.models.rope_tables import tables_by_type
from fastlora.models.spec import Spec
from fastlora.models.stacks import (
    StackRows,
    factor_tensors,
    grouped_records,
    row_keys,
    scaled_layer,
)
from fastlora.ops.attention.flash import Spans, kernel_supports, make_spans
from fastlora.ops.cast import cast, cast_layers, matrices_of
from fastlora.ops.dispatch import transforms_active, use_kernel
from fastlora.ops.dropout import fold, from_row
from fastlora.ops.rms_norm import rms_norm
from fastlora.runtime.compiled import compiled, compiles
from fastlora.runtime.host_offload import Copies, HostStash
from fastlora.runtime.layer_fetching import open_pass


class Positions(NamedTuple):
    """Tensors that all layers of one type share in a forward pass: cos and sin of RoPE, and masks,
    by layer type."""

    tables: dict[str, tuple[Float[Tensor, "#b t hd"], Float[Tensor, "#b t hd"]]]
    masks: dict[str, Bool[Tensor, "#b 1 t t"] | None]


def position_tables(
    config: LlamaConfig,
    input_ids: Int[Tensor, "b t"],
    dtype: torch.dtype,
    attention_mask: Int[Tensor, "b t"] | None,
    position_ids: Int[Tensor, "#b t"] | None,
    segment_ids: Int[Tensor, "b t"] | None,
) -> Positions:
    """RoPE tables and attention masks for one batch. Each mask is built once for all layers."""
    masked = (attention_mask, position_ids, segment_ids)
    tables = _rope_tables(config, input_ids, dtype, *masked)
    t, device = input_ids.shape[1], input_ids.device
    masks = {
        layer_type: attention_mask_2d(t, window, attention_mask, segment_ids, device)
        for layer_type, window in _windows(config).items()
    }
    return Positions(tables, masks)


def _rope_tables(
    config: LlamaConfig,
    input_ids: Int[Tensor, "b t"],
    dtype: torch.dtype,
    attention_mask: Int[Tensor, "b t"] | None,
    position_ids: Int[Tensor, "#b t"] | None,
    segment_ids: Int[Tensor, "b t"] | None,
) -> dict[str, tuple[Float[Tensor, "#b t hd"], Float[Tensor, "#b t hd"]]]:
    if position_ids is None:
        position_ids = positions(input_ids, attention_mask, segment_ids)
    lengths = sequence_lengths(position_ids, segment_ids)
    return tables_by_type(config, position_ids, lengths, dtype)


def _tables(
    spec: Spec, x: Tensor, input_ids: Tensor, masked: tuple, fused: bool, part: ContextPart | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(RoPE's tables, masks) by layer type; `masked`: attention_mask, positions, segments."""
    if part is not None:
        return part_tables(part, spec.config, _windows(spec.config), x.dtype, fused)
    tables = _rope_tables(spec.config, input_ids, x.dtype, *masked)
    return tables, attention_masks(spec, x, masked[0], masked[2], fused)


def _windows(config: LlamaConfig) -> dict[str, int | None]:
    """The layer types of a model -> their sliding window; None: all earlier tokens."""
    windows = {"full_attention": None, "sliding_attention": config.sliding_window}
    return {layer_type: windows[layer_type] for layer_type in sorted(set(config.layer_types))}


def layer_adapters(adapter: Adapter | None, config: LlamaConfig) -> tuple[LayerAdapter, ...]:
    """One dict per layer; empty dicts for the base model."""
    return ({},) * config.num_hidden_layers if adapter is None else adapter["layers"]


def hidden_states(
    adapter: Adapter | None,
    base: Base,
    spec: Spec,
    input_ids: Int[Tensor, "b t"],
    *,
    attention_mask: Int[Tensor, "b t"] | None = None,
    position_ids: Int[Tensor, "#b t"] | None = None,
    segment_ids: Int[Tensor, "b t"] | None = None,
    seed: int | Int[Tensor, "..."] | None = None,
    first_row: Int[Tensor, ""] | None = None,
    rows: StackRows | None = None,
    examples: ExampleRows | None = None,
    inputs_embeds: Float[Tensor, "b t d"] | None = None,
    taps: Taps | None = None,
    part: ContextPart | None = None,
) -> Float[Tensor, "b t d"]:
    """The final norm's output, in the base's dtype: the input of the head.

    Args:
        adapter: the trained tensors; None computes the base model.
        base: frozen weights.
        spec: how to run them.
        input_ids: int64 in [0, v).
        attention_mask: 1 = real token; padding left or right.
        position_ids: default: see `positions.positions`.
        segment_ids: packed documents.
        seed: of the LoRA dropout masks and of NEFTune's noise; None: without both.
        first_row: number of the first token's row in the dropout masks, if the rows of a larger
            batch run one by one under torch.vmap; None: 0.
        rows: of a stack, for which `stacks.runs_in_groups`; all inputs are sorted. None: `adapter`
            is one adapter.
        examples: of one adapter whose gradient is computed for each example; None: for all of them
            together.
        inputs_embeds: the input of the first layer, without noise, in any floating-point dtype.
            Of input_ids then only the shape is read. None: input_ids are embedded.
        taps: captures and adds tensors; None: nothing.
        part: of rows with tokens on other ranks; gives all that follows input_ids. None: whole.
    """
    config, taps = spec.config, taps or Taps()
    masked = (attention_mask, position_ids, segment_ids)
    # Trained copies take the originals' places in the tree, so no layer needs to know of them.
    base = with_replaced(base, adapter, tied=spec.extras.tied)
    if inputs_embeds is None:
        x = embed(input_ids, adapter, base, spec)
        x = _noisy(x, spec, input_ids, *masked, seed, first_row, rows, part)
    else:
        x = inputs_embeds.to(base["embed_tokens"].dtype)
    x = taps.at("embed", x)
    use_compiled = compiles(spec.compile, x.device) and not transforms_active()
    # Only a compiled backward pass uses the single product of fused weights.
    backward = use_compiled and torch.is_grad_enabled()
    fused = use_kernel(x, spec.kernels)
    tables, masks = _tables(spec, x, input_ids, masked, fused, part)
    first_row, context = (first_row, None) if part is None else (part.first_rows, part.group)
    keys = layer_keys(spec, seed, x.device, first_row, rows, input_ids.shape[1])
    factors = factor_tensors(spec, x.device) if rows is not None else None
    # `fetched` is None if all layers are on the device.
    stash, fetched = _stash(spec, x), open_pass(base["layers"])
    # The stash casts a layer's matrices again, and a stack's are scaled first.
    by_layer = any(x is not None for x in (stash, fetched, rows, spec.qat_scheme))
    adapters = cast_layers(layer_adapters(adapter, config), None if by_layer else x.dtype)
    for i, level in enumerate(_levels(spec, stash, input_ids.numel(), x)):
        x = taps.at(f"layers.{i}.in", x)
        if use_compiled and torch.is_grad_enabled() and not x.requires_grad:
            # Without this, the input of the first adapted layer would be the only one that does not
            # require a gradient, and that layer would need a separate compiled graph. That is
            # twice the compile time, and would save the dx of q, k and v in one layer.
            trained = bool(adapters[i]) if examples else requires_grad(adapters[i])
            x = attach_to_graph(x) if trained else x
        mask, (cos, sin) = masks[config.layer_types[i]], tables[config.layer_types[i]]
        lora, copies = _records(adapters[i], spec, i, x.dtype, rows, factors)
        lora = lora if examples is None else example_records(lora, examples, i)
        params = cast_offset(fetched.params(i) if fetched else base["layers"][i], x.dtype)
        params = with_fused_qkv(params) if backward else params
        rest = (params, lora, cos, sin, mask, keys[i])
        # Dropout masks, a stack's groups and those of examples are of all rows.
        whole = keys[i] is not None or rows is not None or examples is not None
        chunks = mlp_chunks(config, i, level, input_ids.numel(), whole=whole)
        of_layer = layer_spec(spec, i, fused=fused, stacked=rows is not None, context=context)
        static = of_layer, level, chunks
        layer, rest, static = taps.layer(i, rest, static)
        how = partial(_run, layer), static, use_compiled
        x = taps.after(i, run_layer(fetched, i, rest, how, x, stash, copies))
        del params, rest  # a fetched layer's memory can now receive the next layer but one
    norm = (config.rms_norm_eps, config.norm_kind)
    x = _run(rms_norm, (base["norm"],), norm, use_compiled, x)
    return taps.at("norm", x)


def _levels(
    spec: Spec, stash: HostStash | None, tokens: int, x: Float[Tensor, "b t d"]
) -> tuple[str, ...]:
    """The recompute level of each layer."""
    if stash is None:
        return layer_levels(spec.config, spec.recompute)
    return offload_levels(spec.config, tokens, x.element_size())


def _noisy(
    x: Float[Tensor, "b t d"],
    spec: Spec,
    input_ids: Int[Tensor, "b t"],
    attention_mask: Int[Tensor, "b t"] | None,
    position_ids: Int[Tensor, "#b t"] | None,
    segment_ids: Int[Tensor, "b t"] | None,
    seed: int | Int[Tensor, "..."] | None,
    first_row: Int[Tensor, ""] | None,
    rows: StackRows | None,
    part: ContextPart | None,
) -> Float[Tensor, "b t d"]:
    """The embedded tokens with NEFTune's noise, if the spec asks for it and there is a seed."""
    if spec.neftune_alpha is None or seed is None:
        return x
    key, alpha = seed_tensor(seed, x.device), spec.neftune_alpha * noise_scale(spec.config)
    if part is not None:
        return part_noise(x, part, alpha, key)
    if position_ids is None:
        position_ids = positions(input_ids, attention_mask, segment_ids)
    lengths = sequence_lengths(position_ids, segment_ids)
    if rows is not None:
        key, first_row = row_keys(key, rows, input_ids.shape[1])
    return with_noise(x, alpha, key, lengths, first_row)


def attention_masks(
    spec: Spec,
    x: Float[Tensor, "b t d"],
    attention_mask: Int[Tensor, "b t"] | None,
    segment_ids: Int[Tensor, "b t"] | None,
    fused: bool,
) -> dict[str, Bool[Tensor, "#b 1 t t"] | Spans | None]:
    """Layer type -> attention mask; None if attention is only causal.

    Documents and windows are Spans, which need no [b, 1, t, t] mask, if the kernels of
    ops/attention/flash.py run and no row is padded.
    """
    (b, t, _), config, masks = x.shape, spec.config, {}
    spans_work = (
        fused
        and attention_mask is None
        and kernel_supports(x.dtype, config.num_attention_heads, config.head_dim, t)
    )
    for layer_type, window in _windows(config).items():
        only_causal = segment_ids is None and (window is None or window >= t)
        if spans_work and not only_causal:
            first = first_seen(t, window, segment_ids, x.device)
            masks[layer_type] = make_spans(first.expand(b, t))
        else:
            masks[layer_type] = attention_mask_2d(t, window, attention_mask, segment_ids, x.device)
    return masks


def _stash(spec: Spec, x: Tensor) -> HostStash | None:
    """Host memory for the activations that layers keep; None: they stay on the device.

    torch.func refuses saved-tensor hooks, so its transforms run without a stash.
    """
    # Without gradients no activation is kept. Inside the caller's torch.compile its partitioner
    # decides.
    offload = spec.recompute == "offload" and x.is_cuda and not torch.compiler.is_compiling()
    recording = torch.is_grad_enabled() and not transforms_active()
    return HostStash(x.device) if offload and recording else None


def _run(fn: Callable, rest: tuple, static: tuple, use_compiled: bool, x: Tensor) -> Any:
    """fn(x, *rest, *static), compiled or not."""
    return compiled(fn, (x, *rest), *static) if use_compiled else fn(x, *rest, *static)


def _records(
    adapter: LayerAdapter,
    spec: Spec,
    layer: int,
    dtype: torch.dtype,
    rows: StackRows | None,
    factors: Sequence[dict[str, Float[Tensor, "n"]]] | None,
) -> tuple[LayerAdapter, Copies]:
    """(a layer's adapter as the layer takes it, its casts of trained matrices)."""
    if rows is None:
        cast = product_dtype(adapter, spec, dtype)
        # The offload stash finds copies by their addresses, which tensors do not have under
        # torch.func. The stash does not run there.
        pairs = ({}, {}) if transforms_active() else (adapter, cast)
        return cast, Copies(*map(matrices_of, pairs))
    lora = spec.lora
    scalings: dict[str, Any] = {t.name: t.scaling for t in lora.targets[layer]} if lora else {}
    scaled = scaled_layer(adapter, scalings if factors is None else scalings | factors[layer])
    cast = product_dtype(scaled, spec, dtype)
    # A scaled matrix is not a cast of a trained one, so it cannot be cast again.
    pairs = (scaled, cast) if scaled is adapter else ({}, {})
    return grouped_records(cast, rows.groups), Copies(*map(matrices_of, pairs))


def layer_keys(
    spec: Spec,
    seed: int | Int[Tensor, "..."] | None,
    device: torch.device,
    first_row: Int[Tensor, "*pieces"] | None = None,
    rows: StackRows | None = None,
    t: int = 0,
) -> Sequence[Int[Tensor, "..."] | None]:
    """One dropout key per layer, or also per row of a stack or first row; Nones without dropout.

    All keys are folded at once: that takes some ten kernel launches instead of ten per layer.
    """
    key, n = dropout_key(spec, seed, device), spec.config.num_hidden_layers
    if key is None:
        return (None,) * n
    if rows is not None:
        of_rows, first_rows = row_keys(key, rows, t)
        layers = torch.arange(n, device=device)[:, None]
        return from_row(fold(of_rows, layers), first_rows).unbind()
    keys = fold(key, torch.arange(n, device=device))
    pieces = first_row is not None and first_row.dim() == 1
    return from_row(keys[:, None] if pieces else keys, first_row).unbind()


def dropout_key(
    spec: Spec, seed: int | Int[Tensor, "*n"] | None, device: torch.device
) -> Int[Tensor, "*n"] | None:
    """The seed, or the seed of each adapter, as a tensor on the device; None without dropout."""
    if seed is None or spec.lora is None or spec.lora.lora_dropout == 0.0:
        return None
    return seed_tensor(seed, device)


def seed_tensor(seed: int | Int[Tensor, "*n"], device: torch.device) -> Int[Tensor, "*n"]:
    """The seed, or the seed of each adapter, as an int64 tensor on the device."""
    if isinstance(seed, Tensor):
        return seed.to(device, torch.int64)
    # torch.tensor would copy from pageable host memory, which waits for the GPU.
    return torch.full((), seed, dtype=torch.int64, device=device)


def product_dtype(adapter: LayerAdapter, spec: Spec, dtype: torch.dtype) -> LayerAdapter:
    """A layer's adapter with its matrices in `dtype`.

    Fake quantisation gets the original dtype, so that W + s B A is rounded only once.
    """
    return adapter if spec.qat_scheme is not None else cast(adapter, dtype)
