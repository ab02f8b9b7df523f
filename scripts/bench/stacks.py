"""n adapters in one pass beside n single steps: time and memory, on one GPU or on the CPU.

    python scripts/bench/stacks.py                    # the three cases that have bars
    python scripts/bench/stacks.py --cases 1b:512 1b-nf4:256 --adapters 4
    python scripts/bench/stacks.py --cases tiny:64 tiny-nf4:64 --adapters 3

A case is SHAPE:TOKENS or SHAPE-nf4:TOKENS. Every adapter has a row of this many random tokens.
A step is forward, backward and fused AdamW, an optimizer for each adapter. It is measured
four times, each in a new process: one adapter or a stack (`functional.stack`), plain and recorded
in a CUDA graph as a whole. "gradient" is the same without AdamW. The time of n single steps is n
times that of one. Medians of --steps after --warm.

The bound on the memory is that of the base plus n times what a single step adds to it, times 1.05.
The bars are those that the project has set itself; the table says which are met. On the CPU there
are no graphs and no peaks. The table goes to stdout, and the rows, as results.py describes them, to
$OUT/stacks.jsonl.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import results
import torch
from random_checkpoint import SHAPES, write_checkpoint
from training_step import training_step

import fastlora
from fastlora import functional as FL
from fastlora.runtime.cuda_graph import CUDAGraphed

CASES = ("1b:512", "1b:128", "8b-nf4:256")

# Case of 8 adapters -> smallest ratio to 8 single steps (graphed, ungraphed); None: no bar.
BARS = {"1b:512": (1.4, 6.0), "1b:128": (3.0, 6.0), "8b-nf4:256": (3.0, None)}
BOUND = 1.05

# Small enough for any machine; not one of random_checkpoint.py, whose shapes are those of models.
TINY = SHAPES["1b"] | dict(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)

Measured = dict[str, Any]
Batch = dict[str, torch.Tensor]


def shape_of(case: str) -> tuple[str, bool, int]:
    """(shape, whether the base is in NF4, tokens of a row)."""
    shape, tokens = case.split(":")
    return shape.removesuffix("-nf4"), shape.endswith("-nf4"), int(tokens)


def measure(args: argparse.Namespace) -> Measured:
    """Time and memory of one step of --one in this process."""
    _, in_4bit, tokens = shape_of(args.case)
    model, _ = fastlora.load(str(args.folder), load_in_4bit=in_4bit)
    device, n = model.base["norm"].device, args.adapters if args.one == "stack" else 1
    of_base = memory(device)
    adapted = [
        fastlora.lora(model, r=args.rank, recompute=args.recompute, random_state=i)
        for i in range(n)
    ]
    gradient, step, batch = functions(adapted, tokens)
    figures = {}
    for name, function in (("gradient_ms", gradient), ("ms", step)):
        memory(device)
        run = CUDAGraphed(function) if args.graph else function
        for _ in range(3 + args.warm):  # the third call is the first that replays a recording
            run(batch)
        figures[name] = timed(partial(run, batch), args.steps, device)
        del run
    # A graph allocates while it is recorded, so the peak covers the calls before the timed ones.
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    return figures | {"base_gib": round(of_base, 3), "peak_gib": round(peak, 3)}


def memory(device: torch.device) -> float:
    """GiB that torch has allocated; the peak counts from here on."""
    if device.type != "cuda":
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated() / 2**30


def functions(
    models: list[Any], tokens: int
) -> tuple[Callable[[Batch], Any], Callable[[Batch], Any], Batch]:
    """(the gradient of a batch, the same and AdamW's update, a batch with a row for each model)."""
    base, n = models[0].base, len(models)
    adapter, spec = (models[0].adapter, models[0].spec) if n == 1 else FL.stack(models)
    device = base["norm"].device
    ids = torch.randint(
        spec.config.vocab_size, (n, tokens), generator=torch.Generator().manual_seed(0)
    )
    batch = {"input_ids": ids.to(device), "labels": ids.to(device)}
    value_and_grad = fastlora.value_and_grad(loss)
    gradient, step = training_step(adapter, value_and_grad, 2e-4, stacked=n > 1)
    return partial(gradient, base, spec), partial(step, base, spec), batch


def loss(adapter: Any, base: Any, spec: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The sum of each adapter's mean loss."""
    sums, tokens = FL.row_losses(adapter, base, spec, batch)
    return (sums / tokens).sum()


def timed(run: Callable[[], Any], steps: int, device: torch.device) -> float:
    """Milliseconds of a call, the median; calls run back to back, as in training."""
    if device.type == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
        events[0].record()
        for event in events[1:]:
            run()
            event.record()
        torch.cuda.synchronize()
        seconds = [a.elapsed_time(b) / 1e3 for a, b in pairwise(events)]
    else:
        seconds = []
        for _ in range(steps):
            started = perf_counter()
            run()
            seconds.append(perf_counter() - started)
    return round(statistics.median(seconds) * 1e3, 2)


def in_own_process(
    case: str, one: str, graph: bool, folder: Path, args: argparse.Namespace
) -> Measured:
    """`measure` in a new process; {"error": its last lines} if it failed."""
    command = [sys.executable, __file__, "--one", one, "--case", case, "--folder", str(folder)]
    for name in ("adapters", "rank", "recompute", "steps", "warm"):
        command += [f"--{name}", str(getattr(args, name))]
    done = subprocess.run(
        [*command, *(["--graph"] if graph else [])], capture_output=True, text=True
    )
    lines = [x for x in done.stdout.splitlines() if x.startswith("RESULT ")]
    if not lines:
        return {"error": " | ".join(done.stderr.strip().splitlines()[-3:])}
    return json.loads(lines[0].removeprefix("RESULT "))


def compare(case: str, of: dict[tuple[str, bool], Measured], n: int) -> Measured:
    """The ratios of a case: n single steps over one step of the stack."""
    ms = lambda one, graph: of[one, graph]["ms"]
    graphed = ("stack", True) in of
    figures: Measured = {"case": case, "adapters": n}
    for (one, graph), measured in of.items():
        name = f"{one}_graph" if graph else one
        figures |= {f"{name}_{key}": value for key, value in measured.items()}
    best = ms("stack", graphed)
    figures["plain_ratio"] = round(n * ms("single", False) / ms("stack", False), 2)
    figures["over_ungraphed"] = round(n * ms("single", False) / best, 2)
    if graphed:
        single, stack = of["single", True], of["stack", True]
        figures["over_graphed"] = round(n * ms("single", True) / best, 2)
        added = single["peak_gib"] - single["base_gib"]
        figures["bound_gib"] = round(stack["base_gib"] + n * added * BOUND, 3)
    return figures


def verdict(figures: Measured) -> str:
    """Which bars a case meets."""
    words = []
    bars = BARS.get(figures["case"], (None, None)) if figures["adapters"] == 8 else (None, None)
    for name, bar in zip(("over_graphed", "over_ungraphed"), bars, strict=True):
        if bar is not None and name in figures:
            words.append(f"{'' if figures[name] >= bar else 'NOT '}{bar:g}x {name}")
    if "bound_gib" in figures:
        fits = figures["stack_graph_peak_gib"] <= figures["bound_gib"]
        words.append(f"{'' if fits else 'NOT '}in the memory bound")
    return ", ".join(words)


COLUMNS = ("single_ms", "single_graph_ms", "stack_ms", "stack_graph_ms", "over_ungraphed")
COLUMNS += ("over_graphed", "stack_graph_peak_gib", "bound_gib")


def table(rows: list[Measured]) -> str:
    lines = [f"{'case':<12}{'n':>3}" + "".join(f"{name:>22}" for name in COLUMNS)]
    for row in rows:
        if "error" in row:
            lines.append(f"{row['case']:<12}{row['error']}")
            continue
        cells = "".join(f"{row.get(name, ''):>22}" for name in COLUMNS)
        lines.append(f"{row['case']:<12}{row['adapters']:>3}{cells}  {verdict(row)}")
    return "\n".join(lines)


def run_case(case: str, args: argparse.Namespace) -> Measured:
    shape = shape_of(case)[0]
    graphs = (False, True) if torch.cuda.is_available() else (False,)
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(TINY if shape == "tiny" else SHAPES[shape], Path(folder))
        of = {
            (one, graph): in_own_process(case, one, graph, Path(folder), args)
            for graph in graphs
            for one in ("single", "stack")
        }
    if errors := [f"{one}: {x['error']}" for (one, _), x in of.items() if "error" in x]:
        return {"case": case, "error": errors[0]}
    return compare(case, of, args.adapters)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", default=CASES, metavar="SHAPE[-nf4]:TOKENS")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--recompute", default="none")
    parser.add_argument("--steps", type=int, default=20, help="timed steps")
    parser.add_argument("--warm", type=int, default=3, help="steps before the timed ones")
    for name in ("--one", "--case", "--folder"):  # of a process that measures
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--graph", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print("RESULT " + json.dumps(measure(args)))
        return
    rows = []
    for case in args.cases:
        rows.append(run_case(case, args))
        print(table(rows[-1:]), flush=True)
        if (out := os.environ.get("OUT")) and "error" not in rows[-1]:
            figures = {name: x for name, x in rows[-1].items() if name != "case"}
            command = f"python scripts/bench/stacks.py --cases {case} --adapters {args.adapters}"
            command += f" --rank {args.rank} --recompute {args.recompute}"
            results.append(Path(out) / "stacks.jsonl", results.row(command, figures))
    print("\n" + table(rows))
    if any("error" in row for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
