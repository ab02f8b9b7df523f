"""Step time, tokens/s, peak memory and first-step time of a training step, beside its peers.

    python scripts/bench.py --shape 1b                   # every recompute policy, and the peers
    python scripts/bench.py --shape 8b --recompute none full --peers hf --out results.jsonl
    python scripts/bench.py --shape 8b --load-in-4bit --batch 2 --peers unsloth-gc liger-gc
    python scripts/bench.py --shape 1b --targets q_proj v_proj --recompute none --peers unsloth

One setting, one process; bench_steps.py says what a step is. Every step sees the same random
tokens. Steps run back to back, as in training; a CUDA event after each gives its time. Median of
--steps after --warm; spread is the slowest step less the fastest.

--cuda-graph plays our step back (`value_and_grad(cuda_graph=True)`; not "offload"). Its peak is
that of the whole process, for a graph takes its memory while it is recorded.

The peers: transformers + PEFT ("hf"), compiled ("hf-compile"), with Liger's kernels ("liger"), and
Unsloth ("unsloth"; it wants a tokenizer beside the checkpoint); with "-gc" after it, with gradient
checkpointing. "probe" is bench_results/probe.py, the same step written as plainly as torch.compile
allows. The last columns: how many times --against's speed, and the floor's share of the step.

The floor is what the arithmetic alone takes at 790 TFLOP/s, which a bf16 product reaches on an H100
or H200: 4 operations for every parameter that multiplies and every token (forward, and the input's
gradient; the adapters' own are left out; of a mixture's experts, those a token goes through), and
attention's 14 for every query channel and every token before it (2 products forward, 5 backward).
The same for every row of a table: what a policy computes again is no part of the work.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from bench_steps import PEERS, step_of
from random_checkpoint import SHAPES, write_checkpoint

from fastlora.llama.config import LlamaConfig
from fastlora.llama.params import EXPERTS, PROJECTIONS, layer_targets, projection_shape

POLICIES = ["none", "selective", "0.6", "0.4", "0.2", "full", "offload"]
SIZES = ("shape", "batch", "seq", "documents", "rank", "dropout", "kernels", "layers")
OPTIONS = ("use_dora", "lora_bias", "load_in_4bit", "cuda_graph", "deterministic")
RATE = 790e12  # bf16 operations a second; HOPPER.md's 8192-cubed product on these cards: 778 to 790


def measure(args: argparse.Namespace) -> dict:
    """One setting, in this process."""
    start = time.perf_counter()
    step = step_of(args)
    torch.cuda.synchronize()
    load, of_loading = time.perf_counter() - start, torch.cuda.max_memory_allocated()
    ids = token_ids(args)
    start = time.perf_counter()
    losses = [step(ids)]
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    for _ in range(args.warm):
        step(ids)
    if not args.cuda_graph or args.one.startswith((*PEERS, "probe")):
        torch.cuda.reset_peak_memory_stats()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(args.steps + 1)]
    events[0].record()
    for event in events[1:]:
        losses.append(step(ids))
        event.record()
    torch.cuda.synchronize()
    timed = [a.elapsed_time(b) for a, b in pairwise(events)]
    median = statistics.median(timed)
    floor = floor_ms(shape_of(args), args.batch, args.seq)
    return {
        "setting": args.one,
        "ms": round(median, 1),
        "spread_ms": round(max(timed) - min(timed), 1),
        "tokens_s": round(1e3 * args.batch * args.seq / median),
        "floor_ms": round(floor, 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
        "first_s": round(first, 1),
        "load_s": round(load, 1),
        "load_gib": round(of_loading / 2**30, 2),
        "loss": [round(float(losses[0]), 4), round(float(losses[-1]), 4)],
    }


def token_ids(args: argparse.Namespace) -> torch.Tensor:
    """Random tokens [batch, seq] on the GPU, always the same."""
    generator = torch.Generator().manual_seed(0)
    vocab_size = SHAPES[args.shape]["vocab_size"]
    return torch.randint(0, vocab_size, (args.batch, args.seq), generator=generator).cuda()


def shape_of(args: argparse.Namespace) -> dict[str, Any]:
    """config.json of the shape, with as many layers as were asked for."""
    return SHAPES[args.shape] | ({"num_hidden_layers": args.layers} if args.layers else {})


def floor_ms(shape: dict[str, Any], batch: int, seq: int) -> float:
    """Milliseconds below which no step of bf16 products can be; see the top of this file."""
    config = LlamaConfig.from_hf(shape)
    names = (name for i in range(config.num_hidden_layers) for name in layer_targets(config, i))
    layers = 0
    for name in names:
        rows, columns = projection_shape(config, name)
        layers += rows * columns * (config.num_experts_per_tok if name in EXPERTS else 1)
    head = config.vocab_size * config.hidden_size
    attention = 14 * config.num_attention_heads * config.head_dim * (seq / 2)
    a_token = 4 * layers + config.num_hidden_layers * attention + 4 * head
    return 1e3 * batch * seq * a_token / RATE


def in_own_process(setting: str, folder: Path, args: argparse.Namespace) -> dict:
    command = [sys.executable, __file__, "--one", setting, "--folder", str(folder)]
    for name in SIZES:
        command += [f"--{name}", str(getattr(args, name))]
    command += ["--targets", *args.targets, "--steps", str(args.steps), "--warm", str(args.warm)]
    command += [f"--{n.replace('_', '-')}" for n in OPTIONS if getattr(args, n)]
    with tempfile.TemporaryDirectory() as cold:  # a compile cache of its own: first steps are cold
        env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cold}
        if args.cache:
            env["TORCHINDUCTOR_CACHE_DIR"] = str(args.cache)
        done = subprocess.run(command, capture_output=True, text=True, env=env)
    lines = [x for x in done.stdout.splitlines() if x.startswith("RESULT ")]
    if not lines:
        return {"setting": setting, "error": done.stderr.strip().splitlines()[-3:]}
    return json.loads(lines[0].removeprefix("RESULT "))


def how(args: argparse.Namespace) -> dict:
    """What a line of results must say beside the setting."""
    device = torch.cuda.get_device_name()
    options = {n: True for n in OPTIONS if getattr(args, n)}
    more = ("dropout", "layers", "documents")
    options |= {n: getattr(args, n) for n in more if getattr(args, n)}
    if args.targets != list(PROJECTIONS):
        options["targets"] = args.targets
    versions = {"torch": torch.__version__, "device": device}
    return {n: getattr(args, n) for n in ("shape", "batch", "seq", "rank", "kernels")} | (
        options | versions
    )


def listed(facts: dict) -> str:
    """Facts on one line, as a table's title."""
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def report(facts: dict, rows: list[dict], against: str) -> str:
    """A table under what holds for all of it: each row beside the peer `against`, if that ran."""
    lines = ["", listed(facts)]
    lines += [
        f"{'setting':<12}{'ms':>8}{'spread':>8}{'tokens/s':>10}{'GiB':>8}{'first s':>9}"
        f"{'x ' + against:>14}{'floor':>8}"
    ]
    theirs = next((r for r in rows if r["setting"] == against and "ms" in r), None)
    for r in rows:
        if "error" in r:
            lines += [f"{r['setting']:<12}{r['error']}"]
            continue
        ratio = f"{theirs['ms'] / r['ms']:.2f}" if theirs else ""
        lines += [
            f"{r['setting']:<12}{r['ms']:>8}{r['spread_ms']:>8}{r['tokens_s']:>10}"
            f"{r['peak_gib']:>8}{r['first_s']:>9}{ratio:>14}{r['floor_ms'] / r['ms']:>8.0%}"
        ]
    return "\n".join(lines)


def add_layer_arguments(parser: argparse.ArgumentParser) -> None:
    """What makes one layer of a step, beside the setting."""
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", nargs="+", default=list(PROJECTIONS))
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--kernels", choices=["auto", "torch"], default="auto")


def add_step_arguments(parser: argparse.ArgumentParser) -> None:
    """What makes a step, beside the setting."""
    add_layer_arguments(parser)
    parser.add_argument(
        "--documents", type=int, default=0, help="pack rows of documents of so many tokens (ours)"
    )
    parser.add_argument("--layers", type=int, default=0, help="0: as many as the shape has")
    parser.add_argument("--folder", type=Path, help="a checkpoint that is there already")
    for name in OPTIONS:
        parser.add_argument(f"--{name.replace('_', '-')}", action="store_true")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_step_arguments(parser)
    parser.add_argument("--recompute", nargs="*", default=POLICIES)
    parser.add_argument("--peers", nargs="*", default=["probe", "hf", "hf-gc"])
    parser.add_argument("--against", help="the peer of the ratios; the first of --peers")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warm", type=int, default=3)
    parser.add_argument("--cache", type=Path, help="compile cache; first steps are then not cold")
    parser.add_argument("--out", type=Path, help="append one JSON line per setting")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print("RESULT " + json.dumps(measure(args)))
        return
    if not torch.cuda.is_available():
        raise SystemExit("bench.py measures on a CUDA GPU; there is none here.")
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        if not args.folder:
            write_checkpoint(shape_of(args), folder)
        rows = []
        for setting in [*args.recompute, *args.peers]:
            rows.append(how(args) | in_own_process(setting, folder, args))
            print(rows[-1], flush=True)
            if args.out:
                with args.out.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    print(report(how(args), rows, args.against or next(iter(args.peers), "")))


if __name__ == "__main__":
    main()
