"""memory."""

from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastlora.model import Model
from fastlora.models.levels import layer_levels, mlp_chunks, offload_levels
from fastlora.models.names import projection_shape
from fastlora.models.params import is_quantized
from fastlora.models.spec import Recompute
from fastlora.ops.loss.linear_cross_entropy import rows_per_chunk
from fastlora.ops.swiglu.swiglu import kernel_supports

# cuBLAS's workspaces, tables, masks and what the allocator rounds up; bytes.
_OTHER_BYTES = 0.1 * 2**30


# ── 1. memory ─────────────────────────────────────────────────────────────────────────────
MOMENTS = {"adamw": 8.0, "adamw_8bit": 2.1, "paged_adamw_8bit": 2.1}  # bytes a parameter


def peak_bytes(
    model: Model, recompute: Recompute, batch_size: int, seq_length: int, optimizer: str = "adamw"
) -> int:
    """Most that torch will have allocated in a training step, base and optimiser included."""
    config, tokens = model.spec.config, batch_size * seq_length
    item, d, f = model.base["norm"].element_size(), config.hidden_size, config.intermediate_size
    adapters = _layers(model)
    parameters = [sum(x.numel() for x in leaves) for leaves in adapters]
    own = sum(x.nbytes for leaves in adapters for x in leaves)
    casts = sum(x.numel() * item for leaves in adapters for x in leaves if x.element_size() != item)
    always = sum(x.nbytes for x in tree_leaves(model.base)) + own + _OTHER_BYTES
    always += MOMENTS[optimizer] * sum(parameters)

    levels, fused = levels_of(model, recompute, tokens), _fused(model)
    kept = [_kept(model, level, seq_length, fused) * tokens for level in levels]
    selective = _kept(model, "selective", seq_length, fused) * tokens
    if recompute == "offload":  # an input on its way out, and a parcel on its way back
        always += tokens * d * item + max(kept)
        kept = [0] * len(kept)
    else:
        always += casts
    logits = min(tokens, rows_per_chunk(config.vocab_size)) * config.vocab_size * item
    peak = sum(kept) + logits + 3 * tokens * d * item
    # In a layer's backward pass: gradients of gate and up and of three hidden states, the kernel's
    # sums, a dequantised matrix, and what the layer makes again.
    always_wide = 3 * tokens * d * item + 8 * 3 * f * 16 * 4
    always_wide += f * d * item if is_quantized(model.base) else 0
    grads = 0
    for i, level in reversed([*enumerate(levels)]):
        grads += sum(x.nbytes for x in adapters[i])
        at_once = tokens / mlp_chunks(config, i, level, tokens, dropped=False)
        wide = always_wide + (2 if fused else 4) * f * at_once * item
        again = selective - kept[i] if level not in ("none", "selective") else 0
        again -= 2 * f * (tokens - at_once) * item
        peak = max(peak, grads + sum(kept[: i + 1]) + again + wide)
    return round(always + peak)


def _kept(model: Model, level: str, seq_length: int, fused: bool) -> int:
    """Bytes a layer keeps per token. As `recompute.kept_elements`, but what Inductor keeps at
    "none": norms, not the rotated q and k; and the log-sum-exp of attention."""
    config, item = model.spec.config, model.base["norm"].element_size()
    d, f = config.hidden_size, config.intermediate_size
    q, kv = (projection_shape(config, name)[0] for name in ("q_proj", "k_proj"))
    r = 0 if model.spec.lora is None else sum(t.r for t in model.spec.lora.targets[0])
    attention, lse = d + q + 2 * kv + q + d + r, 4 * config.num_attention_heads
    elements = {
        "none": attention + 2 * f + 2 * d + (0 if fused else f),
        "selective": attention + 2 * f,
        "mlp": attention,
        "attention": d + q,
        "full": d,
    }[level]
    return elements * item + (0 if level == "full" else lse)


def levels_of(model: Model, recompute: Recompute, tokens: int) -> tuple[str, ...]:
    config = model.spec.config
    if recompute == "offload":
        return offload_levels(config, tokens, model.base["norm"].element_size())
    return layer_levels(config, recompute)


def _layers(model: Model) -> list[list[Tensor]]:
    assert model.adapter is not None
    return [tree_leaves(layer) for layer in model.adapter["layers"]]


def _fused(model: Model) -> bool:
    """Whether the SwiGLU kernel runs in every layer."""
    lora = model.spec.lora
    assert lora is not None
    if model.spec.kernels == "torch":
        return False
    ranks = [{t.name: t.r for t in targets} for targets in lora.targets]
    small = lambda r: r is not None and kernel_supports(model.base["norm"].dtype, r)
    return all(small(of.get("gate_proj")) and small(of.get("up_proj")) for of in ranks)
