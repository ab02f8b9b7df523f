"""From hidden states to logits: the head, with what an adapter does to it."""

from typing import NotRequired, TypedDict

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fastlora.models.names import with_replaced
from fastlora.models.params import Adapter, Base, BiasedLoRA, DoRA, Linear, LoRA
from fastlora.models.projections import adapted_linear, dora_linear
from fastlora.models.spec import Spec
from fastlora.ops.cast import cast
from fastlora.ops.dropout import dropout, fold
from fastlora.ops.linear.dora import row_norms
from fastlora.ops.quant.fake_quantize import SCHEMES, fake_quantize, fake_quantize_rows


class Head(TypedDict):
    """What turns a hidden state into logits. A pytree of tensors."""

    weight: Float[Tensor, "v d"]
    lora: NotRequired[LoRA | BiasedLoRA]  # matrices in the weight's dtype
    gain: NotRequired[Float[Tensor, "v"]]  # DoRA's magnitude over the norm: once, for all chunks
    rows: NotRequired[Float[Tensor, "n d"]]  # trained, in place of the weight's
    ids: NotRequired[Int[Tensor, "n"]]  # which rows these are


def head(adapter: Adapter | None, base: Base, spec: Spec) -> Head:
    """The head of a model: its own matrix or the embedding's, and the adapter's part in it."""
    whole = with_replaced(base, adapter, tied=spec.extras.tied)
    weight = whole["lm_head"] if "lm_head" in whole else whole["embed_tokens"]
    found: Head = {"weight": weight}  # dynamo takes no constructor of a TypedDict
    if adapter is None:
        return found
    if (lora := _lora(adapter, spec)) is not None:
        narrow = cast({"lm_head": lora}, weight.dtype)["lm_head"]
        if isinstance(narrow, DoRA):
            norms = row_norms(weight, narrow.a, narrow.b, _scaling(spec))
            found["gain"], narrow = narrow.magnitude / norms, LoRA(narrow.a, narrow.b)
        found["lora"] = narrow
    end = "embed_tokens" if spec.extras.shared_rows else "lm_head"
    if (rows := adapter.get("tokens", {}).get(end)) is not None:
        ids = dict(spec.extras.tokens)[end]
        found["rows"], found["ids"] = rows, torch.tensor(ids, device=rows.device)
    return found


def _lora(adapter: Adapter, spec: Spec) -> LoRA | BiasedLoRA | DoRA | None:
    if spec.extras.tied and "embed_tokens" in adapter:
        own = adapter["embed_tokens"]
        return LoRA(own.b.t(), own.a.t())
    return adapter.get("lm_head")


def _scaling(spec: Spec) -> float:
    assert spec.extras.lm_head is not None, spec
    return spec.extras.lm_head.scaling


def is_plain(found: Head) -> bool:
    """Whether the logits are one product with a matrix that nobody trains."""
    return found.keys() == {"weight"} and not found["weight"].requires_grad


def masked_for_head(
    hidden: Float[Tensor, "*n d"], found: Head, spec: Spec, key: Int[Tensor, ""] | None
) -> Float[Tensor, "*n d"]:
    """What the head's A multiplies: hidden under the head's own dropout mask, or itself."""
    if key is None or "lora" not in found or spec.lora is None:
        return hidden
    return dropout(hidden, spec.lora.lora_dropout, fold(key, spec.config.num_hidden_layers))


def logits(
    hidden: Float[Tensor, "*n d"], dropped: Float[Tensor, "*n d"], found: Head, spec: Spec
) -> Float[Tensor, "*n v"]:
    """The logits of any rows, in their dtype.

    Args:
        hidden: the final norm's output.
        dropped: the same, or what `masked_for_head` makes of it.
        found: of `head`.
        spec: the model's.
    """
    if spec.qat_scheme is not None:
        return F.linear(*head_factors(hidden, found["weight"], spec))
    if "lora" in found:
        linear: Linear = {"weight": found["weight"]}
        lora, scaling = found["lora"], _scaling(spec)
        masked, x_a = None if dropped is hidden else dropped, F.linear(dropped, lora.a)
        if "gain" in found:
            assert isinstance(lora, LoRA), type(lora)
            y = dora_linear(hidden, masked, x_a, linear, lora, found["gain"], scaling)
        else:
            y = adapted_linear(hidden, masked, x_a, linear, lora, scaling)
    else:
        y = F.linear(hidden, found["weight"])
    if "rows" in found and "ids" in found:
        y = y.index_copy(-1, found["ids"], F.linear(hidden, found["rows"].to(hidden.dtype)))
    return y


def head_factors(
    hidden: Float[Tensor, "*n d"], weight: Float[Tensor, "v d"], spec: Spec
) -> tuple[Float[Tensor, "*n d"], Float[Tensor, "v d"]]:
    """(rows, matrix) whose product is a plain head's logits: as they are, or both fake quantised.

    A quantised matrix is a new tensor, a tied one too: the embedding keeps its own rounding.
    """
    if spec.qat_scheme is None:
        return hidden, weight
    scheme = SCHEMES[spec.qat_scheme]
    if scheme.activation is not None:
        hidden = fake_quantize(hidden, scheme.activation)
    return hidden, fake_quantize_rows(weight, scheme.weight)
