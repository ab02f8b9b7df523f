"""The tokens' rows of the embedding, with what an adapter does to them."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fastlora.models.params import Adapter, Base, DoRA
from fastlora.models.spec import Spec
from fastlora.ops.linear.dora import row_norms
from fastlora.ops.quant.fake_quantize import SCHEMES, fake_quantize


def embed(
    input_ids: Int[Tensor, "b t"],
    adapter: Adapter | None,
    base: Base,
    spec: Spec,
    gain: Float[Tensor, "d"] | None = None,
) -> Float[Tensor, "b t d"]:
    """What enters the first layer, in the base's dtype.

    Args:
        input_ids: int64 in [0, v).
        adapter: LoRA on the embedding adds scaling * B A[:, id]; trained rows stand in for the
            base's; None, or neither, is the base alone.
        base: with the adapter's copies in it (`params.with_replaced`).
        spec: how to run them.
        gain: of `embedding_gain`, where the caller has it already.

    Under fake quantisation the rows are quantised by themselves, which is all that a row's own
    scale needs.
    """
    x, scheme = F.embedding(input_ids, base["embed_tokens"]), spec.qat_scheme
    if scheme is not None and (how := SCHEMES[scheme].embedding) is not None:
        x = fake_quantize(x, how)
    if adapter is None:
        return x
    if "embed_tokens" in adapter:
        lora, scaling = adapter["embed_tokens"], _scaling(spec)
        x_a = F.embedding(input_ids, lora.a.t())
        y = x + scaling * F.linear(x_a, lora.b)
        gain = embedding_gain(adapter, base, spec) if gain is None else gain
        x = (y if gain is None else gain * y).to(x.dtype)
    if (rows := adapter.get("tokens", {}).get("embed_tokens")) is not None:
        ids, v = dict(spec.extras.tokens)["embed_tokens"], base["embed_tokens"].shape[0]
        x = _with_rows(x, input_ids, rows, ids, v)
    return x


def embedding_gain(adapter: Adapter | None, base: Base, spec: Spec) -> Float[Tensor, "d"] | None:
    """DoRA's magnitude over the length of each of the matrix's columns; None without DoRA."""
    lora = None if adapter is None else adapter.get("embed_tokens")
    if not isinstance(lora, DoRA):
        return None
    norms = row_norms(base["embed_tokens"].t(), lora.a, lora.b, _scaling(spec))
    return lora.magnitude / norms


def _scaling(spec: Spec) -> float:
    assert spec.extras.embed_tokens is not None, spec
    return spec.extras.embed_tokens.scaling


def _with_rows(
    x: Float[Tensor, "b t d"],
    input_ids: Int[Tensor, "b t"],
    rows: Float[Tensor, "n d"],
    ids: tuple[int, ...],
    vocab_size: int,
) -> Float[Tensor, "b t d"]:
    """x with the trained rows where the input has one of `ids`: no copy of the whole matrix."""
    place = torch.full((vocab_size,), -1, device=input_ids.device)
    place[torch.tensor(ids, device=place.device)] = torch.arange(len(ids), device=place.device)
    found = place[input_ids]
    trained = F.embedding(found.clamp(min=0), rows).to(x.dtype)
    return torch.where((found >= 0).unsqueeze(-1), trained, x)
