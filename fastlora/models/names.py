"""The names and shapes of a model's tensors on disk, and the way between them and the base tree.

Names are those of transformers 5, in which the matrices of all experts are one tensor. Files that
have one tensor per expert are translated by checkpoints/expert_layout.py.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fastlora.models.config import LlamaConfig
from fastlora.models.families.family import Experts
from fastlora.models.families.registry import family_of
from fastlora.models.lazy_tensors import LazyTensors
from fastlora.models.norms import layer_norms
from fastlora.models.params import (
    EXPERTS,
    FUSED,
    LINEARS,
    PROJECTIONS,
    SHARED_MLP,
    TARGETS,
    Adapter,
    Base,
    LayerParams,
)
from fastlora.ops.quant.weights import Weight
from fastlora.runtime.layer_fetching import is_sharded, resident

EMBED_TOKENS, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
NORM = "model.norm.weight"

# Keys of embedding and head in the trees -> their names on disk.
EDGE_WEIGHTS = {"embed_tokens": EMBED_TOKENS, "lm_head": LM_HEAD}

# The last part of the name of the tensor that holds all experts' gates and ups.
FUSED_GATE_UP = "gate_up_proj"


# Names and shapes of projections.


def linear_names(config: LlamaConfig) -> tuple[str, ...]:
    """The linear layers of a dense layer."""
    if config.shared_mlp:
        return ("q_proj", "k_proj", "v_proj", "o_proj", *SHARED_MLP)
    if not config.fused_projections:
        return tuple(PROJECTIONS)
    return ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")


def layer_targets(config: LlamaConfig, layer: int) -> tuple[str, ...]:
    """The names of TARGETS that a layer has, in that order."""
    if not config.sparse_layers[layer]:
        return linear_names(config)
    return tuple(n for n in TARGETS if LINEARS.get(n) != "mlp" and n not in FUSED | SHARED_MLP)


def projection_path(layer: int, name: str) -> str:
    """Hugging Face's module name of a projection: "model.layers.3.self_attn.q_proj".

    For a tensor of experts its parameter name: "model.layers.3.mlp.experts.down_proj".
    """
    return f"model.layers.{layer}.{TARGETS[name]}.{name}"


def projection_shape(config: LlamaConfig, name: str) -> tuple[int, int]:
    """(d_out, d_in) of a projection; for a tensor of experts, of each expert's matrix."""
    d, f = config.hidden_size, config.intermediate_size
    experts, expert_f = config.num_local_experts, config.moe_intermediate_size
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    return {
        "qkv_proj": (q + 2 * kv, d),
        "gate_up_proj": (2 * f, d),
        "input_linear": (2 * f, d),
        "output_linear": (d, f),
        "q_proj": (q, d),
        "k_proj": (kv, d),
        "v_proj": (kv, d),
        "o_proj": (d, q),
        "gate_proj": (f, d),
        "up_proj": (f, d),
        "down_proj": (d, f),
        "gate": (experts, d),
        "experts.gate_up_proj": (2 * expert_f, d),
        "experts.down_proj": (d, expert_f),
    }[name]


def target_shape(config: LlamaConfig, name: str) -> tuple[int, int]:
    """(d_out, d_in) of a projection, of the head, or of the embedding as a map of one-hot ids."""
    v, d = config.vocab_size, config.hidden_size
    # PEFT's embedding LoRA has A [r, v] and B [d, r], as if of a linear layer with d_in = v.
    edges = {"embed_tokens": (d, v), "lm_head": (v, d)}
    return edges[name] if name in edges else projection_shape(config, name)


def projection_bias(config: LlamaConfig, name: str) -> bool:
    """Whether a projection has a bias."""
    if name not in LINEARS:
        return False
    if name == "o_proj":
        return config.attention_output_bias
    return config.attention_bias if LINEARS[name] == "self_attn" else config.mlp_bias


def projection_weights(config: LlamaConfig) -> list[str]:
    """Names on disk of all projections' matrices: the tensors that `load_in_4bit` quantises."""
    return [
        f"{projection_path(layer, name)}.weight"
        for layer in range(config.num_hidden_layers)
        for name in layer_targets(config, layer)
        if name in LINEARS
    ]


def module_names(config: LlamaConfig) -> list[str]:
    """Every module that transformers' model of this shape has; target patterns match these."""
    mlp = "shared_mlp" if config.shared_mlp else "mlp"
    attention = ["q_norm", "k_norm"] if config.qk_norm else []
    common = ["self_attn", mlp, *layer_norms(config.norms).names()]
    common += [f"self_attn.{n}" for n in attention]
    # By sparse or not; act_fn has no parameters, but a regex may match it, as it may in PEFT.
    activation = "mlp.activation_fn" if config.fused_projections else f"{mlp}.act_fn"
    activation = f"{mlp}.activation" if config.shared_mlp else activation
    mlps = {False: [activation], True: ["mlp.gate", "mlp.experts", "mlp.experts.act_fn"]}
    names = ["model", "model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb"]
    for layer in range(config.num_hidden_layers):
        inner = [*common, *mlps[config.sparse_layers[layer]]]
        names += [f"model.layers.{layer}", *(f"model.layers.{layer}.{n}" for n in inner)]
        names += [projection_path(layer, n) for n in layer_targets(config, layer) if n in LINEARS]
    return [*names, "lm_head"]


# Names of experts, which PEFT and transformers 4 name one by one.


def is_mixture(config: LlamaConfig) -> bool:
    """Whether the family is one of mixtures of experts, for which PEFT translates targets."""
    return family_of(config).experts is not None


def expert_spelling(config: LlamaConfig) -> Experts:
    """How the family of a mixture of experts (`is_mixture`) names experts one by one."""
    experts = family_of(config).experts
    assert experts is not None, f"{config.model_type} has no experts"
    return experts


def legacy_expert_names(config: LlamaConfig) -> list[str]:
    """Names that a regex may use for experts' matrices, without the expert's number, as in PEFT."""
    if not is_mixture(config):
        return []
    modules = [
        projection_path(layer, EXPERTS[0]).rpartition(".")[0]
        for layer, sparse in enumerate(config.sparse_layers)
        if sparse
    ]
    return [f"{module}.{name}" for module in modules for name in expert_spelling(config).matrices]


def expert_matrices(config: LlamaConfig, name: str) -> Iterator[tuple[int, slice, tuple[int, int]]]:
    """The matrices that one expert has in a tensor of experts.

    Yields:
        (0, 1 or 2 for gate, up or down; the matrix's rows in the tensor; its shape).
    """
    d, f = config.hidden_size, config.moe_intermediate_size
    if name == "experts.down_proj":
        yield 2, slice(None), (d, f)
    else:
        yield 0, slice(0, f), (f, d)
        yield 1, slice(f, 2 * f), (f, d)


# The base tree and its tensors on disk.


def layer_tensors(config: LlamaConfig, layer: int) -> dict[tuple[str, ...], tuple[str, tuple]]:
    """Path in the layer's tree -> (name on disk, shape), for every tensor of one decoder layer.

    ("q_proj", "weight") -> ("model.layers.3.self_attn.q_proj.weight", (q, d)), for example.
    """
    prefix = f"model.layers.{layer}."
    tensors: dict[tuple[str, ...], tuple[str, tuple[int, ...]]] = {}
    for n in layer_norms(config.norms).names():
        tensors[n,] = (f"{prefix}{n}.weight", (config.hidden_size,))
    if config.qk_norm:
        heads = (config.num_attention_heads, config.num_key_value_heads)
        for n, h in zip(("q_norm", "k_norm"), heads, strict=True):
            width = h * config.head_dim if config.qk_norm_joint else config.head_dim
            tensors[n,] = (f"{prefix}self_attn.{n}.weight", (width,))
    for n in layer_targets(config, layer):
        path, shape = projection_path(layer, n), projection_shape(config, n)
        if n in EXPERTS:  # transformers 5 registers these as parameters: no ".weight"
            tensors[tuple(n.split("."))] = (path, (config.num_local_experts, *shape))
            continue
        tensors[n, "weight"] = (f"{path}.weight", shape)
        if projection_bias(config, n):
            tensors[n, "bias"] = (f"{path}.bias", shape[:1])
    return tensors


def base_tensors(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Name on disk -> shape, for every tensor of the model. A tied head has no entry."""
    matrix = (config.vocab_size, config.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {EMBED_TOKENS: matrix}
    for layer in range(config.num_hidden_layers):
        shapes |= dict(layer_tensors(config, layer).values())
    shapes[NORM] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        shapes[LM_HEAD] = matrix
    return shapes


def base_from_tensors(config: LlamaConfig, tensors: Mapping[str, Weight]) -> Base:
    """Build the tree from tensors by their names on disk. No tensor is copied.

        {"model.embed_tokens.weight": E,              {"embed_tokens": E,
         "model.layers.0.self_attn.q_proj.weight": W,  "layers": ({"q_proj": {"weight": W},
         "model.layers.0.input_layernorm.weight": n,               "input_layernorm": n}, ...),
         "model.norm.weight": N, ...}              ->  "norm": N, ...}

    Args:
        config: the model's shape.
        tensors: every name of `base_tensors`. Weights of projections may be quantised.
    """
    base: dict[str, Any] = {
        "embed_tokens": tensors[EMBED_TOKENS],
        "layers": tuple(
            layer_from_tensors(config, i, tensors.__getitem__)
            for i in range(config.num_hidden_layers)
        ),
        "norm": tensors[NORM],
    }
    if not config.tie_word_embeddings:
        base["lm_head"] = tensors[LM_HEAD]
    return Base(**base)


def layer_from_tensors(
    config: LlamaConfig, layer: int, tensor: Callable[[str], Any]
) -> LayerParams:
    """One decoder layer's tree; `tensor` returns the tensor of a name on disk."""
    params: LayerParams = {}
    for path, (name, _) in layer_tensors(config, layer).items():
        if len(path) == 1:
            params[path[0]] = tensor(name)
        else:
            params.setdefault(path[0], {})[path[1]] = tensor(name)
    return params


def tensors_from_base(config: LlamaConfig, base: Base) -> Mapping[str, Any]:
    """The inverse of `base_from_tensors`: name on disk -> the tree's leaf, not copied.

    A quantised weight is returned as its record. Of a sharded base a tensor is fetched, with its
    layer, when it is asked for.
    """
    if is_sharded(base):
        return _lazy_tensors(config, base)
    tensors: dict[str, Any] = {EMBED_TOKENS: base["embed_tokens"], NORM: base["norm"]}
    for i, params in enumerate(base["layers"]):
        for path, (name, _) in layer_tensors(config, i).items():
            leaf = params[path[0]]
            tensors[name] = leaf if len(path) == 1 else leaf[path[1]]
    if "lm_head" in base:
        tensors[LM_HEAD] = base["lm_head"]
    return tensors


def _lazy_tensors(config: LlamaConfig, base: Base) -> LazyTensors:
    places: dict[str, tuple[Any, ...]] = {
        name: (i, *path)
        for i in range(config.num_hidden_layers)
        for path, (name, _) in layer_tensors(config, i).items()
    }
    edges = {name: key for key, name in EDGE_WEIGHTS.items() if key in base}

    def make(name: str) -> Any:
        if name not in places:
            return base["norm"] if name == NORM else resident(base[edges[name]])
        i, *path = places[name]
        leaf: Any = base["layers"][i]
        for key in path:
            leaf = leaf[key]
        return leaf

    return LazyTensors([EMBED_TOKENS, NORM, *places, *edges], make)


def with_replaced(base: Base, adapter: Adapter | None, *, tied: bool) -> Base:
    """Put an adapter's trained copies into the base, in place of the originals.

        base    {"layers": ({"input_layernorm": n, "q_proj": {"weight": W, "bias": c}, ...},)}
        adapter {"replaced": {"model.layers.0.input_layernorm.weight": n1,
                              "model.layers.0.self_attn.q_proj.bias": c1}}
    ->  base    {"layers": ({"input_layernorm": n1, "q_proj": {"weight": W, "bias": c1}, ...},)}

    Args:
        base: with all its tensors.
        adapter: with or without copies. Without any, `base` itself is returned.
        tied: whether a tied head uses a copy of the embedding; False: it keeps the original.
    """
    copies = {} if adapter is None else adapter.get("replaced", {})
    if not copies:
        return base
    new_base = base.copy()
    layers = list(base["layers"]) if any(n.startswith("model.layers.") for n in copies) else None
    # Layers are dicts that other models may share, so each change makes new dicts on its path.
    for name, copy in copies.items():
        *_, module, leaf = name.split(".")
        if layers is not None and name.startswith("model.layers."):
            layer = int(name.split(".")[2])
            params = layers[layer]
            old = params[module]
            layers[layer] = params | {
                module: {**old, leaf: copy} if isinstance(old, dict) else copy
            }
        else:
            new_base[module] = copy
    # PEFT unties a head whose embedding is copied, unless ensure_weight_tying is given: the head
    # goes on with the original.
    if EMBED_TOKENS in copies and not tied and "lm_head" not in new_base:
        new_base["lm_head"] = base["embed_tokens"]
    if layers is not None:
        new_base["layers"] = tuple(layers)
    return new_base
