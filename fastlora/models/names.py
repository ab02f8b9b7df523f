"""names."""

from collections.abc import Iterator, Mapping
from typing import Any

from fastlora.models.config import LlamaConfig
from fastlora.models.params import EXPERTS, PROJECTIONS, TARGETS, Adapter, Base, LayerParams
from fastlora.ops.quant.weights import Weight


def module_names(config: LlamaConfig) -> list[str]:
    """Every module that transformers' model of this shape has: what patterns are matched with."""
    attention = ["q_norm", "k_norm"] if config.qk_norm else []
    inner = ["self_attn", "mlp", "input_layernorm", "post_attention_layernorm"]
    inner += [f"self_attn.{n}" for n in attention]
    mlps = {False: ["mlp.act_fn"], True: ["mlp.gate", "mlp.experts", "mlp.experts.act_fn"]}
    names = ["model", "model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb"]
    for layer in range(config.num_hidden_layers):
        own = [*inner, *mlps[config.sparse_layers[layer]]]
        names += [f"model.layers.{layer}", *(f"model.layers.{layer}.{n}" for n in own)]
        names += [
            projection_path(layer, n) for n in layer_targets(config, layer) if n in PROJECTIONS
        ]
    return [*names, "lm_head"]


# model_type -> the sparse block's module in files that spell every expert, and its gate, up, down.
EXPERT_SPELLINGS = {
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
    "qwen3_moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
}


# ── 1. targets ────────────────────────────────────────────────────────────────────────────
def is_mixture(config: LlamaConfig) -> bool:
    """Whether the family is one of mixtures, for which PEFT translates targets."""
    return config.model_type in EXPERT_SPELLINGS


FUSED_GATE_UP = "gate_up_proj"


def former_names(config: LlamaConfig) -> list[str]:
    """What a regex may call experts' matrices: as PEFT asks it, without an expert's number."""
    if not is_mixture(config):
        return []
    homes = [
        projection_path(layer, EXPERTS[0]).rpartition(".")[0]
        for layer, sparse in enumerate(config.sparse_layers)
        if sparse
    ]
    return [f"{home}.{name}" for home in homes for name in EXPERT_SPELLINGS[config.model_type][1]]


def expert_matrices(config: LlamaConfig, name: str) -> Iterator[tuple[int, slice, tuple[int, int]]]:
    """(number among gate, up, down; rows in one expert's matrix; shape) of a tensor's matrices."""
    d, f = config.hidden_size, config.moe_intermediate_size
    if name == "experts.down_proj":
        yield 2, slice(None), (d, f)
    else:
        yield 0, slice(0, f), (f, d)
        yield 1, slice(f, 2 * f), (f, d)


EMBED_TOKENS, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"  # names on disk


# Key in the trees -> the same, of the two ends of the model.
END_WEIGHTS = {"embed_tokens": EMBED_TOKENS, "lm_head": LM_HEAD}


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
