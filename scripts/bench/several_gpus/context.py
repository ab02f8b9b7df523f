"""Context parallel: a step over one long row, by one rank and by all ranks together."""

import math
from dataclasses import replace
from typing import Any

import torch

import fastlora
from fastlora.data.batches import batches
from fastlora.distributed.ranks import ALONE, Ranks
from fastlora.training.learner import Learner, make_learner
from fastlora.training.run import Run
from fastlora.training.step import optimizer_step
from several_gpus.bases import Draws, config_of, model_of
from several_gpus.bench import Bench
from several_gpus.steps import Sizes, settings_of


class RowStepper:
    """Steps of train over one row, which all ranks have together or each has alone."""

    def __init__(self, model: Any, ranks: Ranks, batch: dict[str, torch.Tensor]) -> None:
        """A learner over the model's adapter."""
        together = 1 if ranks.context is None else ranks.context.ranks
        settings = replace(settings_of(), context_parallel=together)
        self.run = Run(settings, [], [], batches, ranks=ranks)
        self.learner: Learner = make_learner(model, settings, None, ranks.context)
        self.batch, self.first = batch, dict[str, float]()
        self.number = 0

    def __call__(self) -> None:
        """One step; the figures of the first one are kept."""
        self.number += 1
        figures = optimizer_step(self.run, self.learner, self.number, [self.batch])
        self.first = self.first or {name: figures[name] for name in ("loss", "grad_norm")}


def context(bench: Bench, shape: str, sizes: Sizes) -> None:
    """One row of sizes.length tokens: plain, and packed with documents of four lengths."""
    draws = Draws(config_of(shape, sizes.layers), bench.device, nf4=False)
    whole = bench.subgroup(bench.ranks)
    assert whole is not None
    held: dict[str, Any] = {}

    def build() -> dict[str, Any]:
        held["model"] = model_of(draws, None, sizes.recompute)
        whole.context = fastlora.context_group(bench.ranks, bench.device)
        return {}

    part = f"context, {shape}"
    if bench.measured(part, "built", build) is None:
        return
    for name, share in (("one document", 1.0), ("documents", 1 / 16)):
        batch = row_of(draws.config.vocab_size, sizes.length, share)
        label = f"{sizes.length} tokens, {name}"
        alone = lambda b=batch: measured(bench, held["model"], ALONE, b, sizes)
        one = bench.measured(part, f"{label}, 1 rank", alone)

        def together(batch: Any = batch, one: Any = one) -> dict[str, Any]:
            found = measured(bench, held["model"], whole, batch, sizes)
            if one is None:
                return found
            off = {f"{x}_off": f"{abs(found[x] / one[x] - 1):.1e}" for x in ("loss", "grad_norm")}
            return found | {"speedup": round(one["ms"] / found["ms"], 3)} | off

        bench.measured(part, f"{label}, {bench.ranks} ranks", together)


def measured(bench: Bench, model: Any, ranks: Ranks, batch: Any, sizes: Sizes) -> dict[str, Any]:
    """Time, peak, and loss and norm of the first step; of the slowest rank."""
    stepper = RowStepper(model, ranks, batch)
    stepper()  # compiles
    bench.reset_peak()
    found = bench.timed(stepper, sizes.runs, warm=0)
    every = bench.gathered(found | stepper.first | {"peak_gib": bench.peak_gib(model.base)})
    slowest = max(every, key=lambda x: x["ms"])
    equal = ranks is ALONE or len({x["grad_norm"] for x in every}) == 1
    return slowest | {"tokens_s": round(1e3 * sizes.length / slowest["ms"]), "ranks_equal": equal}


def row_of(vocab: int, length: int, share: float) -> dict[str, torch.Tensor]:
    """Random tokens, the same on all ranks, in documents of at most this share of the row."""
    gen = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab, (1, length), generator=gen)
    # 1, 1/2, 3/4 and 1/4 of the largest length, in turn.
    lengths = [max(1, math.ceil(length * share * part)) for part in (1, 1 / 2, 3 / 4, 1 / 4)]
    repeats = torch.tensor(lengths * math.ceil(length / sum(lengths)))
    segments = torch.repeat_interleave(1 + torch.arange(len(repeats)), repeats)[None, :length]
    return {"input_ids": ids, "labels": ids.clone(), "segment_ids": segments}
