"""merge(): folds the adapter into a new base.

If embedding and head are tied and an adapter changes only one of them, they become two matrices.
PEFT 0.21.2 folds LoRA on a tied embedding into the head as well, which changes the logits.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fastlora.arguments import check_arguments
from fastlora.checkpoints.unquantized import MatrixSource, dequantized_matrices
from fastlora.errors import raise_problems
from fastlora.models.config import LlamaConfig
from fastlora.models.input_checks import MODEL
from fastlora.models.names import (
    EDGE_WEIGHTS,
    EMBED_TOKENS,
    LM_HEAD,
    NORM,
    base_from_tensors,
    layer_from_tensors,
    projection_bias,
    projection_path,
    tensors_from_base,
    with_replaced,
)
from fastlora.models.params import (
    Adapter,
    AdapterRecord,
    Base,
    BiasedLoRA,
    DoRA,
    ExpertLoRA,
    Linear,
    LoRA,
)
from fastlora.models.self_contained import self_contained
from fastlora.models.spec import UNTIED, Extras, Spec
from fastlora.models.stacks import check_one_adapter
from fastlora.models.state import ModelState, StateT, require_adapter
from fastlora.ops.dispatch import refuse_transforms
from fastlora.ops.linear.merged_weight import adapted_weight
from fastlora.ops.quant.weights import Quantized
from fastlora.runtime.layer_fetching import described, is_sharded, with_resident_edges


def merge(model: StateT) -> StateT:
    """The model with its adapter folded into a new base.

        base    {"layers": ({"q_proj": {"weight": W}, ...}, ...), ...}
        adapter {"layers": ({"q_proj": (A, B), ...}, ...)}
    ->  base    {"layers": ({"q_proj": {"weight": W + scaling * B A}, ...}, ...), ...}
        adapter None

    Sums are in float32 (in float64 if base or adapter has that dtype) and rounded once to the
    base's dtype. Only the changed matrices are new; the rest of the base is shared with the given
    model. Keep the given model to undo a merge: in 16 bits subtraction does not restore the base.
    The result of a base in 4 or 8 bits is in 16 bits, with all matrices dequantised.

    The new model's `spec.changed` names the matrices that its checkpoint does not have. An adapter
    that is trained over the new model cannot be saved alone if these are more than embedding and
    head: write the merged model with `save_pretrained_merged` and load that folder first.

    Raises:
        ValueError: `model` is not a model, or has no adapter or a stack of them; or naming
            the weights that would become NaN or infinite.
    """
    refuse_transforms("fastlora.merge")
    check_arguments("fastlora.merge", model=(model, MODEL))
    model = self_contained(model)
    require_adapter(model)
    check_one_adapter(model)
    matrix = dequantized_matrices(model.base["norm"].dtype)
    config, tensors, merged = merged_tensors(model, matrix)
    # Each tensor is computed twice. The check drops what it computes, so a merge that fails takes
    # the memory of one matrix and not of a second base.
    check_finite(merged)
    if is_sharded(model.base):
        base = _resharded(model.base, config, tensors, merged)
    else:
        base = base_from_tensors(
            config, {**tensors} | {name: make() for name, make in merged.items()}
        )
    untied = config.tie_word_embeddings != model.spec.config.tie_word_embeddings
    changed = dict.fromkeys((*model.spec.changed, *merged, *([UNTIED] if untied else [])))
    spec = replace(model.spec, config=config, lora=None, changed=tuple(changed))
    return replace(model, spec=spec, base=base, adapter=None)


def _resharded(
    old: Base,
    config: LlamaConfig,
    tensors: Mapping[str, Any],
    merged: Mapping[str, Callable[[], Tensor]],
) -> Base:
    """The merged base, kept as the old one is: one layer at a time is whole."""
    tensor = lambda name: merged[name]() if name in merged else tensors[name]
    layers: Any = old["layers"]
    edge: Any = old["embed_tokens"]
    base: Any = {**old, "layers": layers.rebuilt(lambda i: layer_from_tensors(config, i, tensor))}
    layers.release()
    if not config.tie_word_embeddings and "lm_head" not in base:
        base["lm_head"] = edge.remade(tensor(LM_HEAD), "lm_head")
    for key, name in EDGE_WEIGHTS.items():
        if name in merged:
            base[key] = edge.remade(merged[name](), key)
    if NORM in merged:
        base["norm"] = merged[NORM]()
    return base


def merged_tensors(
    model: ModelState, matrix: MatrixSource
) -> tuple[LlamaConfig, Mapping[str, Tensor], dict[str, Callable[[], Tensor]]]:
    """(config, base tensors, merged tensors), the tensors by their names on disk.

        {"model.norm.weight": n, "model.layers.0.self_attn.q_proj.weight": W, ...},
        {"model.layers.0.self_attn.q_proj.weight": a function that returns W + scaling * B A, ...}

    Each merged tensor is returned as a function and computed on demand, so that only one is in
    memory at a time. It replaces the base tensor of the same name. The config's
    `tie_word_embeddings` says whether embedding and head are still one matrix.

    Args:
        model: as `self_contained` returns it. Without an adapter, the third result has only the
            quantised tensors, dequantised.
        matrix: returns the dense matrix of a projection.
    """
    spec, adapter = model.spec, model.adapter
    if adapter is None:
        tensors = tensors_from_base(spec.config, model.base)
        return spec.config, tensors, _dequantized(spec.config, model.base, tensors, matrix)
    config = replace(spec.config, tie_word_embeddings=_stays_tied(spec.config, spec.extras))
    base = with_replaced(model.base, adapter, tied=spec.extras.tied)
    # Separate the pair: from here on the head is a second matrix, still with equal values.
    if not config.tie_word_embeddings and "lm_head" not in base:
        base = base.copy()
        base["lm_head"] = base["embed_tokens"]
    tensors = tensors_from_base(config, base)
    # In this order, because an adapted matrix that is quantised is in both: the merged one counts.
    merged = _dequantized(config, base, tensors, matrix) | _merged_projections(
        spec, base, adapter, matrix
    )
    merged |= _merged_edges(spec, base, adapter)
    for name, copy in adapter.get("replaced", {}).items():
        merged.setdefault(name, copy.detach().clone)
    # A pair that is still tied is one tensor on disk, under the embedding's name.
    if config.tie_word_embeddings:
        merged.pop(LM_HEAD, None)
    return config, tensors, merged


def _dequantized(
    config: LlamaConfig, base: Base, tensors: Mapping[str, Any], matrix: MatrixSource
) -> dict[str, Callable[[], Tensor]]:
    """Name -> a function that returns the dense matrix, for all quantised tensors."""
    kinds = tensors_from_base(config, described(base))
    names = [name for name, x in kinds.items() if isinstance(x, Quantized)]
    return {name: lambda name=name: matrix(name, tensors[name]) for name in names}


def _stays_tied(config: LlamaConfig, extras: Extras) -> bool:
    """Whether a tied embedding and head are still equal after training."""
    lora_or_copy = (
        extras.embed_tokens or extras.lm_head or {EMBED_TOKENS, LM_HEAD} & {*extras.replaced}
    )
    trains_one = bool(lora_or_copy or (extras.tokens and not extras.shared_rows))
    return config.tie_word_embeddings and (extras.tied or not trains_one)


def merged_weight(
    weight: Float[Tensor, "d_out d_in"], lora: AdapterRecord, scaling: float
) -> Float[Tensor, "d_out d_in"]:
    """weight + scaling * b @ a, with rows of DoRA's lengths; at least float32, rounded once."""
    moved = lambda x: x.detach().to(weight.device)
    magnitude = moved(lora.magnitude) if isinstance(lora, DoRA) else None
    return adapted_weight(weight, moved(lora.a), moved(lora.b), magnitude, scaling)


def merged_experts(
    weight: Float[Tensor, "e d_out d_in"], lora: ExpertLoRA, scaling: float
) -> Float[Tensor, "e d_out d_in"]:
    """`merged_weight` of every expert, one at a time."""
    merged = torch.empty_like(weight)
    # The sums are in float32: of all experts at once they would take twice a bf16 tensor's memory.
    for matrix, base, a, b in zip(merged, weight, *lora, strict=True):
        matrix.copy_(merged_weight(base, LoRA(a, b), scaling))
    return merged


def _merged_projections(
    spec: Spec, base: Base, adapter: Adapter, matrix: MatrixSource
) -> dict[str, Callable[[], Tensor]]:
    """Name on disk -> a function that returns the merged weight, for every adapted projection."""
    assert spec.lora is not None, spec
    if problem := merge_problem(spec):
        raise ValueError(problem)
    merged: dict[str, Callable[[], Tensor]] = {}
    for i, targets in enumerate(spec.lora.targets):
        for t in targets:
            lora, path = adapter["layers"][i][t.name], projection_path(i, t.name)
            if isinstance(lora, ExpertLoRA):
                weight = base["layers"][i]["experts"][t.name.removeprefix("experts.")]
                merged[path] = partial(merged_experts, weight, lora, t.scaling)
                continue
            # Looked up when they are needed, because layers may have to be fetched.
            linear, name = partial(_linear, base, i, t.name), f"{path}.weight"
            merged[name] = partial(_merged_linear, matrix, name, linear, lora, t.scaling)
            if isinstance(lora, BiasedLoRA):
                merged[f"{path}.bias"] = partial(_merged_bias, linear, lora, t.scaling)
    return merged


def _linear(base: Base, layer: int, name: str) -> Linear:
    return base["layers"][layer][name]


def _merged_linear(
    matrix: MatrixSource,
    name: str,
    linear: Callable[[], Linear],
    lora: AdapterRecord,
    scaling: float,
) -> Tensor:
    return merged_weight(matrix(name, linear()["weight"]), lora, scaling)


def _merged_bias(linear: Callable[[], Linear], lora: BiasedLoRA, scaling: float) -> Tensor:
    bias = linear().get("bias")
    assert bias is not None  # `merge_problem` says so
    return merged_bias(bias, lora.bias, scaling)


def merged_bias(
    bias: Float[Tensor, "d_out"], of_lora: Float[Tensor, "d_out"], scaling: float
) -> Float[Tensor, "d_out"]:
    """bias + scaling * of_lora, in at least float32, rounded once to bias's dtype. No gradient."""
    wide = torch.promote_types(torch.promote_types(bias.dtype, of_lora.dtype), torch.float32)
    return (bias.to(wide) + scaling * of_lora.detach().to(bias.device, wide)).to(bias.dtype)


def _merged_edges(spec: Spec, base: Base, adapter: Adapter) -> dict[str, Callable[[], Tensor]]:
    """Name on disk -> a function that returns the merged matrix, for embedding and head."""
    extras, merged = spec.extras, {}
    base = with_resident_edges(base) if adapter.keys() - {"layers", "replaced"} else base
    matrices = {EMBED_TOKENS: base["embed_tokens"], LM_HEAD: base.get("lm_head")}
    if "embed_tokens" in adapter and extras.embed_tokens is not None:
        lora, scaling = adapter["embed_tokens"], extras.embed_tokens.scaling
        merged[EMBED_TOKENS] = partial(merged_embedding, base["embed_tokens"], lora, scaling)
    if "lm_head" in adapter and "lm_head" in base and extras.lm_head is not None:
        lora, scaling = adapter["lm_head"], extras.lm_head.scaling
        merged[LM_HEAD] = partial(merged_weight, base["lm_head"], lora, scaling)
    for key, rows in adapter.get("tokens", {}).items():
        ids = dict(extras.tokens)[key]
        for name in (EMBED_TOKENS, LM_HEAD) if extras.shared_rows else (EDGE_WEIGHTS[key],):
            if (matrix := matrices[name]) is not None:
                merged[name] = partial(merged_rows, matrix, ids, rows)
    return merged


def merged_embedding(
    weight: Float[Tensor, "v d"], lora: LoRA | DoRA, scaling: float
) -> Float[Tensor, "v d"]:
    """`merged_weight` of the transposed embedding, which maps one-hot tokens to hidden states."""
    # contiguous: looking up tokens reads rows, which a transposed view scatters over the memory.
    return merged_weight(weight.t(), lora, scaling).t().contiguous()


def merged_rows(
    weight: Float[Tensor, "v d"], ids: tuple[int, ...], rows: Float[Tensor, "n d"]
) -> Float[Tensor, "v d"]:
    """The matrix with the rows of `ids` replaced by trained ones, rounded to its dtype."""
    index = torch.tensor(ids, device=weight.device)
    return weight.detach().index_copy(0, index, rows.detach().to(weight))


def merge_problem(spec: Spec) -> str | None:
    """Why the adapter cannot be merged, and what to do instead; None if it can be merged.

    lora_bias trains a bias, which a base without a bias in the same projection cannot hold.
    """
    lora = spec.lora
    if lora is None or not lora.lora_bias:
        return None
    names = dict.fromkeys(t.name for targets in lora.targets for t in targets)
    without = [name for name in names if not projection_bias(spec.config, name)]
    without += ["lm_head"] if lora.extras.lm_head is not None else []
    if not without:
        return None
    cure = "Save the adapter itself, in PEFT's format: model.save_pretrained(folder)."
    if set(spec.changed) - {EMBED_TOKENS, LM_HEAD}:  # a PEFT folder cannot hold these
        cure = (
            "Write the changed base with fastlora.disable(model).save_pretrained_merged(folder),"
            " then load the folder and train over it."
        )
    return f"lora_bias cannot be merged: the base has no bias in {', '.join(without)}. {cure}"


def check_finite(merged: Mapping[str, Callable[[], Tensor]]) -> None:
    """Compute each merged tensor once, to check it.

    Raises:
        ValueError: naming every merged tensor that holds NaN or infinity.
    """
    broken = [name for name, make in merged.items() if not make().isfinite().all()]
    cure = "The adapter is broken (a diverged run?), or its dtype is too narrow for the sum."
    raise_problems(ValueError, "Merging would put NaN or infinity into:", broken, cure)
