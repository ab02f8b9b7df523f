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

from fastlora.errors import raise_problems
from fastlora.model import Model
from fastlora.models.spec import Recompute
from fastlora.models.state import ModelState
from fastlora.training.planning.memory import MOMENTS, peak_bytes
from fastlora.training.planning.time import step_seconds

# What is offered, from most memory to least; a number is a share of "none" (llama/recompute.py).
CHOICES: tuple[Recompute, ...] = (
    *("none", "selective"),
    *(share / 100 for share in range(80, 5, -5)),
    *("full", "offload"),
)

_CARDS = r"H[12]00"


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


# ── 3. arguments ──────────────────────────────────────────────────────────────────────────
_UNITS = {"GB": 10**9, "GiB": 2**30, "MB": 10**6, "MiB": 2**20}


def _problems(
    model: ModelState, batch_size: Any, seq_length: Any, optimizer: Any, card: Any
) -> list[str]:
    if not isinstance(model, Model) or model.adapter is None or model.spec.lora is None:
        return ["model has no adapter; call fastlora.lora(model, ...) first."]
    problems = [
        f"{name}={value!r}: expected a whole number >= 1."
        for name, value in (("batch_size", batch_size), ("seq_length", seq_length))
        if type(value) is not int or value < 1
    ]
    if not problems and seq_length > model.spec.max_seq_length:
        problems.append(f"seq_length={seq_length} is over max_seq_length.")
    if optimizer not in MOMENTS:
        problems.append(f"optimizer={optimizer!r}: expected one of {list(MOMENTS)}.")
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


def _available(model: ModelState, memory: Any, problems: list[str]) -> int:
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
