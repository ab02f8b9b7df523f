"""The two trees of a model, and the one place that knows their names on disk.

Base and adapter are pytrees whose every leaf is a tensor: what a model lacks (a bias, an untied
head) is an absent key, never None, so torch.utils._pytree and torch.func take them as they are.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, NotRequired, TypedDict

from jaxtyping import Float
from torch import Tensor

from fastlora.llama.config import LlamaConfig
from fastlora.quantized import Quantized, Weight

EMBED_TOKENS, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"  # names on disk
# Key in the trees -> the same, of the two ends of the model.
END_WEIGHTS = {"embed_tokens": EMBED_TOKENS, "lm_head": LM_HEAD}
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


def projection_path(layer: int, name: str) -> str:
    """Hugging Face's module name of a projection: "model.layers.3.self_attn.q_proj".

    Of an experts' tensor, its parameter name: "model.layers.3.mlp.experts.down_proj".
    """
    return f"model.layers.{layer}.{TARGETS[name]}.{name}"


def layer_targets(config: LlamaConfig, layer: int) -> tuple[str, ...]:
    """The names of TARGETS that a layer has, in that order."""
    if not config.sparse_layers[layer]:
        return tuple(PROJECTIONS)
    return tuple(n for n in TARGETS if PROJECTIONS.get(n) != "mlp")


def projection_shape(config: LlamaConfig, name: str) -> tuple[int, int]:
    """(d_out, d_in) of a projection; of an experts' tensor, for each of its experts."""
    d, f = config.hidden_size, config.intermediate_size
    experts, of_expert = config.num_local_experts, config.moe_intermediate_size
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    return {
        "q_proj": (q, d),
        "k_proj": (kv, d),
        "v_proj": (kv, d),
        "o_proj": (d, q),
        "gate_proj": (f, d),
        "up_proj": (f, d),
        "down_proj": (d, f),
        "gate": (experts, d),
        "experts.gate_up_proj": (2 * of_expert, d),
        "experts.down_proj": (d, of_expert),
    }[name]


def target_shape(config: LlamaConfig, name: str) -> tuple[int, int]:
    """(d_out, d_in) of a projection, the head, or the embedding, which maps one-hot tokens."""
    v, d = config.vocab_size, config.hidden_size
    ends = {"embed_tokens": (d, v), "lm_head": (v, d)}
    return ends[name] if name in ends else projection_shape(config, name)


def projection_bias(config: LlamaConfig, name: str) -> bool:
    """Whether a projection has a bias."""
    if name not in PROJECTIONS:
        return False
    if name == "o_proj":
        return config.attention_output_bias
    return config.attention_bias if PROJECTIONS[name] == "self_attn" else config.mlp_bias


def layer_tensors(config: LlamaConfig, layer: int) -> dict[tuple[str, ...], tuple[str, tuple]]:
    """Path in the layer's tree -> (name on disk, shape), for every tensor of one decoder layer.

    Experts have transformers 5's names, whose tensors hold all experts; what files spell expert by
    expert is expert_keys.py's business.
    """
    prefix = f"model.layers.{layer}."
    tensors: dict[tuple[str, ...], tuple[str, tuple[int, ...]]] = {}
    for n in ("input_layernorm", "post_attention_layernorm"):
        tensors[n,] = (f"{prefix}{n}.weight", (config.hidden_size,))
    if config.qk_norm:
        for n in ("q_norm", "k_norm"):
            tensors[n,] = (f"{prefix}self_attn.{n}.weight", (config.head_dim,))
    for n in layer_targets(config, layer):
        path, shape = projection_path(layer, n), projection_shape(config, n)
        if n in EXPERTS:
            tensors[tuple(n.split("."))] = (path, (config.num_local_experts, *shape))
            continue
        tensors[n, "weight"] = (f"{path}.weight", shape)
        if projection_bias(config, n):
            tensors[n, "bias"] = (f"{path}.bias", shape[:1])
    return tensors


def base_tensors(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Name on disk -> shape, for every tensor of the model; a tied head is not among them."""
    matrix = (config.vocab_size, config.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": matrix}
    for layer in range(config.num_hidden_layers):
        shapes |= dict(layer_tensors(config, layer).values())
    shapes["model.norm.weight"] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = matrix
    return shapes


def projection_weights(config: LlamaConfig) -> list[str]:
    """Names on disk of all projections' matrices: what `load_in_4bit` puts into 4 bits."""
    return [
        f"{projection_path(layer, name)}.weight"
        for layer in range(config.num_hidden_layers)
        for name in layer_targets(config, layer)
        if name in PROJECTIONS
    ]


def is_quantized(base: Base) -> bool:
    """Whether any projection is in 4 or 8 bits."""
    linears = (p[n] for p in base["layers"] for n in PROJECTIONS if n in p)
    return any(isinstance(linear["weight"], Quantized) for linear in linears)


def base_from_tensors(config: LlamaConfig, tensors: Mapping[str, Weight]) -> Base:
    """The tree, from tensors under their names on disk. No tensor is copied.

    A projection's may be quantised.
    """
    whole: dict[str, Any] = {
        "embed_tokens": tensors["model.embed_tokens.weight"],
        "layers": tuple(_layer(config, i, tensors) for i in range(config.num_hidden_layers)),
        "norm": tensors["model.norm.weight"],
    }
    if not config.tie_word_embeddings:
        whole["lm_head"] = tensors["lm_head.weight"]
    return Base(**whole)


def _layer(config: LlamaConfig, layer: int, tensors: Mapping[str, Weight]) -> LayerParams:
    params: LayerParams = {}
    for path, (name, _) in layer_tensors(config, layer).items():
        if len(path) == 1:
            params[path[0]] = tensors[name]
        else:
            params.setdefault(path[0], {})[path[1]] = tensors[name]
    return params


def tensors_from_base(config: LlamaConfig, base: Base) -> dict[str, Any]:
    """The inverse of `base_from_tensors`: name on disk -> tensor, views of the tree's leaves.

    A quantised projection's is its record.
    """
    tensors: dict[str, Any] = {
        "model.embed_tokens.weight": base["embed_tokens"],
        "model.norm.weight": base["norm"],
    }
    for i, params in enumerate(base["layers"]):
        for path, (name, _) in layer_tensors(config, i).items():
            leaf = params[path[0]]
            tensors[name] = leaf if len(path) == 1 else leaf[path[1]]
    if "lm_head" in base:
        tensors["lm_head.weight"] = base["lm_head"]
    return tensors


# ── copies in place of the base's tensors ─────────────────────────────────────────────────


def with_replaced(base: Base, adapter: Adapter | None, *, tied: bool) -> Base:
    """The base with an adapter's trained copies where its own tensors were; itself without any.

    Args:
        base: with all its tensors.
        adapter: may hold copies.
        tied: whether a tied head follows a copy of the embedding; else it keeps the base's.
    """
    copies = {} if adapter is None else adapter.get("replaced", {})
    if not copies:
        return base
    layers, whole = list(base["layers"]), base.copy()
    for name, copy in copies.items():
        *_, module, leaf = name.split(".")
        if name.startswith("model.layers."):
            params = layers[int(name.split(".")[2])]
            own = params[module]
            value = {**own, leaf: copy} if isinstance(own, dict) else copy
            layers[int(name.split(".")[2])] = params | {module: value}
        else:
            whole[module] = copy
    if EMBED_TOKENS in copies and not tied and "lm_head" not in whole:
        whole["lm_head"] = base["embed_tokens"]
    whole["layers"] = tuple(layers)
    return whole
