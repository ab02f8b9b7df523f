"""The two trees of a model, and the one place that knows their names on disk.

Base and adapter are pytrees whose every leaf is a tensor: what a model lacks (a bias, an untied
head) is an absent key, never None, so torch.utils._pytree and torch.func take them as they are.
"""

from typing import Any, NamedTuple, NotRequired, TypedDict

import torch
from jaxtyping import Float
from torch import Tensor

from fastlora.ops.quant.weights import Quantized, Weight

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


# Every linear layer of a decoder layer -> the module that holds it in Hugging Face's naming.
PROJECTIONS = {
    "q_proj": "self_attn",
    "k_proj": "self_attn",
    "v_proj": "self_attn",
    "o_proj": "self_attn",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "mlp",
}


# What a sparse layer has in place of the MLP's: the router, and all experts' matrices together.
ROUTER = "gate"

EXPERTS = ("experts.gate_up_proj", "experts.down_proj")


# All that may carry an adapter -> the module that holds it.
TARGETS = PROJECTIONS | dict.fromkeys((ROUTER, *EXPERTS), "mlp")


class LoRA(NamedTuple):
    """One adapted projection: delta_W = scaling * b @ a. The scaling lives in the spec."""

    a: Float[Tensor, "r d_in"]
    b: Float[Tensor, "d_out r"]


class Linear(TypedDict):
    """One frozen linear layer, in torch's [out, in] layout."""

    weight: Weight  # [d_out, d_in], dense or quantised
    bias: NotRequired[Float[Tensor, "d_out"]]
    start: NotRequired[LoRA]  # frozen too; subtracted wherever an adapter is (llama/start.py)


class BiasedLoRA(NamedTuple):
    """A LoRA whose up projection has a bias (PEFT's lora_bias): y += scaling * (b a x + bias)."""

    a: Float[Tensor, "r d_in"]
    b: Float[Tensor, "d_out r"]
    bias: Float[Tensor, "d_out"]


class DoRA(NamedTuple):
    """A LoRA with a trained length for each row of the sum (ops/dora.py)."""

    a: Float[Tensor, "r d_in"]
    b: Float[Tensor, "d_out r"]
    magnitude: Float[Tensor, "d_out"]


class ExpertLoRA(NamedTuple):
    """A LoRA for every expert: delta_W[e] = scaling * b[e] @ a[e]."""

    a: Float[Tensor, "e r d_in"]
    b: Float[Tensor, "e d_out r"]


# How one projection is adapted. The vectors stay float32 where the matrices are cast to multiply.
AdapterRecord = LoRA | BiasedLoRA | DoRA | ExpertLoRA


# One decoder layer: "input_layernorm", "post_attention_layernorm", with qk_norm also "q_norm" and
# "k_norm" -> weight [d or hd]; each name of PROJECTIONS -> Linear. A sparse layer has, in place of
# the MLP's three, "gate" -> {"weight": [e, d]} and "experts" -> {"gate_up_proj": [e, 2f, d], the
# gate's rows first, "down_proj": [e, d, f]}. While a layer runs, "qkv" may be a view of q_proj's,
# k_proj's and v_proj's weights as one (llama/stacked.py).
LayerParams = dict[str, Any]


# Name in TARGETS -> record: ExpertLoRA for EXPERTS, for the others all of one kind. A name that is
# absent carries no adapter.
LayerAdapter = dict[str, AdapterRecord]


class Base(TypedDict):
    """The frozen model. A tied model has no "lm_head": its head is "embed_tokens"."""

    embed_tokens: Float[Tensor, "v d"]
    layers: tuple[LayerParams, ...]
    norm: Float[Tensor, "d"]
    lm_head: NotRequired[Float[Tensor, "v d"]]


class Adapter(TypedDict):
    """What is trained: one dict per decoder layer, empty where nothing is adapted, and what
    spec.Outside says of embedding, head and single tensors."""

    layers: tuple[LayerAdapter, ...]
    embed_tokens: NotRequired[LoRA | DoRA]  # of the transposed matrix: a [r, v], b [d, r]
    lm_head: NotRequired[LoRA | BiasedLoRA | DoRA]  # absent where it is the embedding's
    replaced: NotRequired[dict[str, Tensor]]  # name on disk -> trained copy, in the base's dtype
    tokens: NotRequired[dict[str, Float[Tensor, "_ d"]]]  # "embed_tokens", "lm_head" -> rows


def is_quantized(base: Base) -> bool:
    """Whether any projection is in 4 or 8 bits."""
    linears = (p[n] for p in base["layers"] for n in PROJECTIONS if n in p)
    return any(isinstance(linear["weight"], Quantized) for linear in linears)
