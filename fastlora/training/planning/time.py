"""step_seconds(): the duration of a training step, by a roofline model with three rates.

Time is the sum of three quotients: operations of matrix products, operations of attention, and
bytes that all other code reads and writes, each divided by its rate.
"""

from fastlora.models.names import linear_names, projection_shape
from fastlora.models.params import LINEARS, is_quantized
from fastlora.models.spec import Recompute
from fastlora.models.state import ModelState
from fastlora.ops.quant.weights import WeightFP8
from fastlora.training.planning.memory import levels_of

# Fitted to an H100 SXM and an H200, for which the fits differ by 2 %.
_PRODUCT_OPERATIONS_PER_SECOND = 755e12
_ATTENTION_OPERATIONS_PER_SECOND = 177e12
_BYTES_PER_SECOND = 1.98e12

# Of a base in e4m3: the speed of its products over bf16, fitted to one step of 8B on an H200, and
# the bytes that the kernels move there that round rows and transpose matrices
# (h200-8b-fp8-2026-11-30 and profile-8b-fp8-2026-11-30 in scripts/bench/results.jsonl).
_FP8_SPEED = 2.2
_ROUNDED_BYTES_PER_SECOND = 2.33e12


def step_seconds(
    model: ModelState, recompute: Recompute, batch_size: int, seq_length: int
) -> float:
    """Seconds of one micro-batch, forward and backward, and the optimizer's step, on an H100 or
    H200."""
    config, tokens = model.spec.config, batch_size * seq_length
    item, d, f = model.base["norm"].element_size(), config.hidden_size, config.intermediate_size
    sizes = {name: _numel(projection_shape(config, name)) for name in linear_names(config)}
    q, kv = (projection_shape(config, name)[0] for name in ("q_proj", "k_proj"))
    attention_weights = sum(n for name, n in sizes.items() if LINEARS[name] == "self_attn")
    gate_up, all_weights = 2 * f * d, sum(sizes.values())
    attention = 2 * seq_length * q  # operations per token and forward pass: half of the square

    # Per token, except dequantised and turned, which are per step. The head: two products and the
    # logits.
    products, in_attention, elements = 0.0, 0.0, 3 * config.vocab_size
    dequantised = 0  # elements of quantised matrices
    rounded = turned = 0  # in e4m3: elements of inputs and gradients; elements that are transposed
    for level in levels_of(model, recompute, tokens):
        products += 4 * all_weights
        in_attention += 3.5 * attention  # five products in the backward pass, two in the forward
        elements += 12 * d + 4 * (q + kv) + 11 * f
        dequantised += 2 * all_weights
        rounded += 4 * d + 2 * (q + kv) + 3 * f
        turned += all_weights
        # Recomputation in the backward pass:
        if level != "none":
            elements += 4 * d + (2 * (q + kv) if level in ("selective", "mlp") else 3 * q)
        if level in ("mlp", "attention", "full"):
            products += 2 * gate_up
            dequantised += gate_up
            rounded += d
            elements += 4 * f
        if level in ("attention", "full"):
            products += 2 * attention_weights
            dequantised += attention_weights
            rounded += d + q
        if level == "full":
            in_attention += attention
    moved = tokens * elements * item
    in_fp8 = is_quantized(model.base, WeightFP8)
    if is_quantized(model.base) and not in_fp8:
        # 4 bits and their scales are read, the matrix is written.
        moved += dequantised * (0.53 + item)
    seconds = (
        tokens * (products / _rate(in_fp8) + _head_operations(model) / _rate(False))
        + tokens * in_attention / _ATTENTION_OPERATIONS_PER_SECOND
        + moved / _BYTES_PER_SECOND
    )
    if in_fp8:
        seconds += (tokens * rounded * (item + 1) + 2 * turned) / _ROUNDED_BYTES_PER_SECOND
    return seconds


def _rate(in_fp8: bool) -> float:
    """Operations of products per second."""
    return _PRODUCT_OPERATIONS_PER_SECOND * (_FP8_SPEED if in_fp8 else 1.0)


def _head_operations(model: ModelState) -> float:
    """Operations of the head's products per token, forward and backward."""
    return 4 * model.spec.config.vocab_size * model.spec.config.hidden_size


def forward_seconds(model: ModelState, batch_size: int, seq_length: int) -> float:
    """Seconds of all layers' forward passes, which the transfers of a sharded base hide behind."""
    config, tokens = model.spec.config, batch_size * seq_length
    item, d, f = model.base["norm"].element_size(), config.hidden_size, config.intermediate_size
    weights = sum(_numel(projection_shape(config, name)) for name in linear_names(config))
    q, kv = (projection_shape(config, name)[0] for name in ("q_proj", "k_proj"))
    # A third of what `step_seconds` counts elementwise for forward and backward pass.
    moved = tokens * (4 * d + 4 / 3 * (q + kv) + 11 / 3 * f) * item
    in_fp8 = is_quantized(model.base, WeightFP8)
    if is_quantized(model.base) and not in_fp8:
        moved += weights * (0.53 + item)
    layer = 2 * tokens * weights / _rate(in_fp8)
    layer += tokens * 2 * seq_length * q / _ATTENTION_OPERATIONS_PER_SECOND
    return config.num_hidden_layers * (layer + moved / _BYTES_PER_SECOND)


def head_seconds(model: ModelState, batch_size: int, seq_length: int) -> float:
    """Seconds of the head and the loss, forward and backward."""
    config, tokens = model.spec.config, batch_size * seq_length
    products = _head_operations(model) / _rate(False)
    item = model.base["norm"].element_size()
    return tokens * (products + 3 * config.vocab_size * item / _BYTES_PER_SECOND)


def _numel(shape: tuple[int, int]) -> int:
    return shape[0] * shape[1]
