"""Recompute levels: which activations a layer keeps for its backward pass; the level of each layer.

A layer runs at one of five levels, from most memory to least:

    none       keeps everything that autograd (or Inductor's min-cut partitioner) wants
    selective  recomputes norms, RoPE, SwiGLU and casts
    mlp        recomputes also the products of gate and up
    attention  recomputes also the products of q, k, v and o
    full       recomputes also attention; keeps only the layer's input

Recomputing one element of any projection costs the same arithmetic, 2 * d_in operations, and one of
attention costs more, so this order recomputes the cheapest elements first. `_KEPT` says what each
level keeps.

A policy name is one level for all layers, except "offload" (`offload_levels`). A number in [0, 1]
is a memory budget: layers move down one level at a time, the first layers first, because the
backward pass reaches them last, when most memory is free again.
"""

from collections.abc import Collection
from itertools import pairwise

from fastlora.models.config import LlamaConfig
from fastlora.models.names import linear_names, projection_shape
from fastlora.models.norms import layer_norms
from fastlora.models.spec import Recompute

LEVELS = ("none", "selective", "mlp", "attention", "full")

# Level -> the activations that a layer keeps; `_widths` gives their elements per token.
_ATTENTION = ("x", "q", "k", "v", "attention", "o")
_KEPT = {
    "none": (*_ATTENTION, "gate", "up", "norms", "rotated_qk", "expert_copies", "swiglu", "down"),
    "selective": (*_ATTENTION, "gate", "up", "down"),
    "mlp": _ATTENTION,
    "attention": ("x", "attention"),
    "full": ("x",),
}


def _widths(config: LlamaConfig, layer: int) -> dict[str, int]:
    """Elements per token of each activation in a layer."""
    d, f = config.hidden_size, config.intermediate_size
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    copies = 0  # of each token, sorted by expert
    if config.sparse_layers[layer]:
        f = config.num_experts_per_tok * config.moe_intermediate_size
        copies = config.num_experts_per_tok * d
    widths = dict(x=d, q=q, k=kv, v=kv, attention=q, o=d, gate=f, up=f, swiglu=f)
    norms = layer_norms(config.norms)
    # The gradient of a norm behind the MLP needs its input. That of one behind attention is o.
    widths |= dict(down=d if norms.mlp_out else 0)
    return widths | dict(norms=len(norms.names()) * d, rotated_qk=q + kv, expert_copies=copies)


def kept_elements(
    config: LlamaConfig, level: str, layer: int = 0, without: Collection[str] = ()
) -> int:
    """Elements that a layer keeps per token at a level, in the compute dtype.

    A sparse layer's router logits, one element per expert, are not counted.

    Args:
        config: the model's shape.
        level: one of LEVELS.
        layer: number of the layer.
        without: activations that are not counted: "swiglu" where the SwiGLU kernel runs, which
            recomputes it (ops/swiglu/), and "rotated_qk" in compiled code, which does not keep it.
    """
    widths = _widths(config, layer)
    return sum(widths[name] for name in _KEPT[level] if name not in without)


def layer_levels(config: LlamaConfig, recompute: Recompute) -> tuple[str, ...]:
    """The level of every layer. It depends on shapes only, so equal calls recompute the same.

    A number p in [0, 1] allows p times what all layers keep at "none". If even "full" keeps more,
    all layers get "full".
    """
    n = config.num_hidden_layers
    # "offload" is "full" where no stash is possible: on the CPU and under torch.func.
    if isinstance(recompute, str):
        return ("full" if recompute == "offload" else recompute,) * n
    kept = {x: [kept_elements(config, x, i) for i in range(n)] for x in LEVELS}
    total = sum(kept["none"])
    budget = recompute * total
    levels = ["none"] * n
    for richer, leaner in pairwise(LEVELS):
        for i in range(n):
            if total <= budget:
                return tuple(levels)
            total -= kept[richer][i] - kept[leaner][i]
            levels[i] = leaner
    return tuple(levels)


# Chunks of this many tokens keep a GPU's cores busy; larger ones are not faster per token.
_CHUNK_TOKENS = 16_384


def mlp_chunks(config: LlamaConfig, layer: int, level: str, tokens: int, *, whole: bool) -> int:
    """Number of token chunks for an MLP that is recomputed; a power of two, for few graphs.

    The backward pass holds five tensors of the MLP's width. Chunking limits them to one chunk at a
    time. On long sequences they are most of the memory per token.

    It is 1 where tokens do not go through the MLP independently: experts sort them, and dropout
    masks, the adapters of a stack and per-example gradients depend on a token's row number.

    Args:
        config: the model's shape.
        layer: number of the layer.
        level: its level.
        tokens: in the batch.
        whole: whether LoRA dropout is on, the adapter is a stack, or gradients are per example.
    """
    if level in ("none", "selective") or whole or config.sparse_layers[layer]:
        return 1
    return 1 << ((tokens - 1) // _CHUNK_TOKENS).bit_length()


# Operations of a layer's forward pass in the time that one byte takes to the host: 755 TFLOP/s
# against the 58 GB/s of PCIe 5. Older GPUs are slower at both.
_OPERATIONS_PER_BYTE = 13_000

# Pinned host memory for what "mlp" layers keep; layer inputs come on top.
_MAX_HOST_BYTES = 12 * 2**30


def offload_levels(config: LlamaConfig, tokens: int, item: int) -> tuple[str, ...]:
    """The levels under recompute="offload", where kept activations wait in host memory.

    Layers are "full", which sends the layer's input only. As many layers as the transfer has time
    for, spread evenly, are "mlp", which also sends q, k, v, attention and o and saves the backward
    pass four products and attention: 1.9 ms per layer of an 8B model at 8,192 tokens, for 235 MB
    (H100). A dense layer of it has time for some 250 MB. The result depends on shapes only.

    Args:
        config: the model's shape.
        tokens: in the batch.
        item: bytes of one element of an activation.
    """
    n, sending = config.num_hidden_layers, 0
    levels = ["full"] * n
    full, mlp = (item * kept_elements(config, level) for level in ("full", "mlp"))
    bytes_in_time = 2 * _layer_parameters(config) / _OPERATIONS_PER_BYTE
    share = min(
        (bytes_in_time - full) / (mlp - full), _MAX_HOST_BYTES / (n * tokens * (mlp - full)), 1.0
    )
    # The number of "mlp" layers among the first i + 1 is (i + 1) * share, rounded down.
    for i in range(n):
        if not config.sparse_layers[i] and int((i + 1) * share) > sending:
            levels[i], sending = "mlp", sending + 1
    return tuple(levels)


def offload_bytes(config: LlamaConfig, tokens: int, item: int) -> int:
    """Bytes of pinned host memory under recompute="offload". torch rounds each tensor up to a power
    of two.

    Args:
        config: the model's shape.
        tokens: in the batch.
        item: bytes of one element of an activation.
    """
    rounded = lambda elements: 1 << (elements * tokens * item - 1).bit_length()
    return sum(
        rounded(_widths(config, i)[name])
        for i, level in enumerate(offload_levels(config, tokens, item))
        for name in _KEPT[level]
    )


def _layer_parameters(config: LlamaConfig) -> int:
    shapes = (projection_shape(config, name) for name in linear_names(config))
    return sum(rows * columns for rows, columns in shapes)
