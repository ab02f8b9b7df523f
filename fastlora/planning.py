"""plan(): which recompute policy fits a card, and what a training step will take, before any runs.

Both are sums over shapes. Memory is what is alive at the worst moment: either when the
cross-entropy has its logits and every layer its activations, or in one layer's backward pass, when
the gradients of the layers behind it are there already. Time is a roofline with three rates:
products, attention, and bytes read and written by all else.

The rates are fitted to scripts/bench_results/2026-11-26-*.jsonl, and tests/test_planning.py holds
them to these rows: Llama 1B and 8B, bf16 and NF4, r = 16 on all projections, 4 x 2048 and 2 x 2048
tokens, every policy. The worst of 24 peaks is off by 1.0 %, of 38 step times on H100 and H200 by
4.5 % ("offload", which waits for its copies now and then; of the others by 2.1 %). Other lengths,
ranks and targets are sums of the same terms, and were not measured.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastlora.checks import raise_problems
from fastlora.llama.params import PROJECTIONS, is_quantized, projection_shape
from fastlora.llama.recompute import layer_levels, mlp_chunks, offload_levels
from fastlora.llama.spec import Recompute
from fastlora.model import Model
from fastlora.ops.linear_cross_entropy import rows_per_chunk
from fastlora.ops.lora_swiglu import takes

# What is offered, from most memory to least; a number is a share of "none" (llama/recompute.py).
CHOICES: tuple[Recompute, ...] = (
    *("none", "selective"),
    *(share / 100 for share in range(80, 5, -5)),
    *("full", "offload"),
)
# Of an H100 SXM and an H200, which differ by 2 % in what was fitted: operations and bytes a second.
_PRODUCTS, _ATTENTION, _BYTES = 755e12, 177e12, 1.98e12
_CARDS = r"H[12]00"
# cuBLAS's workspaces, tables, masks and what the allocator rounds up; bytes.
_REST = 0.1 * 2**30
# The driver, the context and fragments between blocks take this much of a card that is not ours.
_RESERVED = 0.06, 0.6 * 2**30  # share of the peak, and bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One recompute policy for a batch."""

    recompute: Recompute
    peak_bytes: int  # allocated by torch
    step_seconds: float | None  # None on a card whose rates are not known


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The fastest policy that fits, and all that were looked at."""

    chosen: Option
    options: tuple[Option, ...]
    memory: int  # bytes that there are

    @property
    def recompute(self) -> Recompute:
        """For `fastlora.lora` and `model.with_spec`."""
        return self.chosen.recompute


def plan(
    model: Model,
    batch_size: int,
    seq_length: int,
    memory: int | str | None = None,
    *,
    optimizer: str = "adamw",
    card: str = "auto",
) -> Plan:
    """The recompute policy to train with; nothing runs and nothing is allocated.

        chosen = fastlora.plan(model, batch_size=4, seq_length=2048, memory="24GB")
        model = model.with_spec(recompute=chosen.recompute)

    Steps are compiled, as they are on CUDA. "offload" takes pinned memory of the host as well, the
    layers' inputs and at most 12 GiB more, which is not counted here. A step so short that the GPU
    waits for the host takes longer than is predicted here.

    Args:
        model: dense, with plain LoRA in its layers.
        batch_size: sequences of a micro-batch.
        seq_length: tokens of each, padding included.
        memory: of the card: bytes, or a text such as "24GB" or "80GiB"; None is that of the CUDA
            device the model is on.
        optimizer: one of `train`'s.
        card: "H100" or "H200" predicts times for these; "auto" is the device the model is on.

    Returns:
        The fastest policy that fits (by the least recomputation, where no rates are known), and the
        predicted peak and time of every one.

    Raises:
        ValueError: if nothing fits, naming what the leanest needs; for an argument that cannot be;
            or for a model of which nothing was measured: mixtures, DoRA, dropout, qat_scheme, and
            adapters outside the layers.
    """
    problems = _problems(model, batch_size, seq_length, optimizer, card)
    available = _available(model, memory, problems)
    raise_problems(ValueError, "fastlora.plan cannot do this:", problems)
    rates = re.search(_CARDS, _card(model) if card == "auto" else card) is not None
    options = tuple(
        Option(
            recompute=choice,
            peak_bytes=peak_bytes(model, choice, batch_size, seq_length, optimizer),
            step_seconds=step_seconds(model, choice, batch_size, seq_length) if rates else None,
        )
        for choice in CHOICES
    )
    share, fixed = _RESERVED
    fitting = [x for x in options if (1 + share) * x.peak_bytes + fixed <= available]
    if not fitting:
        least = min(options, key=lambda x: x.peak_bytes)
        raise ValueError(
            f"{batch_size} x {seq_length} tokens do not fit into {available / 2**30:.1f} GiB: even"
            f" recompute={least.recompute!r} needs {least.peak_bytes / 2**30:.2f} GiB, and"
            f" {(share * least.peak_bytes + fixed) / 2**30:.2f} GiB for the driver and fragments."
            " Lower batch_size (and raise gradient_accumulation_steps), seq_length or r, load the"
            ' base with load_in_4bit=True, or take optimizer="paged_adamw_8bit".'
        )
    quickest = min(fitting, key=lambda x: x.step_seconds or 0.0)  # the first of equals
    return Plan(chosen=quickest, options=options, memory=available)


# ── 1. memory ─────────────────────────────────────────────────────────────────────────────

_MOMENTS = {"adamw": 8.0, "adamw_8bit": 2.1, "paged_adamw_8bit": 2.1}  # bytes a parameter


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
    always = sum(x.nbytes for x in tree_leaves(model.base)) + own + _REST
    always += _MOMENTS[optimizer] * sum(parameters)

    levels, fused = _levels(model, recompute, tokens), _fused(model)
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


def _levels(model: Model, recompute: Recompute, tokens: int) -> tuple[str, ...]:
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
    small = lambda r: r is not None and takes(model.base["norm"].dtype, r)
    return all(small(of.get("gate_proj")) and small(of.get("up_proj")) for of in ranks)


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
    for level in _levels(model, recompute, tokens):
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


# ── 3. arguments ──────────────────────────────────────────────────────────────────────────

_UNITS = {"GB": 10**9, "GiB": 2**30, "MB": 10**6, "MiB": 2**20}


def _problems(model: Any, batch_size: Any, seq_length: Any, optimizer: Any, card: Any) -> list[str]:
    if not isinstance(model, Model) or model.adapter is None or model.spec.lora is None:
        return ["model has no adapter; call fastlora.lora(model, ...) first."]
    problems = [
        f"{name}={value!r}: expected a whole number >= 1."
        for name, value in (("batch_size", batch_size), ("seq_length", seq_length))
        if type(value) is not int or value < 1
    ]
    if not problems and seq_length > model.spec.max_seq_length:
        problems.append(f"seq_length={seq_length} is over max_seq_length.")
    if optimizer not in _MOMENTS:
        problems.append(f"optimizer={optimizer!r}: expected one of {list(_MOMENTS)}.")
    if card != "auto" and not (isinstance(card, str) and re.fullmatch(_CARDS, card)):
        problems.append(f'card={card!r}: expected "auto", "H100" or "H200".')
    lora, config = model.spec.lora, model.spec.config
    unmeasured = {
        f"a mixture of experts ({config.model_type})": any(config.sparse_layers),
        "use_dora": lora.use_dora,
        "lora_bias": lora.lora_bias,
        "lora_dropout": lora.lora_dropout > 0,
        "qat_scheme": lora.qat_scheme is not None,
        "trained tensors outside the projections": set(model.adapter) != {"layers"},
    }
    found = [name for name, there in unmeasured.items() if there]
    return problems + [f"{name}: nothing of the kind was measured." for name in found]


def _available(model: Any, memory: Any, problems: list[str]) -> int:
    """Bytes of the card; what is wrong is added to `problems`."""
    if type(memory) is int and memory > 0:
        return memory
    units = "|".join(_UNITS)
    found = (
        re.fullmatch(rf"(\d+(?:\.\d+)?) ?({units})", memory) if isinstance(memory, str) else None
    )
    if found:
        return round(float(found[1]) * _UNITS[found[2]])
    if memory is None and not problems and model.base["norm"].is_cuda:
        return torch.cuda.get_device_properties(model.base["norm"].device).total_memory
    expected = 'expected bytes, a text such as "24GB" or "80GiB"'
    problems.append(f"memory={memory!r}: {expected}; or None with a model on a CUDA device.")
    return 0


def _card(model: Model) -> str:
    device = model.base["norm"].device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""
