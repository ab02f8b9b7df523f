"""time."""

from fastlora.model import Model
from fastlora.models.names import projection_shape
from fastlora.models.params import PROJECTIONS, is_quantized
from fastlora.models.spec import Recompute
from fastlora.training.planning.memory import levels_of

# Of an H100 SXM and an H200, which differ by 2 % in what was fitted: operations and bytes a second.
_PRODUCTS, _ATTENTION, _BYTES = 755e12, 177e12, 1.98e12


# ── 2. time ───────────────────────────────────────────────────────────────────────────────
def step_seconds(model: Model, recompute: Recompute, batch_size: int, seq_length: int) -> float:
    """Of one micro-batch, forward and backward, and the optimiser's step, on an H100 or H200."""
    config, tokens = model.spec.config, batch_size * seq_length
    item, d, f = model.base["norm"].element_size(), config.hidden_size, config.intermediate_size
    sizes = {n: _numel(projection_shape(config, n)) for n in PROJECTIONS}
    q, kv = (projection_shape(config, name)[0] for name in ("q_proj", "k_proj"))
    projections = sum(n for name, n in sizes.items() if PROJECTIONS[name] == "self_attn")
    gate_up, every = sizes["gate_proj"] + sizes["up_proj"], sum(sizes.values())
    attention = 2 * seq_length * q  # operations a token and pass: half of the square

    operations, of_attention, elements, dequantised = 4 * config.vocab_size * d, 0.0, 0, 0
    elements += 3 * config.vocab_size
    for level in levels_of(model, recompute, tokens):
        operations += 4 * every
        of_attention += 3.5 * attention  # the backward pass has five products where this has two
        elements += 12 * d + 4 * (q + kv) + 11 * f
        dequantised += 2 * every
        if level != "none":
            elements += 4 * d + (2 * (q + kv) if level in ("selective", "mlp") else 3 * q)
        if level in ("mlp", "attention", "full"):
            operations, dequantised, elements = (
                operations + 2 * gate_up,
                dequantised + gate_up,
                elements + 4 * f,
            )
        if level in ("attention", "full"):
            operations, dequantised = operations + 2 * projections, dequantised + projections
        if level == "full":
            of_attention += attention
    moved = tokens * elements * item
    if is_quantized(model.base):  # 4 bits and their scales read, the matrix written
        moved += dequantised * (0.53 + item)
    return (tokens * operations) / _PRODUCTS + tokens * of_attention / _ATTENTION + moved / _BYTES


def _numel(shape: tuple[int, int]) -> int:
    return shape[0] * shape[1]
