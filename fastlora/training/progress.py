"""The cost of a step (tokens, memory, share of the card's peak) and the progress bar's text."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fastlora.models.config import LlamaConfig
from fastlora.models.names import linear_names, projection_shape
from fastlora.models.params import LINEARS
from fastlora.models.state import Batch, ModelState
from fastlora.runtime.layer_fetching import bytes_outside_allocator
from fastlora.training.history import Record

# Name of a card (a regular expression) -> its 16-bit products with float32 sums, operations per
# second, dense, from NVIDIA's data sheets. The first match counts.
_PEAKS = {
    r"B200|GB200": 2250e12,
    r"H100 PCIe": 756e12,
    r"H[12]00|GH200|H800": 989.4e12,
    r"A100|A800": 312e12,
    r"L40S": 362e12,
    r"L4\b": 121e12,
    r"A10\b": 125e12,
    r"RTX 5090": 209.5e12,
    r"RTX 4090": 165.2e12,
    r"RTX 3090": 71e12,
}


def card_peak(name: str) -> float | None:
    """The peak of a card's 16-bit matrix products in operations per second; None if not known."""
    return next((peak for regex, peak in _PEAKS.items() if re.search(regex, name)), None)


def step_cost(
    model: ModelState, micro_batches: Sequence[Batch], seconds: float, cards: int = 1
) -> Record:
    """The tokens, memory and share of the peak of a step, for its record. `cards` share its rows.

    Returns:
        "read_tokens": tokens that the model read, trained or not, without padding. On CUDA also
        "memory_gib", the peak of the memory that torch has allocated, with a base that other ranks
        read (`PeerCopies`), and for 16-bit models on known cards "peak_share", the operations of
        the step over those that the card could do in its time.
    """
    counts = [_read_tokens(batch) for batch in micro_batches]
    cost: dict[str, Any] = {"read_tokens": sum(tokens for tokens, _ in counts)}
    norm = model.base["norm"]
    if norm.device.type != "cuda":
        return cost
    memory = torch.cuda.max_memory_allocated(norm.device) + bytes_outside_allocator(model.base)
    cost["memory_gib"] = round(memory / 2**30, 3)
    peak = card_peak(torch.cuda.get_device_name(norm.device))
    if peak is not None and norm.itemsize == 2 and seconds > 0:
        operations = sum(step_operations(model.spec.config, *count) for count in counts)
        cost["peak_share"] = round(operations / (seconds * peak * cards), 4)
    return cost


def read_tokens(micro_batches: Sequence[Batch]) -> int:
    """The tokens of batches on the CPU that the model reads, without padding."""
    return sum(_read_tokens(batch)[0] for batch in micro_batches)


def step_operations(config: LlamaConfig, tokens: int, pairs: int) -> float:
    """Operations of a forward and backward pass of LoRA, without those of recomputation.

    Each matrix has two products (forward, and the gradient of its input; its own gradient is not
    computed), attention seven: two forward, five backward. The products of A and B are left out: at
    r = 16 they are 1.4 % for a 1B model and 0.8 % for 8B.

    Args:
        config: of the model.
        tokens: that are read.
        pairs: of a token and one that it attends to.
    """
    sizes = {n: _numel(projection_shape(config, n)) for n in linear_names(config)}
    attention = sum(size for n, size in sizes.items() if LINEARS[n] == "self_attn")
    dense = attention + sum(size for n, size in sizes.items() if LINEARS[n] != "self_attn")
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    sparse = attention + config.num_experts_per_tok * expert
    weights = sum(sparse if is_sparse else dense for is_sparse in config.sparse_layers)
    weights += config.vocab_size * config.hidden_size
    width = projection_shape(config, "q_proj")[0]
    return 4 * weights * tokens + 7 * 2 * width * pairs * len(config.sparse_layers)


def _numel(shape: tuple[int, int]) -> int:
    return shape[0] * shape[1]


def _read_tokens(batch: Batch) -> tuple[int, int]:
    """(tokens without padding, pairs of a token and one it attends to) of a batch on the CPU."""
    if "segment_ids" in batch:
        # Packed batches mark padding by segment 0.
        ids = batch["segment_ids"].cpu().numpy().astype(np.int64)
        rows = np.arange(len(ids))[:, None] * (int(ids.max(initial=0)) + 1)
        lengths = np.bincount((ids + rows)[ids > 0])
    else:
        lengths = batch["attention_mask"].sum(1).cpu().numpy()
    lengths = lengths.astype(np.int64)
    return int(lengths.sum()), int((lengths * (lengths + 1) // 2).sum())


def bar_figures(record: Record, *, encoded: str = "") -> dict[str, str]:
    """The figures of a step as the progress bar shows them: name -> text.

    The tokens per second count all tokens that the model reads, without padding.

    Args:
        record: of the step.
        encoded: how many rows of the data are encoded; "": all of them.
    """
    rate = record["read_tokens"] / max(record["seconds"], 1e-9)
    shown = {"loss": f"{record['loss']:.4f}", "tokens/s": f"{rate:,.0f}"}
    if "eval_loss" in record:
        shown["eval"] = f"{record['eval_loss']:.4f}"
    if "peak_share" in record:
        shown["of peak"] = f"{record['peak_share']:.0%}"
    if "memory_gib" in record:
        shown["memory"] = f"{record['memory_gib']:.1f} GiB"
    if encoded:
        shown["rows"] = encoded
    return shown
