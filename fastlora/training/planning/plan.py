"""plan(): which recompute policy fits a card, and how long a training step will take.

Predictions are sums over shapes (memory.py, time.py) whose rates are those of kernels in profiles.
The test holds them to tests/data/planning_rows.jsonl: Llama 1B, 8B and 70B, bf16, NF4 and e4m3,
batches of 512 to 131,072 tokens, every policy, dropout, adapters on q and v alone, bases sharded
over two GPUs and in host memory. The largest error of peaks is 1.3 %, that of times on H100 and
H200 6.9 %. Other lengths and ranks use the same terms and were not measured. Long rows are taken
for one document: packed documents cost less.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastlora.arguments import Rule, argument_problems, describe, one_of, whole_number
from fastlora.distributed.cost import Cluster
from fastlora.errors import raise_problems
from fastlora.models.input_checks import MODEL
from fastlora.models.spec import Recompute
from fastlora.models.stacks import one_adapter_problems
from fastlora.models.state import ModelState, require_adapter
from fastlora.training.planning.memory import MOMENT_BYTES, base_bytes, peak_bytes
from fastlora.training.planning.ranks import Layout, cluster_problems, layouts_of, transfers
from fastlora.training.planning.time import step_seconds

# The policies to choose from, from most memory to least. A number is the share of the activation
# memory of "none" that may be kept (models/levels.py).
CHOICES: tuple[Recompute, ...] = (
    *("none", "selective"),
    *(share / 100 for share in range(80, 5, -5)),
    *("full", "offload"),
)

_CARDS = r"H[12]00"  # whose rates are known

# Memory of the card that torch does not report as allocated: the driver, the CUDA context, and
# fragments between blocks.
_RESERVED_SHARE_OF_PEAK, _RESERVED_BYTES = 0.06, 0.6 * 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One recompute policy, with its predictions for a batch."""

    recompute: Recompute
    peak_bytes: int
    """Of the card's memory at the peak: what torch allocates, and parts that other ranks read."""
    step_seconds: float | None
    """None for a card whose rates are not known. With `exposed_seconds`."""
    shard: int = 1
    """Ranks that share the base: `load`'s argument. 1: every rank has all of it."""
    replicate: int = 1
    """Groups of such ranks, each with all of the base."""
    host: bool = False
    """Whether the base is in host memory: `load(shard="host")`."""
    gathered_bytes: int = 0
    """Weights that a rank receives from others in a step of one micro-batch."""
    copied_bytes: int = 0
    """Weights that a rank copies from its host's memory in such a step."""
    summed_bytes: int = 0
    """Gradients that a rank receives in a step."""
    exposed_seconds: float | None = None
    """By which these transfers make the step longer: what no computation hides, and what matrix
    products lose beside them; None for a card whose rates are not known."""

    @property
    def efficiency(self) -> float | None:
        """The share of a step that its computation alone takes; None if `step_seconds` is."""
        if self.step_seconds is None or self.exposed_seconds is None:
            return None
        return 1 - self.exposed_seconds / self.step_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The fastest policy that fits, and all policies that were considered."""

    chosen: Option
    options: tuple[Option, ...]
    memory: int
    """Bytes of the card."""

    @property
    def recompute(self) -> Recompute:
        """The chosen policy, for `fastlora.lora` and `model.with_spec`."""
        return self.chosen.recompute


def plan(
    model: ModelState,
    batch_size: int,
    seq_length: int,
    memory: int | str | None = None,
    *,
    optimizer: str = "adamw",
    card: str = "auto",
    devices: int = 1,
    nodes: int = 1,
    link: str = "nvlink",
    network: str = "8x400g",
    shard: int | str = "auto",
) -> Plan:
    """Predict which recompute policy to train with. Nothing is run or allocated.

        chosen = fastlora.plan(model, batch_size=4, seq_length=2048, memory="24GB")
        model = model.with_spec(recompute=chosen.recompute)

    Predictions are for compiled steps, as on CUDA. "offload" also takes pinned host memory, for
    the layers' inputs and at most 12 GiB more, which is not counted here. A step that is so short
    that the GPU waits for the host takes longer than predicted.

    Args:
        model: dense, with LoRA on projections of its layers, with or without dropout.
        batch_size: sequences in a micro-batch.
        seq_length: tokens in each sequence, padding included.
        memory: of the card: bytes, or a text such as "24GB" or "80GiB"; None: of the CUDA device
            that the model is on.
        optimizer: one of `train`'s.
        card: "H100" or "H200" predicts times for these; "auto" is the device the model is on.
        devices: GPUs of each machine. `memory` is of one of them, `batch_size` of each.
        nodes: machines.
        link: between the GPUs of a machine: "nvlink", "pcie5" or "pcie4".
        network: between machines: "8x400g" (a port for each of 8 GPUs), "400g" or "100g".
        shard: how the base is kept: a number of ranks, "host", or "auto" for the fastest number.
            `distributed/cost.py` has the cost model. It was measured on two GPUs with NVLink; the
            rates of other links are data sheets'.

    Returns:
        The fastest policy that fits (the one that recomputes least, if the card's rates are not
        known), and the predicted peak and time of every policy.

    Raises:
        ValueError: an argument has a wrong type or value; or no policy fits (the message says how
            much the leanest one needs); or the model is of a kind that was not measured: mixtures
            of experts, DoRA, qat_scheme, and adapters outside the layers.
    """
    problems = _problems(model, batch_size, seq_length, optimizer, card)
    problems += cluster_problems(devices, nodes, link, network, shard)
    available = _memory_bytes(memory, model)
    if available is None:
        problems.append(
            f'memory={describe(memory)}: expected bytes, a text such as "24GB" or "80GiB"; or None'
            " with a model on a CUDA device"
        )
    raise_problems(ValueError, "fastlora.plan cannot use these arguments:", problems)
    assert available is not None
    known = re.search(_CARDS, _device_name(model) if card == "auto" else card) is not None
    cluster = Cluster(devices=devices, nodes=nodes, link=link, network=network)
    layouts = layouts_of(shard, cluster)
    options = _options(model, batch_size, seq_length, optimizer, known, cluster, layouts)
    share, fixed = _RESERVED_SHARE_OF_PEAK, _RESERVED_BYTES
    fitting = [x for x in options if (1 + share) * x.peak_bytes + fixed <= available]
    if not fitting:
        least = min(options, key=lambda x: x.peak_bytes)
        raise ValueError(
            f"{batch_size} x {seq_length} tokens do not fit into {available / 2**30:.1f} GiB: even"
            f" recompute={least.recompute!r} needs {least.peak_bytes / 2**30:.2f} GiB, and"
            f" {(share * least.peak_bytes + fixed) / 2**30:.2f} GiB for the driver and fragments."
            " Lower batch_size (and raise gradient_accumulation_steps), seq_length or r, load the"
            ' base with load_in_4bit=True or shard="host", or take optimizer="paged_adamw_8bit".'
        )
    # Without times all keys are equal, and min returns the first: the one that recomputes least.
    fastest = min(fitting, key=lambda x: x.step_seconds or 0.0)
    return Plan(chosen=fastest, options=options, memory=available)


def _options(
    model: ModelState,
    batch_size: int,
    seq_length: int,
    optimizer: str,
    known: bool,
    cluster: Cluster,
    layouts: Sequence[Layout],
) -> tuple[Option, ...]:
    """All policies with all layouts of the base; `known`: whether times can be predicted."""
    base, options = base_bytes(model), []
    for choice in CHOICES:
        seconds = step_seconds(model, choice, batch_size, seq_length) if known else None
        for layout in layouts:
            peak = peak_bytes(model, choice, batch_size, seq_length, optimizer, *layout, base)
            moved = transfers(model, batch_size, seq_length, seconds, layout, cluster, base)
            options.append(Option(recompute=choice, peak_bytes=peak, **moved))
    return tuple(options)


_CARD = Rule(
    lambda x: isinstance(x, str) and re.fullmatch(f"auto|{_CARDS}", x) is not None,
    '"auto", "H100" or "H200"',
)


def _problems(model: Any, batch_size: Any, seq_length: Any, optimizer: Any, card: Any) -> list[str]:
    """One line for each unusable argument, and for each unmeasured feature of the model."""
    problems = argument_problems(
        {
            "model": (model, MODEL),
            "batch_size": (batch_size, whole_number(1)),
            "seq_length": (seq_length, whole_number(1)),
            "optimizer": (optimizer, one_of(*MOMENT_BYTES)),
            "card": (card, _CARD),
        }
    )
    if not isinstance(model, ModelState):
        return problems
    if model.adapter is None:
        return [*problems, "model has no adapter; call fastlora.lora(model, ...) first"]
    problems += one_adapter_problems(model)
    longest = model.spec.max_seq_length
    if type(seq_length) is int and seq_length > longest:
        problems.append(f"seq_length={seq_length}: expected at most max_seq_length={longest}")
    return problems + _unmeasured(model)


def _unmeasured(model: ModelState) -> list[str]:
    lora, adapter = require_adapter(model)
    config = model.spec.config
    kinds = {
        f"a mixture of experts ({config.model_type})": any(config.sparse_layers),
        "use_dora": lora.use_dora,
        "lora_bias": lora.lora_bias,
        "qat_scheme": lora.qat_scheme is not None,
        "trained tensors outside the projections": set(adapter) != {"layers"},
    }
    return [
        f"{kind}: such models were not measured, so nothing can be predicted"
        for kind, present in kinds.items()
        if present
    ]


_UNITS = {"GB": 10**9, "GiB": 2**30, "MB": 10**6, "MiB": 2**20}


def _memory_bytes(memory: Any, model: Any) -> int | None:
    """Bytes of the card; None if neither the argument nor the model's device tells."""
    if type(memory) is int and memory > 0:
        return memory
    if isinstance(memory, str):
        match = re.fullmatch(rf"(\d+(?:\.\d+)?) ?({'|'.join(_UNITS)})", memory)
        return round(float(match[1]) * _UNITS[match[2]]) if match else None
    if memory is None and isinstance(model, ModelState) and model.base["norm"].is_cuda:
        return torch.cuda.get_device_properties(model.base["norm"].device).total_memory
    return None


def _device_name(model: ModelState) -> str:
    device = model.base["norm"].device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""
