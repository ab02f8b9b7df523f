"""A training step of each family's shape beside Llama's, per operation of its arithmetic.

    python scripts/bench/families.py                       # Gemma 2 2B, Gemma 3 1B, OLMo 3 7B
    python scripts/bench/families.py --shapes gemma2-2b --settings none --steps 20

Each shape runs in a new process, as in bench.py, which has the same arguments. "of floor" is the
time of the arithmetic alone (`measuring.floor_ms`) over the step's. "ratio" is this share over that
of a Llama's step: of similar width, for Gemma 3 1B of the same sizes. The bar that the project has
set itself is 0.9. The table goes to stdout, and the rows, as results.py describes them, to
$OUT/families.jsonl.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import measuring
import results
from random_checkpoint import write_checkpoint

# Shape -> the Llama that it is compared with.
BESIDE = {"gemma2-2b": "1b", "gemma3-1b": "gemma3-1b-llama", "olmo3-7b": "8b"}
BAR = 0.9


def measured(shape: str, setting: str, args: argparse.Namespace) -> dict[str, Any]:
    """The figures of one shape under one recompute policy."""
    one = argparse.Namespace(**vars(args) | {"shape": shape})
    raw = measuring.shape_of(one)
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(raw, Path(folder))
        return measuring.in_own_process(setting, Path(folder), one)


def line(shape: str, setting: str, row: dict[str, Any], llama: dict[str, Any]) -> str:
    """One row of the table."""
    start = f"{shape:>16}{setting:>12}"
    if "error" in row or "error" in llama:
        return f"{start}   failed: {row.get('error') or llama.get('error')}"
    share, other = row["floor_ms"] / row["ms"], llama["floor_ms"] / llama["ms"]
    figures = f"{row['ms']:>9.1f}{row['spread_ms']:>8.1f}{row['peak_gib']:>8.2f}"
    ratio = share / other
    met = "" if row is llama else "  meets the bar" if ratio >= BAR else f"  below {BAR:g}"
    return f"{start}{figures}{share:>10.0%}{ratio:>9.2f}{met}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    measuring.add_step_arguments(parser)
    measuring.add_timing_arguments(parser)
    parser.add_argument("--shapes", nargs="+", choices=BESIDE, default=[*BESIDE])
    parser.add_argument("--settings", nargs="+", default=["none", "offload"])
    parser.add_argument("--cache", type=Path, help="compile cache that all processes share")
    args = parser.parse_args()
    titles = f"{'ms':>9}{'spread':>8}{'GiB':>8}{'of floor':>10}{'ratio':>9}"
    print(f"{'shape':>16}{'recompute':>12}{titles}")
    for setting in args.settings:
        args.cuda_graph = setting != "offload"
        done: dict[str, dict[str, Any]] = {}
        wanted = dict.fromkeys(x for shape in args.shapes for x in (BESIDE[shape], shape))
        for shape in wanted:
            done[shape] = row = measured(shape, setting, args)
            print(line(shape, setting, row, done[BESIDE.get(shape, shape)]), flush=True)
            if out := os.environ.get("OUT"):
                one = argparse.Namespace(**vars(args) | {"shape": shape})
                new = results.row(measuring.command_of(setting, one), measuring.facts(one) | row)
                results.append(Path(out) / "families.jsonl", new)


if __name__ == "__main__":
    main()
