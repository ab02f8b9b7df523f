"""step_seconds(): the duration of a training step, reckoned from the operations of its layers.

Time is a sum of quotients: operations of matrix products, operations of attention, and bytes that
all other kernels read and write, each divided by its rate; and of the gaps between kernels. Rates
are those of kernels in profiles of steps and of single kernels (scripts/bench/results.jsonl). They
are compromises between H100 and H200, and between shapes: products of 8B run at 710e12, of 1B at
731e12 and of 70B at some 780e12 operations a second.
"""

from collections.abc import Collection
from operator import add
from typing import NamedTuple

import torch
from torch.utils._pytree import tree_leaves

from fastlora.models.names import linear_names, projection_shape
from fastlora.models.params import GATE_UP, is_quantized
from fastlora.models.spec import Recompute
from fastlora.models.state import ModelState, require_adapter
from fastlora.ops.linear.low_rank_gradients import kernel_supports
from fastlora.ops.quant.weights import WeightFP8
from fastlora.training.planning.layers import DOWN, QKV, Layer, layers_of

_PRODUCT_OPERATIONS_PER_SECOND = 745e12  # h200-profile-1b-2026-11-30, fp8-layer-2026-11-30
# Attention's rate, forward and backward together, is x r / (x + n) in rows of x tokens: (r, n) of
# heads of up to 64, and of larger ones. In profiles of steps, rows of 2,048 tokens have 300e12 and
# 325e12 (h200-profile-1b-2026-11-30, profile-8b-fp8-2026-11-30). Steps with long rows give r
# (scaling-seq-*-2026-11-27, h200-8b-1x131072-nf4-offload-2026-11-30).
_ATTENTION_RATES = (400e12, 680), (530e12, 1290)
# 2.8e12 on an H200 (h200-profile-1b-2026-11-30); an H100 has 70 % of its bandwidth.
_BYTES_PER_SECOND = 2.2e12
_DEQUANTISED_BYTES_PER_SECOND = 3.7e12  # of an H200, read and written (h200-dequantize-2026-11-30)

# Of a base in e4m3: its products (profile-8b-fp8-2026-11-30), and the bytes that the kernels move
# that round rows and transpose matrices: 2.3e12 in that profile, a fifth more since
# (fp8-rows-2026-11-30).
_FP8_OPERATIONS_PER_SECOND = 1.42e15
_ROUNDED_BYTES_PER_SECOND = 2.8e12

# Masks of dropout: h200-masked-lora-2026-11-30 without the bytes that those kernels move.
_HASHES_PER_SECOND = 1.5e12

# Between two kernels, also in a CUDA graph: 2.7 ms between 1,517 kernels. A layer of 1B has 95, and
# 30 more if it is recomputed (h200-profile-1b-2026-11-30, h200-profile-1b-offload-2026-11-30).
_GAP_SECONDS = 1.8e-6
_KERNELS, _RECOMPUTED_KERNELS = 95, 30


class Work(NamedTuple):
    """What layers do. The work of several is the sum of each field."""

    products: float = 0.0
    """Operations of products with the layers' matrices, per token."""
    attention: float = 0.0
    """Seconds of attention, per token."""
    elements: float = 0.0
    """Elements that all other kernels read and write, per token."""
    hashed: float = 0.0
    """Elements of dropout masks, per token."""
    rounded: float = 0.0
    """Elements of inputs and gradients that are rounded to e4m3, per token."""
    dequantised: float = 0.0
    """Elements of matrices in 4 bits that are written in 16 bits, per step."""
    turned: float = 0.0
    """Elements of matrices in e4m3 that are transposed, per step."""
    kernels: float = 0.0
    """Launches, per step."""

    def __add__(self, other: "Work") -> "Work":  # pyright: ignore[reportIncompatibleMethodOverride]
        """The work of both."""
        return Work(*map(add, self, other))


class Widths(NamedTuple):
    """Columns of a layer's activations, and elements of its matrices."""

    d: int
    f: int
    q: int
    kv: int
    shapes: dict[str, tuple[int, int]]  # of each projection: (outputs, inputs)
    in_attention: float  # seconds of attention per token, forward: half of the square

    def matrices(self, *names: str) -> int:
        """Elements of the matrices of the projections, all if none are named."""
        return sum(
            rows * columns for n, (rows, columns) in self.shapes.items() if n in names or not names
        )

    def adapted(self, layer: Layer, names: Collection[str]) -> tuple[int, int]:
        """(inputs, outputs) of those of these projections that the layer adapts; they share their
        input. (0, 0) if it adapts none."""
        shapes = [self.shapes[t.name] for t in layer.targets if t.name in names]
        return (shapes[0][1] if shapes else 0), sum(outputs for outputs, _ in shapes)


def step_seconds(
    model: ModelState, recompute: Recompute, batch_size: int, seq_length: int
) -> float:
    """Seconds of one micro-batch, forward and backward, and of AdamW, on an H100 or H200."""
    tokens, w = batch_size * seq_length, _widths(model, seq_length)
    total = Work()
    for layer in layers_of(model, recompute, tokens):
        total += _forward(w, layer)
        if layer.trained:
            total += _backward(w, layer) + _recomputation(w, layer)
    seconds = _seconds(model, total, tokens) + head_seconds(model, batch_size, seq_length)
    return seconds + _update_bytes(model) / _BYTES_PER_SECOND


def forward_seconds(model: ModelState, batch_size: int, seq_length: int) -> float:
    """Seconds of all layers' forward passes, which the transfers of a sharded base hide behind."""
    tokens, w = batch_size * seq_length, _widths(model, seq_length)
    layers = layers_of(model, "none", tokens)
    return _seconds(model, sum((_forward(w, layer) for layer in layers), Work()), tokens)


def head_seconds(model: ModelState, batch_size: int, seq_length: int) -> float:
    """Seconds of the head and the loss, forward and backward."""
    config, tokens = model.spec.config, batch_size * seq_length
    products = 4 * config.vocab_size * config.hidden_size / _PRODUCT_OPERATIONS_PER_SECOND
    item = model.base["norm"].element_size()
    return tokens * (products + 3 * config.vocab_size * item / _BYTES_PER_SECOND)


def product_share(model: ModelState, batch_size: int, seq_length: int) -> float:
    """The share of a forward pass during which products run."""
    work = Work(products=2 * _widths(model, seq_length).matrices())
    layers = model.spec.config.num_hidden_layers
    seconds = layers * _seconds(model, work, batch_size * seq_length)
    return seconds / forward_seconds(model, batch_size, seq_length)


def _forward(w: Widths, layer: Layer) -> Work:
    """A layer's forward pass."""
    # Both norms, both sums of residuals, and SwiGLU.
    elements, hashed = 9 * w.d + 3 * w.f, 0
    for names in _GROUPS:
        inputs, outputs = w.adapted(layer, names)
        elements += inputs  # x A'
        hashed += inputs if layer.dropout else 0
        if not (layer.fused and names == GATE_UP):
            elements += 2 * outputs  # x A' B' is written, and read where x W' is added
    matrices = w.matrices()
    rounded = 2 * w.d + w.q + w.f
    return Work(2 * matrices, w.in_attention, elements, hashed, rounded, matrices, 0, _KERNELS / 2)


def _backward(w: Widths, layer: Layer) -> Work:
    """A layer's backward pass, without recomputation."""
    # Both norms and residuals, the sum of gate's and up's products, and SwiGLU.
    elements, hashed = 9 * w.d + 5 * w.f, 0
    for names in _GROUPS:
        inputs, outputs = w.adapted(layer, names)
        in_kernel = layer.fused and names == GATE_UP
        # Gradients of x A' and of B: one pass over dy. The SwiGLU kernel has the latter.
        elements += outputs if in_kernel or _one_pass(layer, names) else 2 * outputs
        if names != DOWN or layer.reads_hidden:
            # The gradient of A reads x. That of x begins with one term, which is written and read.
            elements += 3 * inputs
        hashed += inputs if layer.dropout else 0
    matrices = w.matrices()
    rounded = 2 * w.d + w.q + 2 * w.kv + 2 * w.f
    work = Work(2 * matrices, 2.5 * w.in_attention, elements, hashed, rounded, matrices, matrices)
    return work._replace(kernels=_KERNELS / 2)


def _recomputation(w: Widths, layer: Layer) -> Work:
    """What a layer's backward pass computes again. x A' is kept at every level."""
    if layer.level == "none":
        return Work()
    work = Work(elements=5 * w.d)  # both norms, and the sum between them
    if layer.reads_hidden:
        work += Work(elements=3 * w.f)
    if layer.level != "selective":
        matrices, (_, outputs) = w.matrices(*GATE_UP), w.adapted(layer, GATE_UP)
        low_rank = 0 if layer.fused else 2 * outputs
        work += Work(2 * matrices, 0, low_rank, 0, w.d, matrices, 0, _RECOMPUTED_KERNELS)
    if layer.level in ("attention", "full"):
        matrices = w.matrices(*QKV, "o_proj")
        low_rank = 2 * sum(w.adapted(layer, names)[1] for names in (QKV, ("o_proj",)))
        work += Work(2 * matrices, 0, low_rank, 0, w.d + w.q, matrices)
    return work + Work(attention=w.in_attention) if layer.level == "full" else work


# The projections that share an input.
_GROUPS = (QKV, ("o_proj",), GATE_UP, DOWN)


def _one_pass(layer: Layer, names: Collection[str]) -> bool:
    """Whether a kernel computes both gradients of the low-rank terms (ops/linear)."""
    ranks = [target.r for target in layer.targets if target.name in names]
    return names != GATE_UP and kernel_supports(torch.bfloat16, *ranks)


def _widths(model: ModelState, seq_length: int) -> Widths:
    config = model.spec.config
    shapes = {name: projection_shape(config, name) for name in linear_names(config)}
    q, kv = (projection_shape(config, name)[0] for name in ("q_proj", "k_proj"))
    d, f = config.hidden_size, config.intermediate_size
    rate, half = _ATTENTION_RATES[config.head_dim > 64]
    return Widths(d, f, q, kv, shapes, 2 * q * (seq_length + half) / rate)


def _seconds(model: ModelState, work: Work, tokens: int) -> float:
    """Seconds of the layers' work."""
    item, in_fp8 = model.base["norm"].element_size(), is_quantized(model.base, WeightFP8)
    rate = _FP8_OPERATIONS_PER_SECOND if in_fp8 else _PRODUCT_OPERATIONS_PER_SECOND
    seconds = (
        tokens * work.products / rate
        + tokens * work.attention
        + tokens * work.elements * item / _BYTES_PER_SECOND
        + tokens * work.hashed / _HASHES_PER_SECOND
        + work.kernels * _GAP_SECONDS
    )
    if in_fp8:
        rounded = tokens * work.rounded * (item + 1)
        return seconds + (rounded + 2 * work.turned) / _ROUNDED_BYTES_PER_SECOND
    if is_quantized(model.base):
        # 4 bits and their scales are read, the matrix is written.
        return seconds + work.dequantised * (0.53 + item) / _DEQUANTISED_BYTES_PER_SECOND
    return seconds


def _update_bytes(model: ModelState) -> int:
    """AdamW reads and writes the adapter and its moments and reads its gradient, in float32; the
    step's copy in the base's dtype is written from it, and the gradient from another copy."""
    _, adapter = require_adapter(model)
    return 40 * sum(x.numel() for x in tree_leaves(adapter))
