"""The two trees of a model, base and adapter: nested dicts and tuples whose leaves are tensors.

A model of two layers, adapted by LoRA on q_proj and v_proj:

    base    {"embed_tokens": [v, d],
             "layers": ({"input_layernorm": [d], "post_attention_layernorm": [d],
                         "q_proj": {"weight": [q, d]}, "k_proj": {"weight": [kv, d]},
                         "v_proj": {"weight": [kv, d]}, "o_proj": {"weight": [d, q]},
                         "gate_proj": {"weight": [f, d]}, "up_proj": {"weight": [f, d]},
                         "down_proj": {"weight": [d, f]}},
                        {...}),
             "norm": [d],
             "lm_head": [v, d]}

    adapter {"layers": ({"q_proj": LoRA(a=[r, d], b=[q, r]), "v_proj": LoRA(a=[r, d], b=[kv, r])},
                        {...})}

An absent key means that the model has no such tensor: a projection without bias or adapter, a tied
head. No leaf is None, so torch.utils._pytree and torch.func accept the trees.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, NotRequired, TypedDict

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastlora.ops.linear.group_gradients import Sink
from fastlora.ops.linear.group_products import Groups
from fastlora.ops.quant.weights import Quantized, Weight, Weight4bit, Weight8bit, WeightFP8
from fastlora.runtime.layer_fetching import described

# Names of dtypes in config.json and in arguments.
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}

# The linear layers of a decoder layer -> the module that holds them in Hugging Face's naming.
PROJECTIONS = {
    "q_proj": "self_attn",
    "k_proj": "self_attn",
    "v_proj": "self_attn",
    "o_proj": "self_attn",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "mlp",
}

# Some families (Phi-3) have the first three, and gate and up, as one layer each: their rows one
# after the other.
FUSED = {"qkv_proj": "self_attn", "gate_up_proj": "mlp"}

# Granite 4's MLP: gate and up as one layer, and down.
SHARED_MLP = {"input_linear": "shared_mlp", "output_linear": "shared_mlp"}

# Every layer that computes gate or up or both.
GATE_UP = ("gate_proj", "up_proj", "gate_up_proj", "input_linear")

# Every linear layer that a dense decoder layer may have.
LINEARS = PROJECTIONS | FUSED | SHARED_MLP

# A sparse layer has these instead of the MLP's three: the router, and two tensors that hold the
# matrices of all experts.
ROUTER = "gate"
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")

# Everything in a layer that may carry an adapter -> the module that holds it.
TARGETS = PROJECTIONS | dict.fromkeys((ROUTER, *EXPERTS), "mlp") | FUSED | SHARED_MLP


class LoRA(NamedTuple):
    """One adapted projection: delta_W = scaling * b @ a. The scaling is in the spec."""

    a: Float[Tensor, "r d_in"]
    b: Float[Tensor, "d_out r"]


class BiasedLoRA(NamedTuple):
    """A LoRA whose up projection has a bias (PEFT's lora_bias): y += scaling * (b a x + bias)."""

    a: Float[Tensor, "r d_in"]
    b: Float[Tensor, "d_out r"]
    bias: Float[Tensor, "d_out"]


class DoRA(NamedTuple):
    """A LoRA with a trained length for each row of W + scaling * b @ a (ops/linear/dora.py)."""

    a: Float[Tensor, "r d_in"]
    b: Float[Tensor, "d_out r"]
    magnitude: Float[Tensor, "d_out"]


class PreparedDoRA(NamedTuple):
    """A DoRA whose norms are computed already, for a model that is not trained any more."""

    a: Float[Tensor, "r d_in"]
    b: Float[Tensor, "d_out r"]
    gain: Float[Tensor, "d_out"]  # magnitude / norms


class ExpertLoRA(NamedTuple):
    """A LoRA for every expert: delta_W[e] = scaling * b[e] @ a[e]."""

    a: Float[Tensor, "e r d_in"]
    b: Float[Tensor, "e d_out r"]


class StackedLoRA(NamedTuple):
    """The LoRA of n adapters for one projection, while a layer runs (stacks.py).

    B is multiplied by the adapter's scaling.
    """

    a: Float[Tensor, "n r d_in"]
    b: Float[Tensor, "n d_out r"]
    groups: Groups  # which rows of the batch use which adapter


class ExampleLoRA(NamedTuple):
    """A LoRA, or that of all experts, whose gradient is computed for each example, while a layer
    runs (examples.py). The matrices require no gradient; the sinks' tensors do.
    """

    a: Float[Tensor, "*e r d_in"]
    b: Float[Tensor, "*e d_out r"]
    sink_a: Sink
    sink_b: Sink
    groups: Groups  # which rows of the batch belong to which example


# How one projection is adapted. Matrices are cast to the activations' dtype before they multiply;
# bias and magnitude stay float32.
AdapterRecord = LoRA | BiasedLoRA | DoRA | PreparedDoRA | ExpertLoRA | StackedLoRA | ExampleLoRA


class Linear(TypedDict):
    """One frozen linear layer, in torch's [out, in] layout."""

    weight: Weight  # [d_out, d_in], dense or quantised
    bias: NotRequired[Float[Tensor, "d_out"]]
    # Frozen factors whose product is subtracted together with an adapter (init_offset.py).
    offset: NotRequired[LoRA]


# One decoder layer of the base, as drawn above, by name. With qk_norm it also has "q_norm" and
# "k_norm" [hd]. A sparse layer has, instead of the MLP's three:
#     "gate": {"weight": [e, d]},
#     "experts": {"gate_up_proj": [e, 2f, d], the gate's rows first, "down_proj": [e, d, f]}
# While a layer runs, "qkv" may be a view of the weights of q_proj, k_proj and v_proj as one matrix
# (fused_qkv.py).
LayerParams = dict[str, Any]

# Name in TARGETS -> record. Experts have ExpertLoRA; all other records of a model are of one class.
LayerAdapter = dict[str, AdapterRecord]


class Base(TypedDict):
    """The frozen model. A tied model has no "lm_head": its head is "embed_tokens"."""

    embed_tokens: Float[Tensor, "v d"]
    layers: tuple[LayerParams, ...]
    norm: Float[Tensor, "d"]
    lm_head: NotRequired[Float[Tensor, "v d"]]


class Adapter(TypedDict):
    """The tensors that are trained.

    "layers" has one dict per decoder layer, empty if nothing in it is adapted. The other keys hold
    what `spec.Extras` describes: adapters of embedding and head, and copies of single tensors.
    """

    layers: tuple[LayerAdapter, ...]
    embed_tokens: NotRequired[LoRA | DoRA]  # of the transposed matrix: a [r, v], b [d, r]
    lm_head: NotRequired[LoRA | BiasedLoRA | DoRA]  # absent if the head shares the embedding's
    replaced: NotRequired[dict[str, Tensor]]  # name on disk -> trained copy, in the base's dtype
    tokens: NotRequired[dict[str, Float[Tensor, "_ d"]]]  # "embed_tokens", "lm_head" -> rows


def is_quantized(base: Base, kind: Any = Quantized) -> bool:
    """Whether any projection is in 4 or 8 bits, or in that record of ops/quant/weights.py."""
    linears = (p[n] for p in described(base)["layers"] for n in LINEARS if n in p)
    return any(isinstance(linear["weight"], kind) for linear in linears)


def quantized_to(base: Base) -> str | None:
    """ "4 bits" (NF4, FP4), "int8" or "fp8", as the projections are kept; None: they are dense."""
    kinds = {Weight4bit: "4 bits", Weight8bit: "int8", WeightFP8: "fp8"}
    return next((name for kind, name in kinds.items() if is_quantized(base, kind)), None)


def first_nonfinite(tensors: Mapping[str, Any]) -> str | None:
    """The name of the first tensor that holds NaN or infinity; None if all are finite.

    Args:
        tensors: name -> tensor, or a quantised weight, which is a record of several tensors.
    """
    for name, tensor in tensors.items():
        if not all(bool(x.isfinite().all()) for x in tree_leaves(tensor)):
            return name
    return None
