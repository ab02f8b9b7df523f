"""The embedding, with its LoRA, DoRA or trained rows."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fastlora.models.config import LlamaConfig
from fastlora.models.params import Adapter, Base, DoRA
from fastlora.models.spec import Spec
from fastlora.ops.linear.dora import row_norms
from fastlora.ops.quant.fake_quantize import SCHEMES, fake_quantize
from fastlora.runtime.layer_fetching import resident


def embed(
    input_ids: Int[Tensor, "b t"],
    adapter: Adapter | None,
    base: Base,
    spec: Spec,
    gain: Float[Tensor, "d"] | None = None,
    row_of_id: Int[Tensor, "v"] | None = None,
) -> Float[Tensor, "b t d"]:
    """The input of the first layer, in the base's dtype: rows of the embedding, which some families
    multiply with a constant.

    Under fake quantisation only the rows that are read are quantised: each row has its own scale.

    Args:
        input_ids: int64 in [0, v).
        adapter: LoRA on the embedding adds scaling * B A[:, id]; trained rows replace the base's.
        base: with the adapter's copies in it (`names.with_replaced`).
        spec: how to run them.
        gain: the result of `embedding_gain`, if the caller has it already.
        row_of_id: the result of `trained_row_of_id`, if the caller has it already.
    """
    x, scheme = F.embedding(input_ids, resident(base["embed_tokens"])), spec.qat_scheme
    # Of all schemes only "int8-int4" quantises the embedding.
    if scheme is not None and (number_format := SCHEMES[scheme].embedding) is not None:
        x = fake_quantize(x, number_format)
    if adapter is None:
        return scaled(x, spec)
    if "embed_tokens" in adapter:
        lora, scaling = adapter["embed_tokens"], _scaling(spec)
        # A maps one-hot ids, so x A' is a row of A': [r, v] is read as an embedding of width r.
        x_a = F.embedding(input_ids, lora.a.t())
        y = x + scaling * F.linear(x_a, lora.b)
        gain = embedding_gain(adapter, base, spec) if gain is None else gain
        # A and B are float32 over a base in 16 bits, so the sum is rounded once, here.
        x = (y if gain is None else gain * y).to(x.dtype)
    if (rows := adapter.get("tokens", {}).get("embed_tokens")) is not None:
        if row_of_id is None:
            row_of_id = trained_row_of_id(spec, base)
            assert row_of_id is not None, spec
        x = _with_rows(x, input_ids, rows, row_of_id)
    return scaled(x, spec)


def scaled(x: Float[Tensor, "b t d"], spec: Spec) -> Float[Tensor, "b t d"]:
    """x times the config's `embedding_scale`.

    It is rounded to x.dtype where transformers keeps it as a tensor (Gemma).
    """
    scale = spec.config.embedding_scale
    if scale is None:
        return x
    if spec.config.scales_decoder_input:
        return x * scale
    return x * torch.full((), scale, dtype=x.dtype, device=x.device)


def embedding_scale(spec: Spec, dtype: torch.dtype) -> float | None:
    """The factor of `scaled` as a number, for kernels; None: the embedding is not scaled."""
    scale = spec.config.embedding_scale
    if spec.config.scales_decoder_input:
        return scale
    return None if scale is None else torch.tensor(scale, dtype=dtype, device="cpu").item()


def noise_scale(config: LlamaConfig) -> float:
    """Factor of NEFTune's noise, which is added to scaled embeddings.

    transformers adds it to the rows of the embedding, which Granite's decoder scales afterwards.
    """
    scale = config.embedding_scale if config.scales_decoder_input else None
    return 1.0 if scale is None else scale


def trained_row_of_id(spec: Spec, base: Base) -> Int[Tensor, "v"] | None:
    """For each id the number of its trained row, or -1; None if the embedding has no such rows."""
    ids, device = dict(spec.extras.tokens).get("embed_tokens"), base["norm"].device
    if ids is None:
        return None
    row_of_id = torch.full((spec.config.vocab_size,), -1, device=device)
    row_of_id[torch.tensor(ids, device=device)] = torch.arange(len(ids), device=device)
    return row_of_id


def embedding_gain(adapter: Adapter | None, base: Base, spec: Spec) -> Float[Tensor, "d"] | None:
    """DoRA's magnitude divided by the norm of each column of the matrix; None without DoRA."""
    lora = None if adapter is None else adapter.get("embed_tokens")
    if not isinstance(lora, DoRA):
        return None
    # PEFT adapts the transposed matrix here, so its rows are the embedding's columns.
    norms = row_norms(resident(base["embed_tokens"]).t(), lora.a, lora.b, _scaling(spec))
    return lora.magnitude / norms


def _scaling(spec: Spec) -> float:
    assert spec.extras.embed_tokens is not None, spec
    return spec.extras.embed_tokens.scaling


def _with_rows(
    x: Float[Tensor, "b t d"],
    input_ids: Int[Tensor, "b t"],
    rows: Float[Tensor, "n d"],
    row_of_id: Int[Tensor, "v"],
) -> Float[Tensor, "b t d"]:
    """x with the trained row at every token whose id has one. The matrix is not copied."""
    row = row_of_id[input_ids]
    # Tokens without a trained row look up row 0, and torch.where discards it. Selecting the tokens
    # by a mask instead would make the host wait for the GPU, to learn their number.
    trained = F.embedding(row.clamp(min=0), rows).to(x.dtype)
    return torch.where((row >= 0).unsqueeze(-1), trained, x)
