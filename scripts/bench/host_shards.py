"""A training step whose base waits in host memory, beside the same step over a base on the GPU.

    python scripts/bench/host_shards.py --shape 70b                # one GPU limited to 24 GB
    python scripts/bench/host_shards.py --shape 70b --layers 8     # less host memory; reckoned
    python scripts/bench/host_shards.py --shape tiny               # on the CPU, to see that it runs

Random weights are made layer by layer as NF4 bytes in pinned host memory: 36 GB for 70B, and 4 GB
for embedding and head. torch's allocator is limited to --memory while the base streams, and has all
of the card for the resident model, whose loss must be the same bits.

A row has the median step, its spread, the peak that torch allocated and that plan() predicts, the
rate of the copies, and figures of a trace of one step (trace_overlap.py): the share of the copies'
time in which a kernel ran, the number of copies during which none did, and the share of the step in
which none did. Rows are printed and go to $OUT/host_shards.jsonl as they are measured.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from random_checkpoint import SHAPES as CHECKPOINTS
from trace_overlap import device_events, overlap_figures
from training_step import training_step

import fastlora
from fastlora import functional as FL
from fastlora.distributed.host_shards import HostCopies
from fastlora.distributed.sharded_base import Shards, shard_layers, shard_matrix
from fastlora.models.config import LlamaConfig
from fastlora.models.config_json import config_from_json
from fastlora.models.names import layer_from_tensors, layer_tensors, projection_weights
from fastlora.models.spec import Spec
from fastlora.ops.quant.weights import LEVELS, NESTED_BLOCK, NestedAbsmax, Weight4bit, empty_form

_70B = dict(hidden_size=8192, intermediate_size=28672, num_attention_heads=64, head_dim=128)
_TINY = dict(hidden_size=64, intermediate_size=128, num_attention_heads=2, head_dim=32)
SHAPES: dict[str, dict[str, Any]] = {
    "8b": CHECKPOINTS["8b"],
    "70b": CHECKPOINTS["8b"] | _70B | dict(num_hidden_layers=80),
    "tiny": CHECKPOINTS["8b"]
    | _TINY
    | dict(num_hidden_layers=3, num_key_value_heads=1, vocab_size=256),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--shape", choices=SHAPES, default="70b")
    parser.add_argument("--layers", type=int, help="fewer layers; the whole model is reckoned")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--memory", default="24GB", help="of the card, for the streamed base")
    parser.add_argument("--recompute", default="auto", help="a policy or a number; auto: plan's")
    parser.add_argument("--prefetch", type=int, nargs="*", default=[1, 0])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    return parser.parse_args()


def random_nf4(shape: tuple[int, int], gen: torch.Generator, levels: torch.Tensor) -> Weight4bit:
    """A matrix of random 4-bit numbers whose products keep the size of their input."""
    numbers, device = shape[0] * shape[1], levels.device
    new = lambda n: torch.randint(256, (n,), dtype=torch.uint8, device=device, generator=gen)
    blocks = numbers // 64
    size = 1.7 / shape[1] ** 0.5
    groups = -(-blocks // NESTED_BLOCK)
    absmax = NestedAbsmax(
        new(blocks),
        torch.full((groups,), 0.2 * size, device=device),
        torch.linspace(-1, 1, 256, device=device),
        torch.tensor(size, device=device),
    )
    form = empty_form(shape, torch.bfloat16, device)
    return Weight4bit(new(numbers // 2), levels, form, absmax)


def random_model(config: LlamaConfig, device: torch.device) -> fastlora.Model:
    """A model in NF4 in host memory; one layer at a time is on the device."""
    gen = torch.Generator(device).manual_seed(0)
    shards, levels = Shards(HostCopies(device)), torch.tensor(LEVELS["nf4"], device=device)
    packed = {*projection_weights(config)}

    def layer(i: int) -> dict[str, Any]:
        shapes = dict(layer_tensors(config, i).values())
        make = lambda name: (
            random_nf4(shapes[name], gen, levels)
            if name in packed
            else torch.ones(shapes[name], dtype=torch.bfloat16, device=device)
        )
        return layer_from_tensors(config, i, make)

    def edge() -> torch.Tensor:
        size = (config.vocab_size, config.hidden_size)
        x = torch.empty(size, dtype=torch.bfloat16, device=device)
        return x.normal_(0, config.hidden_size**-0.5, generator=gen)

    base: Any = {
        "embed_tokens": shard_matrix(shards, "embed_tokens", edge()),
        "layers": shard_layers(shards, config.num_hidden_layers, layer),
        "norm": torch.ones(config.hidden_size, dtype=torch.bfloat16, device=device),
        "lm_head": shard_matrix(shards, "lm_head", edge()),
    }
    spec = Spec(config=config, name_or_path="random", max_seq_length=config.max_position_embeddings)
    return fastlora.Model(spec=spec, base=base)


def step_of(model: fastlora.Model, args: argparse.Namespace) -> Callable[[], torch.Tensor]:
    """A step of forward, backward and AdamW; returns the loss."""
    _, step = training_step(model.adapter, fastlora.value_and_grad(FL.loss), 1e-4)
    gen = torch.Generator().manual_seed(1)
    ids = torch.randint(model.spec.config.vocab_size, (args.batch, args.seq), generator=gen)
    batch = dict.fromkeys(("input_ids", "labels"), ids.to(model.base["norm"].device))
    return partial(step, model.base, model.spec, batch)


def measure(step: Callable[[], torch.Tensor], steps: int, device: torch.device) -> dict[str, Any]:
    """Milliseconds, peak and losses of a step; the first one, which compiles, is apart."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    begun = time.perf_counter()
    losses = [float(step())]
    first = time.perf_counter() - begun
    losses.append(float(step()))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(steps):
        wait()
        begun = time.perf_counter()
        losses.append(float(step()))
        wait()
        times.append(1e3 * (time.perf_counter() - begun))
    cuda = device.type == "cuda"
    return {
        "ms": round(statistics.median(times), 1),
        "spread_ms": round(max(times) - min(times), 1),
        "first_s": round(first, 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else None,
        "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2) if cuda else None,
        "losses": losses,
    }


def overlap(step: Callable[[], torch.Tensor], trace: Path) -> dict[str, Any]:
    """From a trace of one step: how copies from the host and kernels share the time."""
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profile:
        step()
        torch.cuda.synchronize()
    profile.export_chrome_trace(str(trace))
    events = device_events(trace)
    trace.unlink()  # hundreds of MB for 70B
    span = lambda e: (e["ts"], e["ts"] + e["dur"])
    kernels = [span(e) for e in events if e["cat"] == "kernel"]
    # Layers, embedding and head: other copies are of a few bytes.
    copies = [e for e in events if "HtoD" in e["name"] and e["args"].get("bytes", 0) > 2**20]
    bytes_copied, seconds = sum(e["args"]["bytes"] for e in copies), sum(e["dur"] for e in copies)
    found = overlap_figures([span(e) for e in copies], kernels)
    rate = round(bytes_copied / seconds / 1e3, 1) if seconds else None
    return found | {"copied_gb": round(bytes_copied / 1e9, 2), "copy_gb_s": rate}


def main() -> None:
    args = arguments()
    cuda = torch.cuda.is_available() and args.shape != "tiny"
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    shape = dict(SHAPES[args.shape])
    every, args.layers = shape["num_hidden_layers"], args.layers or shape["num_hidden_layers"]
    if args.shape == "tiny":
        args.seq = min(args.seq, 16)
    args.out.mkdir(parents=True, exist_ok=True)
    config = config_from_json(shape | {"num_hidden_layers": args.layers})
    limit_memory(args.memory if cuda else None)
    model = fastlora.lora(random_model(config, device), r=args.rank)
    fits = plan_of(model, args, args.memory, "host").recompute
    model = model.with_spec(
        recompute=fits if args.recompute == "auto" else policy_of(args.recompute)
    )
    rows = []
    for ahead in args.prefetch:
        layers: Any = model.base["layers"]
        layers.prefetch = ahead
        rows.append(row_of(model, args, f"host, {ahead} ahead", "host", every))
        note(rows[-1], args.out)
    limit_memory("all" if cuda else None)
    rows.append(row_of(fastlora.gathered(model), args, "device", 1, every))
    note(rows[-1], args.out)
    same = all(row["losses"] == rows[-1]["losses"] for row in rows)
    note({"shape": args.shape, "layers": args.layers, "same_losses": same}, args.out)
    print(table(rows), f"\nsame losses: {same}")


def policy_of(text: str) -> Any:
    """A recompute policy of the command line: a name, or a number."""
    return float(text) if text[0].isdigit() else text


def limit_memory(memory: str | None) -> None:
    """Limit torch's allocator to so many bytes; "all" lifts the limit; None: on the CPU."""
    if memory is None:
        return
    total = torch.cuda.get_device_properties(0).total_memory
    unit = 2**30 if memory.endswith("GiB") else 1e9
    share = 1.0 if memory == "all" else float(memory.rstrip("GiB")) * unit / total
    torch.cuda.set_per_process_memory_fraction(min(1.0, share))


def plan_of(model: fastlora.Model, args: argparse.Namespace, memory: str, shard: Any) -> Any:
    """plan()'s prediction for the setting."""
    sizes = dict(batch_size=args.batch, seq_length=args.seq)
    return fastlora.plan(model, **sizes, memory=memory, shard=shard, card="H200")


def row_of(
    model: fastlora.Model, args: argparse.Namespace, base: str, shard: Any, every: int
) -> dict[str, Any]:
    """The figures of one setting, with the losses of its steps.

    Args:
        model: with its recompute policy.
        args: of the command line.
        base: where the base is, for the table.
        shard: the same for `plan`.
        every: layers of the whole shape.
    """
    policy, device = model.spec.recompute, model.base["norm"].device
    options = plan_of(model, args, "4000GB", shard).options
    option = next(x for x in options if x.recompute == policy)
    step = step_of(model, args)
    row: dict[str, Any] = {"shape": args.shape, "layers": args.layers, "base": base}
    row |= {"recompute": policy, "batch": args.batch, "seq": args.seq, "rank": args.rank}
    row |= measure(step, args.steps, device)
    row["tokens_s"] = round(1e3 * args.batch * args.seq / row["ms"])
    row["plan_gib"] = round(option.peak_bytes / 2**30, 2)
    row["plan_ms"] = round(1e3 * option.step_seconds, 1)
    if args.layers < every:
        row["reckoned_ms"] = round(row["ms"] * every / args.layers, 1)
    if device.type == "cuda":
        name = base.replace(", ", "-").replace(" ", "-")
        row |= overlap(step, args.out / f"trace-{name}.json")
    return row


def note(row: dict[str, Any], out: Path) -> None:
    """Append a row to the file, and print it."""
    text = json.dumps(row)
    with (out / "host_shards.jsonl").open("a") as file:
        file.write(text + "\n")
    print(text, flush=True)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    columns = [
        *("base", "layers", "recompute", "ms", "spread_ms", "plan_ms", "peak_gib", "plan_gib"),
        *("copied_gb", "copy_gb_s", "transfers", "beside_kernels", "without_any_kernel", "idle"),
        "reckoned_ms",
    ]
    columns = [name for name in columns if any(name in row for row in rows)]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(str(r.get(name, "")) for name in columns) + " |" for r in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
