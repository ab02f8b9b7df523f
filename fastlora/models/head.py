"""The head: hidden states to logits, with LoRA, DoRA, trained rows or a trained copy."""

from typing import NotRequired, TypedDict

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fastlora.models.dora_products import dora_linear
from fastlora.models.names import with_replaced
from fastlora.models.params import Adapter, Base, BiasedLoRA, DoRA, Linear, LoRA
from fastlora.models.projections import adapted_linear
from fastlora.models.spec import Spec
from fastlora.ops.cast import cast
from fastlora.ops.dropout import dropout, fold
from fastlora.ops.linear.dora import row_norms
from fastlora.ops.quant.fake_quantize import SCHEMES, fake_quantize, fake_quantize_rows
from fastlora.ops.soft_cap import soft_cap
from fastlora.runtime.layer_fetching import resident


class Head(TypedDict):
    """The tensors that turn hidden states into logits. A pytree."""

    weight: Float[Tensor, "v d"]
    lora: NotRequired[LoRA | BiasedLoRA]  # its matrices in the weight's dtype
    gain: NotRequired[Float[Tensor, "v"]]  # DoRA's magnitude / norm, computed once for all chunks
    rows: NotRequired[Float[Tensor, "n d"]]  # trained rows, used instead of the weight's
    ids: NotRequired[Int[Tensor, "n"]]  # the numbers of these rows


def head(adapter: Adapter | None, base: Base, spec: Spec) -> Head:
    """The head of a model: its matrix (a tied model's embedding), and the adapter's tensors."""
    merged_base = with_replaced(base, adapter, tied=spec.extras.tied)
    weight = resident(merged_base.get("lm_head", merged_base["embed_tokens"]))
    parts: Head = {"weight": weight}  # dynamo rejects the call Head(weight=weight)
    if adapter is None:
        return parts
    if (lora := _lora(adapter, spec)) is not None:
        narrow = cast({"lm_head": lora}, weight.dtype)["lm_head"]
        if isinstance(narrow, DoRA):
            norms = row_norms(weight, narrow.a, narrow.b, _scaling(spec))
            parts["gain"], narrow = narrow.magnitude / norms, LoRA(narrow.a, narrow.b)
        parts["lora"] = narrow
    module = "embed_tokens" if spec.extras.shared_rows else "lm_head"
    if (rows := adapter.get("tokens", {}).get(module)) is not None:
        ids = dict(spec.extras.tokens)[module]
        parts["rows"], parts["ids"] = rows, torch.tensor(ids, device=rows.device)
    return parts


def _lora(adapter: Adapter, spec: Spec) -> LoRA | BiasedLoRA | DoRA | None:
    if spec.extras.tied and "embed_tokens" in adapter:
        lora = adapter["embed_tokens"]
        return LoRA(lora.b.t(), lora.a.t())  # the head is the embedding's matrix transposed
    return adapter.get("lm_head")


def _scaling(spec: Spec) -> float:
    assert spec.extras.lm_head is not None, spec
    return spec.extras.lm_head.scaling


def is_frozen_product(parts: Head) -> bool:
    """Whether the logits are one product with a matrix that is not trained."""
    return parts.keys() == {"weight"} and not parts["weight"].requires_grad


def masked_for_head(
    hidden: Float[Tensor, "*n d"],
    parts: Head,
    spec: Spec,
    key: Int[Tensor, "..."] | None,
    first_row: Int[Tensor, "*pieces"] | None = None,
) -> Float[Tensor, "*n d"]:
    """The input of the head's A: `hidden` under a dropout mask, or `hidden` itself.

    Args:
        hidden: the final norm's output.
        parts: the result of `head`.
        spec: the model's.
        key: the result of `decoder.dropout_key`.
        first_row: as in `dropout.dropout`.
    """
    if key is None or "lora" not in parts or spec.lora is None:
        return hidden
    # Keys 0, 1, ... are those of the layers.
    head_key = fold(key, spec.config.num_hidden_layers)
    return dropout(hidden, spec.lora.lora_dropout, head_key, first_row)


def logits(
    hidden: Float[Tensor, "*n d"], dropped: Float[Tensor, "*n d"], parts: Head, spec: Spec
) -> Float[Tensor, "*n v"]:
    """The logits of any rows of hidden states, in their dtype, divided and capped as the
    family does.

    Args:
        hidden: the final norm's output.
        dropped: the result of `masked_for_head` for it.
        parts: the result of `head`.
        spec: the model's.
    """
    return soft_cap(divided(_uncapped(hidden, dropped, parts, spec), spec), spec.config.logit_cap)


def divided(x: Float[Tensor, "*n _"], spec: Spec) -> Float[Tensor, "*n _"]:
    """Logits over the config's `logit_divisor`; or the head's input, with the same effect."""
    return x if spec.config.logit_divisor == 1.0 else x / spec.config.logit_divisor


def _uncapped(
    hidden: Float[Tensor, "*n d"], dropped: Float[Tensor, "*n d"], parts: Head, spec: Spec
) -> Float[Tensor, "*n v"]:
    if spec.qat_scheme is not None:  # lora() refuses it together with an adapted head
        return F.linear(*head_factors(hidden, parts["weight"], spec))
    if "lora" in parts:
        linear: Linear = {"weight": parts["weight"]}
        lora, scaling = parts["lora"], _scaling(spec)
        masked, x_a = None if dropped is hidden else dropped, F.linear(dropped, lora.a)
        if "gain" in parts:
            assert isinstance(lora, LoRA), type(lora)
            y = dora_linear(hidden, masked, x_a, linear, lora, parts["gain"], scaling)
        else:
            y = adapted_linear(hidden, masked, x_a, linear, lora, scaling)
    else:
        y = F.linear(hidden, parts["weight"])
    if "rows" in parts and "ids" in parts:
        # Trained rows of the head are columns of the logits. They take the place of the base's.
        y = y.index_copy(-1, parts["ids"], F.linear(hidden, parts["rows"].to(hidden.dtype)))
    return y


def head_factors(
    hidden: Float[Tensor, "*n d"], weight: Float[Tensor, "v d"], spec: Spec
) -> tuple[Float[Tensor, "*n d"], Float[Tensor, "v d"]]:
    """(rows, matrix) whose product is the logits, fake quantised if the spec says so.

    The quantised matrix is a new tensor. A tied model's embedding is rounded separately.
    """
    if spec.qat_scheme is None:
        return hidden, weight
    scheme = SCHEMES[spec.qat_scheme]
    if scheme.activation is not None:
        hidden = fake_quantize(hidden, scheme.activation)
    return hidden, fake_quantize_rows(weight, scheme.weight)
