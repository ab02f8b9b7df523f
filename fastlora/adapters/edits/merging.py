"""merge(): the adapter folded into a new base.

PEFT folds LoRA on the embedding of a tied pair into the head as well, where it does not belong
(logits off by 9.77 in peft-format's measurements); here a pair that an adapter takes apart becomes
two matrices.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fastlora.checkpoints.unquantized import MatrixSource, dequantized_matrices
from fastlora.errors import raise_problems
from fastlora.models.config import LlamaConfig
from fastlora.models.names import (
    EDGE_WEIGHTS,
    EMBED_TOKENS,
    LM_HEAD,
    base_from_tensors,
    projection_bias,
    projection_path,
    tensors_from_base,
    with_replaced,
)
from fastlora.models.params import Adapter, AdapterRecord, Base, BiasedLoRA, DoRA, ExpertLoRA, LoRA
from fastlora.models.self_contained import self_contained
from fastlora.models.spec import Extras, LoraConfig, Spec
from fastlora.models.state import ModelState, StateT, require_adapter
from fastlora.ops.linear.merged_weight import adapted_weight
from fastlora.ops.quant.weights import Quantized


def merge(model: StateT) -> StateT:
    """The model with its adapter folded into a new base, and none left: W + scaling * B A.

    Summed in float32 (float64 where base or adapter is), rounded once to the base's dtype. Only the
    touched matrices are new; the rest of the base is shared with the given model, which keeps its
    own, exact one: in 16 bit a merge cannot be undone by subtraction. A base in 4 or 8 bits gives
    one in 16: all its matrices are dequantised, touched or not.

    Raises:
        ValueError: if there is no adapter, or naming the weights that would become NaN or infinite.
    """
    model = self_contained(model)
    require_adapter(model)
    matrix = dequantized_matrices(model.base["norm"].dtype)
    config, tensors, folded = merged_tensors(model, matrix)
    check_finite(folded)
    base = base_from_tensors(config, tensors | {name: fold() for name, fold in folded.items()})
    spec = replace(model.spec, config=config, lora=None)
    return replace(model, spec=spec, base=base, adapter=None)


def merged_tensors(
    model: ModelState, matrix: MatrixSource
) -> tuple[LlamaConfig, dict[str, Tensor], dict[str, Callable[[], Tensor]]]:
    """(config, name on disk -> tensor of the base, name -> its merged tensor when called).

    The config's `tie_word_embeddings` says whether embedding and head are one matrix still. The
    merged tensors are functions, so that one exists at a time until somebody keeps them.

    Args:
        model: as `self_contained` gives it; without an adapter the base stays as it is.
        matrix: gives the dense matrix of a projection.
    """
    spec, adapter = model.spec, model.adapter
    if adapter is None:
        tensors = tensors_from_base(spec.config, model.base)
        return spec.config, tensors, _unpacked(tensors, matrix)
    config = replace(spec.config, tie_word_embeddings=_stays_tied(spec.config, spec.extras))
    whole = with_replaced(model.base, adapter, tied=spec.extras.tied)
    if not config.tie_word_embeddings and "lm_head" not in whole:
        whole = whole.copy()
        whole["lm_head"] = whole["embed_tokens"]
    tensors = tensors_from_base(config, whole)
    folded = _unpacked(tensors, matrix) | _folded(spec, whole, adapter, matrix)
    folded |= _folded_ends(spec, whole, adapter)
    for name, copy in adapter.get("replaced", {}).items():
        folded.setdefault(name, copy.detach().clone)
    if config.tie_word_embeddings:
        folded.pop(LM_HEAD, None)
    return config, tensors, folded


def _unpacked(tensors: Mapping[str, Any], matrix: MatrixSource) -> dict[str, Callable[[], Tensor]]:
    """Name -> the dense matrix when called, for all that is quantised."""
    packed = {name: x for name, x in tensors.items() if isinstance(x, Quantized)}
    return {name: partial(matrix, name, weight) for name, weight in packed.items()}


def _stays_tied(config: LlamaConfig, extras: Extras) -> bool:
    """Whether what was trained leaves a tied embedding and head equal."""
    of_ends = extras.embed_tokens or extras.lm_head or {EMBED_TOKENS, LM_HEAD} & {*extras.replaced}
    equal = extras.tied or not (of_ends or (extras.tokens and not extras.shared_rows))
    return config.tie_word_embeddings and bool(equal)


def merged_weight(
    weight: Float[Tensor, "d_out d_in"], lora: AdapterRecord, scaling: float
) -> Float[Tensor, "d_out d_in"]:
    """weight + scaling * b @ a, its rows at DoRA's lengths, in at least float32, rounded once."""
    here = lambda x: x.detach().to(weight.device)
    magnitude = here(lora.magnitude) if isinstance(lora, DoRA) else None
    return adapted_weight(weight, here(lora.a), here(lora.b), magnitude, scaling)


def merged_experts(
    weight: Float[Tensor, "e d_out d_in"], lora: ExpertLoRA, scaling: float
) -> Float[Tensor, "e d_out d_in"]:
    """`merged_weight` of every expert, one after the other."""
    merged = torch.empty_like(weight)
    for matrix, base, a, b in zip(merged, weight, *lora, strict=True):
        matrix.copy_(merged_weight(base, LoRA(a, b), scaling))
    return merged


def _folded(
    spec: Spec, base: Base, adapter: Adapter, matrix: MatrixSource
) -> dict[str, Callable[[], Tensor]]:
    """Name on disk -> its merged weight when called, for every adapted projection.

    Functions, so that one merged matrix exists at a time until somebody keeps them.
    """
    assert spec.lora is not None, spec
    _check_biases(spec.config, spec.lora)
    folded: dict[str, Callable[[], Tensor]] = {}
    for i, targets in enumerate(spec.lora.targets):
        for t in targets:
            lora, path = adapter["layers"][i][t.name], projection_path(i, t.name)
            if isinstance(lora, ExpertLoRA):
                weight = base["layers"][i]["experts"][t.name.removeprefix("experts.")]
                folded[path] = partial(merged_experts, weight, lora, t.scaling)
                continue
            linear, name = base["layers"][i][t.name], f"{path}.weight"
            dense = partial(matrix, name, linear["weight"])
            folded[name] = lambda w=dense, lora=lora, s=t.scaling: merged_weight(w(), lora, s)
            if isinstance(lora, BiasedLoRA):
                folded[f"{path}.bias"] = partial(merged_bias, linear["bias"], lora.bias, t.scaling)
    return folded


def merged_bias(
    bias: Float[Tensor, "d_out"], of_lora: Float[Tensor, "d_out"], scaling: float
) -> Float[Tensor, "d_out"]:
    """bias + scaling * of_lora, in at least float32, rounded once to its dtype. No gradient."""
    wide = torch.promote_types(torch.promote_types(bias.dtype, of_lora.dtype), torch.float32)
    return (bias.to(wide) + scaling * of_lora.detach().to(bias.device, wide)).to(bias.dtype)


def _folded_ends(spec: Spec, base: Base, adapter: Adapter) -> dict[str, Callable[[], Tensor]]:
    """Embedding and head, as `_folded` has the projections."""
    extras, folded = spec.extras, {}
    matrices = {EMBED_TOKENS: base["embed_tokens"], LM_HEAD: base.get("lm_head")}
    if "embed_tokens" in adapter and extras.embed_tokens is not None:
        lora, scaling = adapter["embed_tokens"], extras.embed_tokens.scaling
        folded[EMBED_TOKENS] = partial(merged_embedding, base["embed_tokens"], lora, scaling)
    if "lm_head" in adapter and "lm_head" in base and extras.lm_head is not None:
        lora, scaling = adapter["lm_head"], extras.lm_head.scaling
        folded[LM_HEAD] = partial(merged_weight, base["lm_head"], lora, scaling)
    for end, rows in adapter.get("tokens", {}).items():
        ids = dict(extras.tokens)[end]
        for name in (EMBED_TOKENS, LM_HEAD) if extras.shared_rows else (EDGE_WEIGHTS[end],):
            if (matrix := matrices[name]) is not None:
                folded[name] = partial(merged_rows, matrix, ids, rows)
    return folded


def merged_embedding(
    weight: Float[Tensor, "v d"], lora: LoRA | DoRA, scaling: float
) -> Float[Tensor, "v d"]:
    """`merged_weight` of the matrix that maps one-hot tokens: the embedding, transposed."""
    return merged_weight(weight.t(), lora, scaling).t().contiguous()


def merged_rows(
    weight: Float[Tensor, "v d"], ids: tuple[int, ...], rows: Float[Tensor, "n d"]
) -> Float[Tensor, "v d"]:
    """The matrix with trained rows, rounded to its dtype, in their places."""
    index = torch.tensor(ids, device=weight.device)
    return weight.detach().index_copy(0, index, rows.detach().to(weight))


def _check_biases(config: LlamaConfig, lora: LoraConfig) -> None:
    if not lora.lora_bias:
        return
    names = dict.fromkeys(t.name for targets in lora.targets for t in targets)
    without = [name for name in names if not projection_bias(config, name)]
    without += ["lm_head"] if lora.extras.lm_head is not None else []
    cure = "Save the adapter itself: save_pretrained."
    raise_problems(
        ValueError, "lora_bias cannot be merged where the base has no bias:", without, cure
    )


def check_finite(folded: Mapping[str, Callable[[], Tensor]]) -> None:
    """Raise ValueError naming every merged tensor that holds NaN or infinity."""
    broken = [name for name, fold in folded.items() if not fold().isfinite().all()]
    cure = "The adapter is broken (a diverged run?), or its dtype is too narrow for the sum."
    raise_problems(ValueError, "Merging would put NaN or infinity into:", broken, cure)
