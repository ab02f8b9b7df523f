"""The parts with a model: optimizer steps of `train`, replicated, sharded and hybrid."""

import inspect
import statistics
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from trace_overlap import device_events, overlap_figures

import fastlora
from fastlora.data.batches import batches
from fastlora.distributed.ranks import ALONE, Ranks
from fastlora.runtime.layer_fetching import is_sharded
from fastlora.training.learner import Learner, make_learner
from fastlora.training.run import Run
from fastlora.training.settings import Settings
from fastlora.training.step import optimizer_step
from several_gpus.bases import Draws, config_of, model_of
from several_gpus.bench import Bench, digest


class Sizes(NamedTuple):
    """Of a step of one rank."""

    batch: int
    length: int
    runs: int
    recompute: Any
    layers: int | None
    nccl: bool = False


def settings_of() -> Settings:
    """train's default settings, with a constant rate."""
    given: dict[str, Any] = {
        n: p.default for n, p in inspect.signature(fastlora.train).parameters.items()
    }
    names = [f.name for f in fields(Settings)]
    changed: dict[str, Any] = dict(
        max_steps=10**6, lr_scheduler="constant", warmup_ratio=0.0, learning_rate=1e-4
    )
    return Settings(**({name: given[name] for name in names} | changed))


def batch_of(bench: Bench, vocab: int, sizes: Sizes, seed: int) -> dict[str, torch.Tensor]:
    """Random tokens of this rank, on the CPU, as packed sequences of one document."""
    gen = torch.Generator().manual_seed(1000 * seed + bench.rank)
    ids = torch.randint(0, vocab, (sizes.batch, sizes.length), generator=gen)
    return {"input_ids": ids, "labels": ids.clone(), "segment_ids": torch.ones_like(ids)}


class Stepper:
    """Steps of train over one model."""

    def __init__(self, bench: Bench, model: Any, ranks: Ranks, sizes: Sizes) -> None:
        """A learner over the model's adapter."""
        settings = settings_of()
        self.run = Run(settings, [], [], batches, ranks=ranks)
        self.learner: Learner = make_learner(model, settings)
        self.base = model.base
        self.batch = batch_of(bench, model.spec.config.vocab_size, sizes, 0)
        self.number = 0

    def __call__(self) -> float:
        """One step; its loss."""
        self.number += 1
        return optimizer_step(self.run, self.learner, self.number, [self.batch])["loss"]

    def bits(self) -> str:
        """A hash of the adapter."""
        return digest(list(self.learner.leaves.values()))


def figures_of(bench: Bench, stepper: Stepper, sizes: Sizes, group: Any = None) -> dict[str, Any]:
    """Time, peak and the bits after all steps; those of the slowest rank."""
    stepper()  # compiles
    bench.reset_peak()
    found = bench.timed(stepper, sizes.runs, warm=1, group=group)
    tokens = sizes.batch * sizes.length
    return {
        **found, "peak_gib": bench.peak_gib(stepper.base), "bits": stepper.bits(),
        "tokens_s_a_rank": round(1e3 * tokens / found["ms"]),
    }  # fmt: skip


def slowest(bench: Bench, figures: dict[str, Any]) -> dict[str, Any]:
    """The figures of the slowest rank, the highest peak, and whether all ranks have the bits."""
    every = bench.gathered(figures)
    found = max(every, key=lambda x: x["ms"])
    peaks = [x["peak_gib"] for x in every if x["peak_gib"] is not None]
    same = len({x["bits"] for x in every}) == 1
    return found | {"peak_gib": max(peaks, default=None), "ranks_equal": same}


def steps(bench: Bench, shape: str, nf4: bool, sizes: Sizes, replicated: bool = True) -> None:
    """All measurements of one shape."""
    part = f"{shape} {'NF4' if nf4 else 'bf16'}"
    draws = Draws(config_of(shape, sizes.layers), bench.device, nf4)
    make = lambda shard: model_of(draws, shard, sizes.recompute, sizes.nccl)
    whole = bench.subgroup(bench.ranks)
    assert whole is not None
    if replicated:
        _replicated(bench, part, make, whole, sizes)
    layouts = {"sharded": bench.ranks}
    if bench.ranks >= 4 and bench.ranks % 2 == 0:
        layouts["hybrid"] = bench.ranks // 2
    for name, shard in layouts.items():
        _sharded(bench, part, name, shard, make, whole, sizes, replicated)


def _replicated(bench: Bench, part: str, make: Any, whole: Any, sizes: Sizes) -> None:
    """Weak scaling from one rank to all, the same bits twice, and the predicted peak."""
    held: dict[str, Any] = {}
    if (
        bench.measured(part, "replicated, built", lambda: held.update(model=make(None)) or {})
        is None
    ):
        return
    model = held["model"]

    def alone() -> dict[str, Any]:
        return slowest(bench, figures_of(bench, Stepper(bench, model, ALONE, sizes), sizes))

    one = bench.measured(part, "no process group", alone)
    for count in [n for n in (1, 2, 4, 8, 16) if n < bench.ranks] + [bench.ranks]:
        group = whole if count == bench.ranks else bench.subgroup(count)
        run = partial(_data_parallel, bench, model, count, group, sizes, one)
        bench.measured(part, f"data parallel, {count} ranks", run)
    twice = partial(_twice, bench, model, whole, sizes)
    bench.measured(part, "replicated, twice", twice)
    bench.measured(part, "replicated, plan", lambda: planned(bench, model, sizes, 1, whole))


def _data_parallel(
    bench: Bench, model: Any, count: int, group: Any, sizes: Sizes, one: Any
) -> dict[str, Any]:
    """A step of the first `count` ranks, beside one that is alone."""
    figures: dict[str, Any] = {"ms": 0.0, "peak_gib": None, "bits": ""}
    if group is not None:
        stepper = Stepper(bench, model, group, sizes)
        figures = figures_of(bench, stepper, sizes, group.groups.host)
    every = bench.gathered(figures)[:count]
    found = max(every, key=lambda x: x["ms"])
    same = len({x["bits"] for x in every}) == 1
    share = None if one is None else round(one["ms"] / found["ms"], 4)
    return found | {"of_ranks": count, "ranks_equal": same, "efficiency": share}


def _twice(bench: Bench, model: Any, whole: Any, sizes: Sizes) -> dict[str, Any]:
    """Whether two runs of three steps end with the same bits."""
    bits = []
    for _ in range(2):
        stepper = Stepper(bench, model, whole, sizes)
        for _ in range(3):
            stepper()
        bits.append(stepper.bits())
    return {"same_bits_on_two_runs": bits[0] == bits[1], "bits": bits[0]}


def _sharded(
    bench: Bench, part: str, name: str, shard: int, make: Any, whole: Any, sizes: Sizes,
    replicated: bool,
) -> None:  # fmt: skip
    """Steps with 1, 0 and 2 layers gathered ahead, the predicted peak, a trace, and steps over a
    sharded and a whole base in turn.

    Without replicas, 2 layers ahead and the steps in turn are left out.
    """
    held: dict[str, Any] = {}

    def build() -> dict[str, Any]:
        held["model"] = make(shard)
        layers = held["model"].base["layers"]
        way = type(layers.shards.source).__name__
        return {"kept_gib": round(layers.kept_bytes / 2**30, 3), "shard": shard, "way": way}

    if bench.measured(part, f"{name}, built", build) is None:
        return
    model = held["model"]
    whole.lockstep = is_sharded(model.base)

    def ahead(count: int) -> dict[str, Any]:
        model.base["layers"].prefetch = count
        stepper = Stepper(bench, model, whole, sizes)
        return slowest(bench, figures_of(bench, stepper, sizes)) | {"ahead": count}

    for count in (1, 0, 2)[: 2 + replicated]:
        bench.measured(part, f"{name}, {count} ahead", lambda c=count: ahead(c))
    model.base["layers"].prefetch = 1
    bench.measured(part, f"{name}, plan", lambda: planned(bench, model, sizes, shard, whole))
    bench.measured(
        part, f"{name}, trace", lambda: traced(bench, model, whole, sizes, f"{part} {name}")
    )
    if replicated:
        run = lambda: _in_turn(bench, make(None), model, whole, sizes)
        bench.measured(part, f"{name} beside replicated", run)
    whole.lockstep = False


def _in_turn(bench: Bench, whole_base: Any, sharded: Any, ranks: Any, sizes: Sizes) -> dict:
    """The median step over each base. Steps alternate, because a card that becomes warm, or reaches
    its power cap, slows down within a minute."""
    steppers, times = {}, {}
    for name, model in (("replicated", whole_base), ("sharded", sharded)):
        ranks.lockstep = is_sharded(model.base)
        steppers[name], times[name] = Stepper(bench, model, ranks, sizes), []
        steppers[name]()  # compiles
    for _ in range(3):
        for name, stepper in steppers.items():
            ranks.lockstep = is_sharded(stepper.base)
            times[name] += [x["ms"] for x in bench.gathered(bench.timed(stepper, sizes.runs))]
    ms = {f"{name}_ms": statistics.median(x) for name, x in times.items()}
    return ms | {"of_replicated": round(ms["replicated_ms"] / ms["sharded_ms"], 4)}


def planned(bench: Bench, model: Any, sizes: Sizes, shard: int, ranks: Any) -> dict[str, Any]:
    """The measured peak of a step beside the predicted one."""
    stepper = Stepper(bench, model, ranks, sizes)
    stepper()
    bench.reset_peak()
    stepper()
    peak = bench.peak_gib(model.base)
    given: dict[str, Any] = dict(devices=bench.ranks, shard=shard, memory="1000GiB")
    plan = fastlora.plan(model, sizes.batch, sizes.length, **given)
    option = next(x for x in plan.options if x.recompute == model.spec.recompute)
    predicted = option.peak_bytes / 2**30
    ratio = None if peak is None else round(predicted / peak, 4)
    seconds = option.step_seconds
    return {
        "peak_gib": peak, "predicted_gib": round(predicted, 3), "predicted_of_measured": ratio,
        "predicted_ms": None if seconds is None else round(1e3 * seconds, 1),
    }  # fmt: skip


def traced(bench: Bench, model: Any, ranks: Any, sizes: Sizes, name: str) -> dict[str, Any] | None:
    """How much of the time of NCCL's kernels other kernels run beside them, on rank 0."""
    stepper = Stepper(bench, model, ranks, sizes)
    stepper()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if bench.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    bench.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        stepper()
        bench.synchronize()
    if bench.rank:
        return {}
    trace = bench.out.parent / f"trace-{name.replace(' ', '-').replace(',', '')}.json"
    profile.export_chrome_trace(str(trace))
    found = overlap(trace)
    trace.unlink()  # hundreds of MB for 70B
    return found


def overlap(trace: Path) -> dict[str, Any]:
    """Figures of a Chrome trace: NCCL's kernels, and copies of a MiB or more, beside the others."""
    events = device_events(trace)
    span = lambda e: (e["ts"], e["ts"] + e["dur"])
    transfers = [span(e) for e in events if _is_transfer(e)]
    return overlap_figures(transfers, [span(e) for e in events if not _is_transfer(e)])


def _is_transfer(event: dict[str, Any]) -> bool:
    if event["cat"] == "gpu_memcpy":
        return event["args"].get("bytes", 0) >= 2**20
    return "nccl" in event["name"].lower()
