"""The tokens' rows of the embedding, with what an adapter does to them."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fastlora.llama.params import Adapter, Base, DoRA, LoRA
from fastlora.llama.spec import Spec
from fastlora.ops.dora import row_norms
from fastlora.ops.fake_quantize import SCHEMES, fake_quantize


def embed(
    input_ids: Int[Tensor, "b t"], adapter: Adapter | None, base: Base, spec: Spec
) -> Float[Tensor, "b t d"]:
    """What enters the first layer, in the base's dtype.

    Args:
        input_ids: int64 in [0, v).
        adapter: LoRA on the embedding adds scaling * B A[:, id]; trained rows stand in for the
            base's; None, or neither, is the base alone.
        base: with the adapter's copies in it (`params.with_replaced`).
        spec: how to run them.

    Under fake quantisation the rows are quantised by themselves, which is all that a row's own
    scale needs.
    """
    x, scheme = F.embedding(input_ids, base["embed_tokens"]), spec.qat_scheme
    if scheme is not None and (how := SCHEMES[scheme].embedding) is not None:
        x = fake_quantize(x, how)
    if adapter is None:
        return x
    if "embed_tokens" in adapter:
        assert spec.outside.embed_tokens is not None, spec
        scaling = spec.outside.embed_tokens.scaling
        x = _adapted(x, input_ids, base["embed_tokens"], adapter["embed_tokens"], scaling)
    if (rows := adapter.get("tokens", {}).get("embed_tokens")) is not None:
        x = _with_rows(x, input_ids, rows, dict(spec.outside.tokens)["embed_tokens"])
    return x


def _adapted(
    x: Float[Tensor, "b t d"],
    input_ids: Int[Tensor, "b t"],
    weight: Float[Tensor, "v d"],
    lora: LoRA | DoRA,
    scaling: float,
) -> Float[Tensor, "b t d"]:
    """Summed in the adapter's dtype; DoRA's lengths are those of the matrix's columns."""
    y = x + scaling * F.linear(F.embedding(input_ids, lora.a.t()), lora.b)
    if isinstance(lora, DoRA):
        y = y * (lora.magnitude / row_norms(weight.t(), lora.a, lora.b, scaling))
    return y.to(x.dtype)


def _with_rows(
    x: Float[Tensor, "b t d"],
    input_ids: Int[Tensor, "b t"],
    rows: Float[Tensor, "n d"],
    ids: tuple[int, ...],
) -> Float[Tensor, "b t d"]:
    """x with the trained rows where the input has one of `ids`: no copy of the whole matrix."""
    found = input_ids.unsqueeze(-1) == torch.tensor(ids, device=input_ids.device)
    trained = F.embedding(found.int().argmax(-1), rows).to(x.dtype)
    return torch.where(found.any(-1, keepdim=True), trained, x)
