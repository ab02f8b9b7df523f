"""Losses of a run over a base in fp8 beside the same run in bf16: every mean of ten steps.

    python scripts/bench/fp8_losses.py --shape 1b --steps 200        # on a CUDA GPU
    python scripts/bench/fp8_losses.py --folder demo --steps 12 --length 64 --batch 2

Both runs have the same weights, the same first adapter, and the same chats of whole_job/compare.py
in the same order, packed, all tokens trained. The bar is 1 %. The table goes to stdout, a row as in
results.jsonl to --out, and every loss to a file beside it, with the suffix .losses.json.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any

import results
import torch
from random_checkpoint import SHAPES, write_checkpoint
from whole_job.compare import write_rows

import fastlora
from fastlora.checkpoints.hub import DEMO
from fastlora.data.rows import read_rows

BAR, WINDOW = 0.01, 10


def losses(precision: str, rows: list[dict[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    """Losses of one run, and its median milliseconds for a step."""
    started = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, _ = fastlora.load(
        str(args.folder), max_seq_length=args.length, base_precision=precision, device=device
    )
    tokenizer = fastlora.Tokenizer.from_folder(DEMO)
    assert tokenizer is not None
    _, history = fastlora.train(
        fastlora.lora(model, r=16, lora_alpha=16),
        tokenizer,
        rows,
        max_steps=args.steps,
        batch_size=args.batch,
        learning_rate=args.learning_rate,
        train_on="all",
        too_long="truncate",
        progress=False,
    )
    ms = 1e3 * sorted(history.seconds)[len(history.seconds) // 2]
    print(f"{precision}: {ms:.1f} ms a step, {time.perf_counter() - started:.0f} s", flush=True)
    return {"losses": history.losses, "ms": round(ms, 1)}


def compared(plain: list[float], rounded: list[float]) -> tuple[str, dict[str, float]]:
    """(table with every mean of WINDOW losses that do not overlap, figures over all means)."""
    means = lambda x, step: [mean(x[i : i + WINDOW]) for i in range(0, len(x) - WINDOW + 1, step)]
    lines = [f"{'steps':>10}{'bf16':>9}{'fp8':>9}{'difference':>12}"]
    for i, (a, b) in enumerate(zip(means(plain, WINDOW), means(rounded, WINDOW), strict=True)):
        steps = f"{i * WINDOW + 1}-{(i + 1) * WINDOW}"
        lines.append(f"{steps:>10}{a:>9.4f}{b:>9.4f}{b / a - 1:>12.2%}")
    every = list(zip(means(plain, 1), means(rounded, 1), strict=True))
    off = [abs(b / a - 1) for a, b in every]
    figures = {
        "first_mean": round(every[0][0], 4),
        "last_mean": round(every[-1][0], 4),
        "last_mean_fp8": round(every[-1][1], 4),
        "largest_difference": round(max(off), 5),
        "mean_difference": round(mean(off), 5),
    }
    verdict = "within" if max(off) <= BAR else "beyond"
    lines.append(f"largest difference of a mean of {WINDOW}: {max(off):.2%}, {verdict} {BAR:.0%}")
    return "\n".join(lines), figures


def command_of(args: argparse.Namespace) -> str:
    """The command that gives these figures again."""
    model = f"--folder {args.folder}" if args.folder else f"--shape {args.shape}"
    names = ("steps", "batch", "length", "learning_rate", "chats")
    words = [f"--{name.replace('_', '-')} {getattr(args, name)}" for name in names]
    return " ".join(["python scripts/bench/fp8_losses.py", model, *words])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="1b")
    add("--folder", help="an existing checkpoint; default: random weights of --shape")
    add("--steps", type=int, default=200)
    add("--batch", type=int, default=4)
    add("--length", type=int, default=2048)
    add("--learning-rate", type=float, default=2e-4)
    add("--chats", type=int, default=8000)
    add("--out", type=Path, help="append a row as in scripts/bench/results.jsonl")
    args = parser.parse_args()
    if args.steps < WINDOW:
        parser.error(f"--steps must be at least {WINDOW}: means of {WINDOW} losses are compared")
    command = command_of(args)
    with tempfile.TemporaryDirectory() as temporary:
        if args.folder is None:
            args.folder = Path(temporary) / "model"
            write_checkpoint(SHAPES[args.shape], args.folder)
        write_rows(Path(temporary) / "rows.jsonl", args.chats)
        rows = read_rows(Path(temporary) / "rows.jsonl")
        runs = {p: losses(p, rows, args) for p in ("checkpoint", "fp8")}
    table, figures = compared(runs["checkpoint"]["losses"], runs["fp8"]["losses"])
    print(table)
    if args.out:
        figures |= {"bf16_ms": runs["checkpoint"]["ms"], "fp8_ms": runs["fp8"]["ms"]}
        results.append(args.out, results.row(command, figures))
        raw = args.out.with_suffix(".losses.json")
        raw.write_text(json.dumps({name: run["losses"] for name, run in runs.items()}))


if __name__ == "__main__":
    main()
