"""Per-example gradients beside an ordinary step: time and memory, on one GPU or on the CPU.

    python scripts/bench/per_example.py                            # 8 x 512 of 1B, or tiny on a CPU
    python scripts/bench/per_example.py --shape tiny --batch 32 --seq 128

Ways to the gradients of the rows of one batch (value_and_grad, per_example=...):

    step       the ordinary gradient of their sum
    all        True: all gradients
    norms      "norms"
    sketches   Sketch(8192)
    loop       value_and_grad of one row after the other
    vmap       torch.vmap of value_and_grad, which runs the reference; rows in chunks of 2

The ways run in turn, so that a change of the machine's speed meets all of them. "over step" is the
median of the quotients with the step of the same round, with the smallest and largest. The bars are
1.2 for all and 1.3 for norms. On a GPU compiled and in wall time, on the CPU eager and in the
process's CPU seconds. The table goes to stdout, and the rows, as results.py describes them, to
$OUT/per_example.jsonl.
"""

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import results
import torch
from random_checkpoint import SHAPES, write_checkpoint
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import fastlora
from fastlora import functional as FL

BARS = {"all": 1.2, "norms": 1.3}

# Small enough for any machine; not one of random_checkpoint.py, whose shapes are those of models.
TINY = SHAPES["1b"] | dict(
    vocab_size=4096,
    hidden_size=192,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=32,
)


def ways(model: fastlora.Model, ids: Tensor) -> dict[str, Callable[[], Any]]:
    """Name -> a function that computes it."""
    base, spec, vag = model.base, model.spec, fastlora.value_and_grad

    def rows(adapter: Any, ids: Tensor) -> Tensor:
        sums, tokens = FL.row_losses(adapter, base, spec, {"input_ids": ids, "labels": ids})
        return sums / tokens

    step = vag(lambda adapter, ids: rows(adapter, ids).sum())
    one = vag(lambda adapter, ids: rows(adapter, ids[None])[0])
    kinds = {"all": True, "norms": "norms", "sketches": fastlora.Sketch(8192)}
    found: dict[str, Callable[[], Any]] = {"step": lambda: step(model.adapter, ids)}
    for name, kind in kinds.items():
        run = vag(rows, per_example=kind)
        found[name] = lambda run=run: run(model.adapter, ids)
    found["loop"] = lambda: [step(model.adapter, row) for row in ids.split(1)]
    mapped = torch.vmap(one, in_dims=(None, 0), chunk_size=2)
    found["vmap"] = lambda: mapped(model.adapter, ids)
    return found


def random_adapter(model: fastlora.Model) -> Any:
    """An adapter whose B is not zero either."""
    return tree_map(lambda x: 0.02 * torch.randn_like(x), model.adapter)


def timed(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a call: wall time on a GPU, CPU time of the process otherwise."""
    clock = perf_counter if device.type == "cuda" else process_time
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = clock()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    del result
    return clock() - start


def peak_gib(run: Callable[[], Any], device: torch.device) -> float:
    """GiB that torch allocates during a call, with the base; 0 on the CPU."""
    if device.type != "cuda":
        return 0.0
    torch.cuda.reset_peak_memory_stats()
    run()
    return round(torch.cuda.max_memory_allocated() / 2**30, 2)


def largest_error(found: dict[str, Callable[[], Any]]) -> float:
    """The largest relative difference of a leaf between all gradients and the loop."""
    mine = found["all"]()[1]
    loop = tree_map(lambda *x: torch.stack(x), *(grads for _, grads in found["loop"]()))
    pairs = zip(tree_leaves(mine), tree_leaves(loop), strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def measure(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """A row of figures for each way."""
    write_checkpoint(TINY if args.shape == "tiny" else SHAPES[args.shape], folder)
    model, _ = fastlora.load(str(folder), load_in_4bit=args.load_in_4bit, dtype=args.dtype)
    model = fastlora.lora(model, r=args.rank, recompute=args.recompute)
    model = model.with_adapter(random_adapter(model))
    device = model.base["norm"].device
    shape, generator = (args.batch, args.seq), torch.Generator().manual_seed(0)
    ids = torch.randint(model.spec.config.vocab_size, shape, generator=generator).to(device)
    found = {name: run for name, run in ways(model, ids).items() if name in args.ways}
    for run in found.values():
        for _ in range(args.warm):
            run()
    peaks = {name: peak_gib(run, device) for name, run in found.items()}
    rounds = [{name: timed(run, device) for name, run in found.items()} for _ in range(args.repeat)]
    error = largest_error(found) if {"all", "loop"} <= found.keys() else None
    rows = []
    for name in found:
        quotients = [times[name] / times["step"] for times in rounds]
        rows.append(
            {
                "way": name,
                "ms": round(1e3 * statistics.median(times[name] for times in rounds), 2),
                "over_step": round(statistics.median(quotients), 3),
                "lowest": round(min(quotients), 3),
                "highest": round(max(quotients), 3),
                "peak_gib": peaks[name],
                "error": error if name == "all" else None,
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text, with the bars."""
    lines = [f"{'way':<10}{'ms':>10}{'over step':>12}{'range':>16}{'GiB':>8}  bar"]
    for row in rows:
        bar, within = BARS.get(row["way"]), f"{row['lowest']:.2f}-{row['highest']:.2f}"
        verdict = "" if bar is None else f"{bar}: {'met' if row['over_step'] <= bar else 'MISSED'}"
        if row["error"] is not None:
            verdict += f"; {row['error']:.1e} from the loop"
        lines.append(
            f"{row['way']:<10}{row['ms']:>10.2f}{row['over_step']:>12.2f}{within:>16}"
            f"{row['peak_gib']:>8.2f}  {verdict}"
        )
    return "\n".join(lines)


def main() -> None:
    on_gpu, parser = torch.cuda.is_available(), argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--shape", choices=["tiny", *SHAPES], default="1b" if on_gpu else "tiny")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=512 if on_gpu else 128)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--recompute", default="selective")
    parser.add_argument("--dtype", default="auto" if on_gpu else "float32")
    parser.add_argument("--load-in-4bit", action="store_true")
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--warm", type=int, default=3 if on_gpu else 1)
    names = ["step", "all", "norms", "sketches", "loop", "vmap"]
    parser.add_argument("--ways", nargs="+", choices=names, default=names)
    args = parser.parse_args()
    args.ways = ["step", *args.ways]
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(args, Path(folder))
    print(table(rows))
    if out := os.environ.get("OUT"):
        command = f"python scripts/bench/per_example.py {' '.join(sys.argv[1:])}".strip()
        for row in rows:
            results.append(Path(out) / "per_example.jsonl", results.row(command, row))


if __name__ == "__main__":
    main()
