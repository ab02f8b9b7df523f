"""step_seconds(): the duration of a training step, by a roofline model with three rates.

Time is the sum of three quotients: operations of matrix products, operations of attention, and
bytes that all other code reads and writes, each divided by its rate.
"""

from operator import add
from typing import NamedTuple

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


class Work(NamedTuple):
    """What the layers of a model do in a step. Sums of several are sums of their fields."""

    products: float = 0.0
    """Operations of products with the layers' matrices, per token."""
    attention: float = 0.0
    """Operations of attention, per token."""
    elements: float = 0.0
    """Elements that all other code reads and writes, per token."""
    dequantised: float = 0.0
    """Elements of quantised matrices that are written in 16 bits, per step."""
    rounded: float = 0.0
    """Elements of inputs and gradients that are rounded to e4m3, per token."""
    turned: float = 0.0
    """Elements of matrices in e4m3 that are transposed, per step."""


class Widths(NamedTuple):
    """Of a layer of a model."""

    d: int
    f: int
    q: int
    kv: int
    attention_weights: int  # elements of q, k, v and o
    weights: int  # of all projections
    attention: int  # operations per token and forward pass: half of the square

    @property
    def gate_up(self) -> int:
        """Elements of the matrices of gate and up."""
        return 2 * self.f * self.d


def step_seconds(
    model: ModelState, recompute: Recompute, batch_size: int, seq_length: int
) -> float:
    """Seconds of one micro-batch, forward and backward, and the optimizer's step, on an H100 or
    H200."""
    tokens, widths = batch_size * seq_length, _widths(model, seq_length)
    total = Work(elements=3 * model.spec.config.vocab_size)  # of the logits
    for level in levels_of(model, recompute, tokens):
        for work in (_passes(widths), _recomputation(widths, level)):
            total = Work(*map(add, total, work))
    return _seconds(model, total, tokens)


def _widths(model: ModelState, seq_length: int) -> Widths:
    config = model.spec.config
    sizes = {name: _numel(projection_shape(config, name)) for name in linear_names(config)}
    q, kv = (projection_shape(config, name)[0] for name in ("q_proj", "k_proj"))
    in_attention = sum(n for name, n in sizes.items() if LINEARS[name] == "self_attn")
    d, f = config.hidden_size, config.intermediate_size
    return Widths(d, f, q, kv, in_attention, sum(sizes.values()), 2 * seq_length * q)


def _passes(w: Widths) -> Work:
    """A layer's forward and backward pass, without recomputation."""
    return Work(
        products=4 * w.weights,
        attention=3.5 * w.attention,  # five products in the backward pass, two in the forward
        elements=12 * w.d + 4 * (w.q + w.kv) + 11 * w.f,
        dequantised=2 * w.weights,
        rounded=4 * w.d + 2 * (w.q + w.kv) + 3 * w.f,
        turned=w.weights,
    )


def _recomputation(w: Widths, level: str) -> Work:
    """What a layer's backward pass computes again."""
    work = Work()
    if level != "none":
        rope = 2 * (w.q + w.kv) if level in ("selective", "mlp") else 3 * w.q
        work = Work(elements=4 * w.d + rope)
    if level in ("mlp", "attention", "full"):
        mlp = Work(2 * w.gate_up, 0.0, 4 * w.f, w.gate_up, w.d)
        work = Work(*map(add, work, mlp))
    if level in ("attention", "full"):
        matrices = w.attention_weights
        work = Work(*map(add, work, Work(2 * matrices, 0.0, 0.0, matrices, w.d + w.q)))
    return work._replace(attention=w.attention) if level == "full" else work


def _seconds(model: ModelState, work: Work, tokens: int) -> float:
    """Seconds of the layers' work and of the head's products."""
    item = model.base["norm"].element_size()
    moved = tokens * work.elements * item
    in_fp8 = is_quantized(model.base, WeightFP8)
    if is_quantized(model.base) and not in_fp8:
        # 4 bits and their scales are read, the matrix is written.
        moved += work.dequantised * (0.53 + item)
    seconds = (
        tokens * (work.products / _rate(in_fp8) + _head_operations(model) / _rate(False))
        + tokens * work.attention / _ATTENTION_OPERATIONS_PER_SECOND
        + moved / _BYTES_PER_SECOND
    )
    if in_fp8:
        rounded = tokens * work.rounded * (item + 1)
        seconds += (rounded + 2 * work.turned) / _ROUNDED_BYTES_PER_SECOND
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
