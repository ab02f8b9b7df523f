"""levels."""

from itertools import pairwise

from fastlora.models.config import LlamaConfig
from fastlora.models.names import projection_shape
from fastlora.models.params import PROJECTIONS
from fastlora.models.spec import Recompute

LEVELS = ("none", "selective", "mlp", "attention", "full")


# As many fill the card; above, more tokens make a product no faster.
_CHUNK_TOKENS = 16_384


def mlp_chunks(config: LlamaConfig, layer: int, level: str, tokens: int, *, dropped: bool) -> int:
    """In how many chunks of tokens a layer runs an MLP that it makes again: the five tensors of
    its width that its backward pass holds at once are then of one chunk, where they are most of
    what a token of a long sequence costs. A power of two: few graphs.

    In one, where a token does not go its way alone: experts are sorted, and dropout's mask counts
    rows.
    """
    if level in ("none", "selective") or dropped or config.sparse_layers[layer]:
        return 1
    return 1 << ((tokens - 1) // _CHUNK_TOKENS).bit_length()


def kept_elements(config: LlamaConfig, level: str, layer: int = 0) -> int:
    """Elements a layer keeps per token at a level, in activations of the compute dtype.

    A sparse layer's router, of one element an expert, is not counted. Where the SwiGLU kernel runs
    (ops/lora_swiglu.py), "none" keeps one f less than this says, the others as much.
    """
    d, f = config.hidden_size, config.intermediate_size
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    attention = d + q + 2 * kv + q + d
    spread = 0  # the tokens' copies, sorted by expert
    if config.sparse_layers[layer]:
        f = config.num_experts_per_tok * config.moe_intermediate_size
        spread = config.num_experts_per_tok * d
    return {
        "none": attention
        + 2 * d
        + q
        + kv
        + spread
        + 3 * f,  # + both norms, rotated q and k, silu(gate) * up
        "selective": attention + 2 * f,
        "mlp": attention,
        "attention": d + q,
        "full": d,
    }[level]


def layer_levels(config: LlamaConfig, recompute: Recompute) -> tuple[str, ...]:
    """The level of every layer.

    A number p in [0, 1] allows p times what all layers keep at "none"; what even "full" cannot
    meet gets "full". Depends on shapes only, so the same call always recomputes the same things.
    """
    n = config.num_hidden_layers
    if isinstance(recompute, str):
        return ("full" if recompute == "offload" else recompute,) * n
    kept = {x: [kept_elements(config, x, i) for i in range(n)] for x in LEVELS}
    total = sum(kept["none"])
    budget = recompute * total
    levels = ["none"] * n
    for rich, lean in pairwise(LEVELS):
        for i in range(n):
            if total <= budget:
                return tuple(levels)
            total -= kept[rich][i] - kept[lean][i]
            levels[i] = lean
    return tuple(levels)


# Operations a layer's forward pass has time for while one byte travels: 755 TFLOP/s against the
# 58 GB/s of PCIe 5 (an older card is slower at both).
_OPERATIONS_A_BYTE = 13_000

_HOST_BYTES = 12 * 2**30  # of pinned memory at most, layer inputs apart


def offload_levels(config: LlamaConfig, tokens: int, item: int) -> tuple[str, ...]:
    """The levels where what layers keep waits in host memory: "full", and as many "mlp", spread
    evenly, as the way there carries beside the compute.

    "mlp" sends q, k, v, attention and o along with x and spares the backward pass four products
    and attention: 1.9 ms a layer of an 8B model at 8,192 tokens, for 235 MB (H100). A dense layer
    of it has time for some 250 MB. Depends on shapes only.

    Args:
        config: the model's.
        tokens: in the batch.
        item: bytes of one element of an activation.
    """
    n, sent = config.num_hidden_layers, 0
    levels = ["full"] * n
    lean, rich = (item * kept_elements(config, level) for level in ("full", "mlp"))
    time_for = 2 * _layer_parameters(config) / _OPERATIONS_A_BYTE
    share = min((time_for - lean) / (rich - lean), _HOST_BYTES / (n * tokens * (rich - lean)), 1.0)
    for i in range(n):
        if not config.sparse_layers[i] and int((i + 1) * share) > sent:
            levels[i], sent = "mlp", sent + 1
    return tuple(levels)


def _layer_parameters(config: LlamaConfig) -> int:
    shapes = (projection_shape(config, name) for name in PROJECTIONS)
    return sum(rows * columns for rows, columns in shapes)
