"""A model prepared for generation: everything that is the same for all tokens, computed once.

The adapter may be a stack of n adapters: every leaf is [n, ...], as in `functional.forward`.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastlora.models.decoder import layer_adapters, product_dtype
from fastlora.models.dora_products import dora_scale
from fastlora.models.embedding import embedding_gain, trained_row_of_id
from fastlora.models.head import Head, head
from fastlora.models.layer_spec import LayerSpec, layer_spec
from fastlora.models.names import with_replaced
from fastlora.models.params import (
    Adapter,
    Base,
    DoRA,
    LayerAdapter,
    LayerParams,
    PreparedDoRA,
)
from fastlora.models.self_contained import self_contained
from fastlora.models.spec import Spec
from fastlora.models.stacks import scaled_stack, stack_size
from fastlora.models.state import ModelState
from fastlora.ops.dispatch import use_kernel
from fastlora.runtime.layer_fetching import FetchedLayers, LayerPass, taken, with_resident_edges


class PreparedLayer(NamedTuple):
    """One decoder layer."""

    # LayerParams, with the adapter's copies of base tensors in their places. Of a sharded base a
    # function that fetches them.
    params: Any
    # Matrices in the dtype of the layer's products; DoRA as PreparedDoRA. Of a stack: [n, ...].
    adapter: LayerAdapter
    spec: LayerSpec
    attention_type: str  # "full_attention" or "sliding_attention"


class PreparedModel(NamedTuple):
    """A model as generation uses it.

    Trained copies of base tensors are in their places in `base` and `layers`. Those of a stack are
    in `adapter` and `layer_copies`, and `forward` puts each row's own in place.
    """

    spec: Spec
    base: Base
    adapter: Adapter | None  # of a stack only its tensors outside the layers, if there are any
    layers: tuple[PreparedLayer, ...]
    stack_size: int | None  # number of adapters; None: the adapter is not a stack
    layer_copies: tuple[dict[str, Tensor], ...]  # of a stack; names as in Adapter's "replaced"
    embedding_gain: Float[Tensor, "*n d"] | None  # of DoRA on the embedding
    row_of_id: Int[Tensor, "v"] | None  # of trained rows of the embedding
    head: Head | None  # None if the rows of a stack have different heads
    added: dict[str, Float[Tensor, "..."]]  # place -> a vector to add there at every position


def prepare(model: ModelState) -> PreparedModel:
    """Cast the adapter, put copies of base tensors in place, and compute DoRA's norms, once."""
    size = stack_size(model.adapter)
    if size is not None and model.adapter is not None:
        scaled = scaled_stack(model.adapter, model.spec)
        spec = replace(model.spec, stack_factors=())
        return _prepare_stack(replace(model, adapter=scaled, spec=spec), size)
    model = self_contained(model, unpark=model.adapter is None)
    # Embedding and head are read for every token, so they stay on the device meanwhile.
    model = replace(model, base=with_resident_edges(model.base))
    adapter, spec = model.adapter, model.spec
    base = with_replaced(model.base, adapter, tied=spec.extras.tied)
    fused = use_kernel(base["norm"], spec.kernels)
    adapters = layer_adapters(adapter, spec.config)
    layers = tuple(
        PreparedLayer(
            params,
            _prepared_adapter(adapters[i], params, spec, i, base["norm"].dtype),
            layer_spec(spec, i, fused=fused),
            spec.config.layer_types[i],
        )
        for i, params in enumerate(_params_by_layer(base))
    )
    gain = embedding_gain(adapter, base, spec)
    rows = None if adapter is None else trained_row_of_id(spec, base)
    none = ({},) * len(layers)
    parts = head(adapter, base, spec)
    return PreparedModel(spec, base, adapter, layers, None, none, gain, rows, parts, {})


def _params_by_layer(base: Base) -> Sequence[LayerParams | Callable[[], LayerParams]]:
    """The layers, or functions that fetch them for one pass after the other."""
    layers = base["layers"]
    if not isinstance(layers, FetchedLayers):
        return layers
    passes = LayerPass(layers, cyclic=True)
    return [partial(passes.params, i) for i in range(len(layers))]


def _prepared_adapter(
    adapter: LayerAdapter,
    params: LayerParams | Callable[[], LayerParams],
    spec: Spec,
    layer: int,
    dtype: torch.dtype,
) -> LayerAdapter:
    """A layer's adapter as `PreparedLayer` has it."""
    narrow = product_dtype(adapter, spec, dtype)
    if spec.qat_scheme is not None:  # rounds W + s B A, and needs DoRA's magnitude for it
        return narrow
    scalings = dict(layer_spec(spec, layer).scalings)
    return {
        name: PreparedDoRA(x.a, x.b, dora_scale(taken(params)[name], x, scalings[name]))
        if isinstance(x, DoRA)
        else x
        for name, x in narrow.items()
    }


def _prepare_stack(model: ModelState, size: int) -> PreparedModel:
    """`prepare` for a stack of adapters. Each row puts its own copies of base tensors in place."""
    # Folding an offset makes one adapter of base and adapter, which vmap does for each of a stack.
    folded: dict[str, ModelState] = {}

    def tensors(adapter: Adapter) -> Any:
        one = self_contained(replace(model, adapter=adapter), unpark=False)
        folded["model"] = one
        assert one.adapter is not None
        narrow = [
            _prepared_adapter(x, params, one.spec, i, model.base["norm"].dtype)
            for i, (x, params) in enumerate(
                zip(one.adapter["layers"], one.base["layers"], strict=True)
            )
        ]
        gain = embedding_gain(one.adapter, one.base, one.spec)
        return {**one.adapter, "layers": tuple(narrow)}, {} if gain is None else {"gain": gain}

    stack: Any = model.adapter
    adapter, gain = torch.vmap(tensors)(stack)
    spec, base = folded["model"].spec, folded["model"].base
    layers = tuple(
        PreparedLayer(base["layers"][i], x, layer_spec(spec, i), spec.config.layer_types[i])
        for i, x in enumerate(adapter["layers"])
    )
    edges, copies = _split(adapter)
    rows = trained_row_of_id(spec, base)
    parts = head(None, base, spec) if edges is None else None
    embed_gain = gain.get("gain")
    return PreparedModel(spec, base, edges, layers, size, copies, embed_gain, rows, parts, {})


def _split(adapter: Any) -> tuple[Any, tuple[dict[str, Tensor], ...]]:
    """(an adapter tree without what belongs to layers, or None; the copies of each layer)."""
    replaced = adapter.get("replaced", {})
    copies = tuple(
        {name: x for name, x in replaced.items() if name.startswith(f"model.layers.{i}.")}
        for i in range(len(adapter["layers"]))
    )
    edges = {key: x for key, x in adapter.items() if key not in ("layers", "replaced")}
    outside = {name: x for name, x in replaced.items() if not name.startswith("model.layers.")}
    if outside:
        edges["replaced"] = outside
    return (edges or None), copies
