"""Measure one setting of bench.py, in a separate process.

A setting is one of fastlora's recompute policies, a number, "probe", or a peer's name.
scripts/bench.py and scripts/bench/scaling.py start this file once per setting, so that every
setting gets an empty GPU. bench_steps.py defines the training step.
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
from bench_steps import step_of
from energy import energy
from random_checkpoint import SHAPES
from step_batches import PEERS, real_tokens, step_batches

from fastlora.models.config_json import config_from_json
from fastlora.models.names import layer_targets, projection_shape
from fastlora.models.params import EXPERTS, PROJECTIONS

SIZES = ("shape", "batch", "seq", "documents", "rank", "dropout", "kernels", "layers")
SIZES += ("base_precision", "energy")
OPTIONS = ("use_dora", "lora_bias", "load_in_4bit", "cuda_graph", "deterministic", "chats")
OURS = ("cuda_graph", "deterministic")  # options that the peers do not have
# bf16 operations per second. A product of two 8192 x 8192 matrices reaches 778 to 790 TFLOP/s on
# these cards.
RATE = 790e12


def measure(args: argparse.Namespace) -> dict:
    """Run the setting `args.one` in this process and return its figures."""
    start = time.perf_counter()
    step = step_of(args)
    torch.cuda.synchronize()
    load, of_loading = time.perf_counter() - start, torch.cuda.max_memory_allocated()
    batches = step_batches(args)
    run = lambda i: step(batches[i % len(batches)])
    start = time.perf_counter()
    losses = [run(0)]
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    for i in range(args.warm):
        run(i)
    # A CUDA graph allocates its memory during recording, so its peak covers all steps.
    if not args.cuda_graph or is_peer(args.one):
        torch.cuda.reset_peak_memory_stats()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(args.steps + 1)]
    events[0].record()
    for i, event in enumerate(events[1:]):
        losses.append(run(i))
        event.record()
    torch.cuda.synchronize()
    timed = [a.elapsed_time(b) for a, b in pairwise(events)]
    median = statistics.median(timed)
    floor = floor_ms(shape_of(args), args.batch, args.seq)
    tokens = statistics.mean(map(real_tokens, batches))
    figures = {
        "setting": args.one,
        "ms": round(median, 1),
        "spread_ms": round(max(timed) - min(timed), 1),
        "tokens_s": round(1e3 * tokens / median),
        "floor_ms": round(floor, 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
        "first_s": round(first, 1),
        "load_s": round(load, 1),
        "load_gib": round(of_loading / 2**30, 2),
        "first_loss": round(float(losses[0]), 4),
        "last_loss": round(float(losses[-1]), 4),
    }
    if args.energy:
        figures |= energy(run, median, tokens, args.energy)
    return figures


def is_peer(setting: str) -> bool:
    """Whether a setting is not one of fastlora's recompute policies."""
    return setting.startswith((*PEERS, "probe"))


def shape_of(args: argparse.Namespace) -> dict[str, Any]:
    """config.json of the shape, with --layers layers if that was given."""
    return SHAPES[args.shape] | ({"num_hidden_layers": args.layers} if args.layers else {})


def floor_ms(shape: dict[str, Any], batch: int, seq: int) -> float:
    """Milliseconds that the arithmetic of a step takes at RATE.

    Per token: 4 operations for each parameter that multiplies it (forward, and the gradient of the
    input; the adapters' own products are left out, and of a mixture's experts only those that a
    token visits count), and for attention 14 for each query channel and each earlier token (2
    products forward, 5 backward). In a layer with a window only the window's tokens count.
    Recomputed work does not count.
    """
    config = config_from_json(shape)
    names = (name for i in range(config.num_hidden_layers) for name in layer_targets(config, i))
    layers = 0
    for name in names:
        rows, columns = projection_shape(config, name)
        layers += rows * columns * (config.num_experts_per_tok if name in EXPERTS else 1)
    head = config.vocab_size * config.hidden_size
    channels, window = config.num_attention_heads * config.head_dim, config.sliding_window or seq
    # A token at position i sees min(i + 1, window) tokens: on average this many.
    in_window = min(window, seq) * (1 - min(window, seq) / (2 * seq))
    seen = [seq / 2 if x == "full_attention" else in_window for x in config.layer_types]
    per_token = 4 * layers + 14 * channels * sum(seen) + 4 * head
    return 1e3 * batch * seq * per_token / RATE


def in_own_process(setting: str, folder: Path, args: argparse.Namespace) -> dict:
    """The figures of one setting, or {"setting", "error"} if its process failed."""
    command = [sys.executable, __file__, "--one", setting, "--folder", str(folder)]
    for name in SIZES:
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    command += ["--targets", *args.targets, "--steps", str(args.steps), "--warm", str(args.warm)]
    command += [f"--{n.replace('_', '-')}" for n in OPTIONS if getattr(args, n)]
    with tempfile.TemporaryDirectory() as cold:  # an empty compile cache: the first step is cold
        env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cold, "HF_HUB_OFFLINE": "1"}
        env["UNSLOTH_DISABLE_STATISTICS"] = "1"
        if args.cache:
            env["TORCHINDUCTOR_CACHE_DIR"] = str(args.cache)
        done = subprocess.run(command, capture_output=True, text=True, env=env)
    lines = [x for x in done.stdout.splitlines() if x.startswith("RESULT ")]
    if not lines:
        return {"setting": setting, "error": done.stderr.strip().splitlines()[-3:]}
    return json.loads(lines[0].removeprefix("RESULT "))


def command_of(setting: str, args: argparse.Namespace) -> str:
    """The bench.py command that measures this setting alone; defaults are left out."""
    parser = argparse.ArgumentParser()
    add_step_arguments(parser)
    words = ["python scripts/bench.py"]
    for name in SIZES:
        if name == "shape" or getattr(args, name) != parser.get_default(name):
            words += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    if args.targets != list(PROJECTIONS):
        words += ["--targets", *args.targets]
    ours = not is_peer(setting)
    words += [
        f"--{n.replace('_', '-')}" for n in OPTIONS if getattr(args, n) and (ours or n not in OURS)
    ]
    words += ["--recompute", setting, "--peers"] if ours else ["--recompute", "--peers", setting]
    return " ".join([*words, f"--steps {args.steps} --warm {args.warm}"])


def facts(args: argparse.Namespace) -> dict:
    """Sizes, options and versions that hold for every setting of a run."""
    options = {n: True for n in OPTIONS if getattr(args, n)}
    more = ("dropout", "layers", "documents", "energy")
    options |= {n: getattr(args, n) for n in more if getattr(args, n)}
    if args.targets != list(PROJECTIONS):
        options["targets"] = args.targets
    if args.base_precision != "checkpoint":
        options["base_precision"] = args.base_precision
    versions = {"torch": torch.__version__, "card": torch.cuda.get_device_name()}
    return {n: getattr(args, n) for n in ("shape", "batch", "seq", "rank", "kernels")} | (
        options | versions
    )


def on_one_line(facts: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def add_layer_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that define one decoder layer of a step."""
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", nargs="+", default=list(PROJECTIONS))
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--kernels", choices=["auto", "torch"], default="auto")


def add_step_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that define a step, except the setting."""
    add_layer_arguments(parser)
    parser.add_argument(
        "--documents", type=int, default=0, help="pack rows with documents of this many tokens"
    )
    parser.add_argument("--layers", type=int, default=0, help="0: as in the shape")
    parser.add_argument("--folder", type=Path, help="an existing checkpoint")
    parser.add_argument(
        "--base-precision", choices=["checkpoint", "fp8"], default="checkpoint", help="fastlora's"
    )
    parser.add_argument(
        "--energy", type=float, default=0.0, help="run on for so many seconds and read the energy"
    )
    for name in OPTIONS:
        parser.add_argument(f"--{name.replace('_', '-')}", action="store_true")


def add_timing_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that say how often a step runs."""
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--warm", type=int, default=3, help="steps before the timed ones")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_step_arguments(parser)
    add_timing_arguments(parser)
    parser.add_argument("--one", required=True, help="the setting")
    print("RESULT " + json.dumps(measure(parser.parse_args())))


if __name__ == "__main__":
    main()
