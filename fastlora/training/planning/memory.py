"""peak_bytes(): the peak memory of a training step, as a sum over shapes.

The peak is reached at one of two moments: when the cross-entropy holds its logits and every layer
its activations, or in one layer's backward pass, when the gradients of the layers after it already
exist.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastlora.models.levels import kept_elements, mlp_chunks
from fastlora.models.names import EDGE_WEIGHTS, projection_shape
from fastlora.models.norms import layer_norms
from fastlora.models.params import GATE_UP, is_quantized
from fastlora.models.spec import Recompute
from fastlora.models.state import ModelState, require_adapter
from fastlora.ops.loss.linear_cross_entropy import rows_per_chunk
from fastlora.ops.quant.weights import WeightFP8
from fastlora.runtime.layer_fetching import described
from fastlora.training.planning.layers import QKV, Layer, layers_of

MOMENT_BYTES = {"adamw": 8.0, "adamw_8bit": 2.1, "paged_adamw_8bit": 2.1}  # per parameter

# cuBLAS's workspaces, RoPE tables, masks, and what the allocator adds by rounding up.
_OTHER_BYTES = 0.1 * 2**30


class BaseBytes(NamedTuple):
    """Bytes of a base's tensors."""

    layers: int
    layer: int  # the largest
    ends: int  # embedding and head; a tied matrix once
    head: int
    norm: int


def base_bytes(model: ModelState) -> BaseBytes:
    """The bytes of a model's base, wherever they are."""
    base = described(model.base)
    sizes = [sum(x.nbytes for x in tree_leaves(layer)) for layer in base["layers"]]
    ends = {key: base[key].nbytes for key in EDGE_WEIGHTS if key in base}
    head = ends.get("lm_head", ends["embed_tokens"])
    return BaseBytes(sum(sizes), max(sizes), sum(ends.values()), head, base["norm"].nbytes)


def peak_bytes(
    model: ModelState,
    recompute: Recompute,
    batch_size: int,
    seq_length: int,
    optimizer: str = "adamw",
    shard: int = 1,
    host: bool = False,
    base: BaseBytes | None = None,
) -> int:
    """The most memory that torch will have allocated in a training step, in bytes.

    Base, adapters and optimizer are included. Of a base that is sharded over ranks or in host
    memory, the layer that runs and the next one are on the device, and the head during the loss.

    Args:
        model: as `plan`.
        recompute: policy.
        batch_size: sequences.
        seq_length: tokens of each.
        optimizer: a key of MOMENT_BYTES.
        shard: ranks that share the base.
        host: whether its parts are in host memory.
        base: of `base_bytes`, if the caller has it already.
    """
    base = base_bytes(model) if base is None else base
    tokens = batch_size * seq_length
    layers = layers_of(model, recompute, tokens)
    of_layer = {layer: _kept_bytes(model, layer) * tokens for layer in {*layers}}
    kept = [of_layer[layer] for layer in layers]
    # A layer that is fetched. A part that waits in host memory is copied to the device before it is
    # gathered.
    fetched = base.layer * (1 + (1 / shard if host and shard > 1 else 0))
    fetched = fetched if host or shard > 1 else 0
    always = base.norm + (0 if host else (base.layers + base.ends) / shard) + _OTHER_BYTES
    always += _adapter_bytes(model, optimizer)
    if recompute == "offload":
        always += _hidden_bytes(model, tokens) + max(kept)
        kept = [0] * len(kept)
    else:
        always += _copied_bytes(model)
    head = base.head + fetched if fetched else 0  # the last layer is still there
    at_loss = sum(kept) + _loss_bytes(model, tokens) + head
    in_backward = _backward_bytes(model, layers, kept, tokens) + 2 * fetched
    return round(always + max(at_loss, in_backward))


def _hidden_bytes(model: ModelState, tokens: float) -> float:
    """One hidden state of all tokens. "offload" has one layer's input on its way to the host, and
    what one layer keeps on its way back."""
    return tokens * model.spec.config.hidden_size * model.base["norm"].element_size()


def _adapter_bytes(model: ModelState, optimizer: str) -> float:
    """The trained adapter, the given one, which stays in the caller's model, and moments."""
    leaves = [x for layer in _adapter_by_layer(model) for x in layer]
    parameters = sum(x.numel() for x in leaves)
    return 2 * sum(x.nbytes for x in leaves) + MOMENT_BYTES[optimizer] * parameters


def _copied_bytes(model: ModelState) -> int:
    """Copies of A and B in the base's dtype, if they are trained in another one."""
    item = model.base["norm"].element_size()
    leaves = [x for layer in _adapter_by_layer(model) for x in layer]
    return sum(x.numel() * item for x in leaves if x.element_size() != item)


def _loss_bytes(model: ModelState, tokens: int) -> float:
    """A chunk of logits, and three hidden states."""
    vocab, item = model.spec.config.vocab_size, model.base["norm"].element_size()
    rows = min(tokens, rows_per_chunk(vocab))
    return rows * vocab * item + 3 * _hidden_bytes(model, tokens)


def _backward_bytes(
    model: ModelState, layers: Sequence[Layer], kept: Sequence[int], tokens: int
) -> float:
    """The most that the backward pass of a layer finds and makes: what this layer and those before
    it keep, the gradients of this one and of those after it, and the layer's intermediate tensors.
    """
    adapters, most, gradients = _adapter_by_layer(model), 0.0, 0
    for i, layer in reversed([*enumerate(layers)]):
        if not layer.trained:
            break
        gradients += sum(x.nbytes for x in adapters[i])
        here = _layer_backward_bytes(model, i, layer, kept[i], tokens)
        most = max(most, gradients + sum(kept[: i + 1]) + here)
    return most


def _layer_backward_bytes(
    model: ModelState, number: int, layer: Layer, kept: int, tokens: int
) -> float:
    """The intermediate tensors of one layer's backward pass: the most in the MLP's or in
    attention's. A recomputed MLP goes through long rows in chunks, so attention needs more there.

    Args:
        model: as `plan`.
        number: the layer's.
        layer: its level and adapters.
        kept: bytes on the device that the layer keeps between its passes.
        tokens: in the batch.
    """
    in_mlp = _mlp_backward_bytes(model, number, layer, kept, tokens)
    if layer.level in ("none", "selective"):
        return in_mlp
    return max(in_mlp, _attention_backward_bytes(model, layer, kept, tokens))


def _attention_backward_bytes(model: ModelState, layer: Layer, kept: int, tokens: int) -> float:
    """In the backward pass of attention: the gradient of the residual stream, the layer's input
    and its norm, q, k, v before and after RoPE, the result and its gradient, and the gradients of
    q, k and v. cuDNN, which serves long rows, also sums that of q in float32. One hidden state more
    was measured (h200-8b-1x131072-nf4-offload-2026-11-30)."""
    config, item = model.spec.config, model.base["norm"].element_size()
    q, kv = (projection_shape(config, name)[0] for name in ("q_proj", "k_proj"))
    elements = 4 * config.hidden_size + 5 * q + 5 * kv
    if kept:
        elements -= kept_elements(config, layer.level, without=("o",))
    return (elements * item + 4 * q) * tokens


def _mlp_backward_bytes(
    model: ModelState, number: int, layer: Layer, kept: int, tokens: int
) -> float:
    """In the backward pass of the MLP: three hidden states, of which one has the tokens of a chunk,
    the SwiGLU kernel's partial sums, one dequantised matrix, tensors of the MLP's width, and the
    recomputed activations."""
    config, item = model.spec.config, model.base["norm"].element_size()
    f, matrix = config.intermediate_size, config.intermediate_size * config.hidden_size
    chunk = tokens / mlp_chunks(config, number, layer.level, tokens, whole=layer.dropout)
    total = _hidden_bytes(model, 2 * tokens + chunk) + 8 * 3 * f * 16 * 4
    total += _mlp_tensors(layer) * f * chunk * item
    if is_quantized(model.base, WeightFP8):
        # In e4m3: W of gate and up, transposed, and their gradients side by side.
        total += 2 * matrix + 2 * f * chunk
    elif is_quantized(model.base):
        total += matrix * item
    total -= 2 * f * (tokens - chunk) * item
    if layer.level not in ("none", "selective"):
        total += _kept_bytes(model, layer._replace(level="selective")) * tokens - kept
    return total


def _mlp_tensors(layer: Layer) -> int:
    """Tensors of the MLP's width in a layer's backward pass, besides gate and up."""
    if not layer.adapts(GATE_UP):
        gradients = 2  # compiled code writes that of gate or of up over that of their product
    else:
        # The kernel does so too. Products without it hold gate and up with their low-rank terms.
        gradients = 2 if layer.fused else 4
    recomputed = layer.reads_hidden and layer.fused and layer.level != "none"
    return gradients + int(recomputed)


def _kept_bytes(model: ModelState, layer: Layer) -> int:
    """Bytes that a dense layer keeps per token between forward and backward pass.

    These are the elements that `kept_elements` counts, without those that compiled code recomputes
    (the rotated q and k) and those whose only use would be the gradient of an A that is not there:
    the input of q, k and v, that of gate and up, and silu(gate) * up. x A' of every projection and
    attention's log-sum-exp in float32 are added.
    """
    if not layer.trained:
        return 0
    config = model.spec.config
    unread = ("rotated_qk",) if layer.reads_hidden else ("rotated_qk", "swiglu")
    elements = kept_elements(config, layer.level, without=unread)
    if layer.level == "none":
        norms = layer_norms(config.norms)
        inputs = (norms.attention_in, QKV), (norms.mlp_in, GATE_UP)
        unused = [norm for norm, names in inputs if norm and not layer.adapts(names)]
        elements -= len(unused) * config.hidden_size
    elements += sum(target.r for target in layer.targets)
    log_sum_exp = 0 if layer.level == "full" else 4 * config.num_attention_heads
    return elements * model.base["norm"].element_size() + log_sum_exp


def _adapter_by_layer(model: ModelState) -> list[list[Tensor]]:
    _, adapter = require_adapter(model)
    return [tree_leaves(layer) for layer in adapter["layers"]]
