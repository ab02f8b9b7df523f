"""history."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastlora.model import Model
from fastlora.models.state import Batch

Record = dict[str, Any]  # one step of the history: what `log` is called with


# ── 1. what a run is made of ──────────────────────────────────────────────────────────────
@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """What happened, one entry per optimiser step, a resumed run's earlier steps included."""

    steps: tuple[int, ...]  # 1, 2, 3, ...
    losses: tuple[float, ...]  # mean of -log p over the step's trained tokens, before its update
    learning_rates: tuple[float, ...]
    tokens: tuple[int, ...]  # trained tokens: what the loss is a mean over
    seconds: tuple[float, ...]  # wall time, without evaluation and saving
    grad_norms: tuple[float, ...]  # Euclidean, of the whole gradient, before clipping
    eval_steps: tuple[int, ...]  # the steps after which eval_data was evaluated
    eval_losses: tuple[float, ...]  # mean of -log p over all its trained tokens, no dropout

    @classmethod
    def of(cls, records: Sequence[Record]) -> "History":
        """The columns of what `log` was called with."""
        column = lambda name: tuple(record[name] for record in records)
        evaluated = [record for record in records if "eval_loss" in record]
        return cls(
            steps=column("step"),
            losses=column("loss"),
            learning_rates=column("learning_rate"),
            tokens=column("tokens"),
            seconds=column("seconds"),
            grad_norms=column("grad_norm"),
            eval_steps=tuple(record["step"] for record in evaluated),
            eval_losses=tuple(record["eval_loss"] for record in evaluated),
        )


def bar_postfix(record: Record, micro_batches: Sequence[Batch], model: Model) -> dict[str, str]:
    """What the bar shows beside the step. Tokens are all but the padding: what the model reads."""
    real = sum(
        int((b["attention_mask" if "attention_mask" in b else "segment_ids"] > 0).sum())
        for b in micro_batches
    )
    shown = {"loss": f"{record['loss']:.4f}", "tokens/s": f"{real / record['seconds']:.0f}"}
    if "eval_loss" in record:
        shown["eval"] = f"{record['eval_loss']:.4f}"
    if (device := model.base["norm"].device).type == "cuda":
        shown["peak"] = f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB"
    return shown
