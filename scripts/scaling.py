"""Tokens a second and memory against sequence length, batch, rank and depth, as a plot.

    python scripts/scaling.py measure RESULTS.jsonl [--settings selective full unsloth-gc]
    python scripts/scaling.py plot RESULTS.jsonl PLOT.png     # anywhere; wants matplotlib

`measure` runs bench.py's step on a GPU, one process a point, with one compile cache for all. Around
1B shapes at batch 4 x 2048, r = 16, one size changes at a time; long sequences are alone in their
batch. A point that does not fit is written down as the error it gave, and drawn as a gap; one that
RESULTS.jsonl has already is not measured again, so that a run which was cut off can go on.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from bench import add_step_arguments, how, in_own_process, shape_of
from random_checkpoint import write_checkpoint

# What changes -> its values, and what else is other than at the centre.
SWEEPS: dict[str, tuple[list[int], dict[str, int]]] = {
    "seq": ([512, 1024, 2048, 4096, 8192, 16384, 32768, 65536], {"batch": 1}),
    "batch": ([1, 2, 4, 8, 16], {}),
    "rank": ([8, 16, 32, 64, 128, 256], {}),
    "layers": ([4, 8, 16, 32], {}),
}
LABELS = {"seq": "tokens in a sequence", "batch": "sequences of 2,048 tokens", "rank": "rank"}
LABELS |= {"layers": "layers of Llama 3.2 1B's shape"}


def points(center: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(what changes, sizes) of every point."""
    for sweep, (values, others) in SWEEPS.items():
        for value in values:
            yield sweep, {**center, **others, sweep: value}


def is_there(rows: list[dict[str, Any]], **point: Any) -> bool:
    """Whether a point has been measured, or has failed."""
    return any(point.items() <= row.items() for row in rows)


def read_rows(file: Path) -> list[dict[str, Any]]:
    """What was measured so far."""
    return [json.loads(x) for x in file.read_text().splitlines()] if file.exists() else []


def measure(args: argparse.Namespace) -> None:
    center = {name: getattr(args, name) for name in SWEEPS}
    center["layers"] = shape_of(args)["num_hidden_layers"]
    before = read_rows(args.results)
    with tempfile.TemporaryDirectory() as temporary, args.results.open("a") as file:
        args.cache = Path(temporary, "cache")
        for sweep, sizes in points(center):
            folder = Path(temporary, str(sizes["layers"]))
            here = argparse.Namespace(**(vars(args) | sizes))
            point = {"shape": args.shape, "sweep": sweep, sweep: sizes[sweep]}
            settings = [x for x in args.settings if not is_there(before, **point, setting=x)]
            if settings and not folder.exists():
                write_checkpoint(shape_of(here), folder)
            for setting in settings:
                row = {"sweep": sweep} | how(here) | in_own_process(setting, folder, here)
                print(row, flush=True)
                file.write(json.dumps(row) + "\n")
                file.flush()


def plot(rows: list[dict[str, Any]], out: Path) -> None:
    """Two rows of axes, tokens/s above GiB, one column for each thing that was changed."""
    from matplotlib.figure import Figure  # noqa: PLC0415  where no plot is drawn none is installed

    sweeps = list(dict.fromkeys(row["sweep"] for row in rows))
    figure = Figure(figsize=(4 * len(sweeps), 7), layout="constrained")
    axes = figure.subplots(2, len(sweeps), squeeze=False)
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    for column, sweep in enumerate(sweeps):
        for line, (figure_of, title) in enumerate(
            (("tokens_s", "tokens / s"), ("peak_gib", "peak GiB"))
        ):
            ax = axes[line, column]
            for setting in settings:
                mine = [r for r in rows if r["sweep"] == sweep and r["setting"] == setting]
                mine.sort(key=lambda r: r[sweep])
                x, y = [r[sweep] for r in mine], [r.get(figure_of, float("nan")) for r in mine]
                ax.plot(x, y, marker="o", label=setting)
            ax.set(xscale="log", xlabel=LABELS[sweep], ylabel=title, ylim=(0, None))
            values = SWEEPS[sweep][0]
            ax.set_xticks(values, [f"{v:,}" for v in values], rotation=45)
            ax.minorticks_off()
            ax.grid(alpha=0.3)
    axes[0, 0].legend()
    figure.suptitle(f"{rows[0]['shape']}, {rows[0]['device']}, torch {rows[0]['torch']}")
    figure.savefig(out, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    measured = commands.add_parser("measure", help="append one JSON line a point; needs a GPU")
    measured.add_argument("results", type=Path)
    add_step_arguments(measured)
    measured.add_argument("--settings", nargs="+", default=["selective", "full"])
    measured.add_argument("--steps", type=int, default=10)
    measured.add_argument("--warm", type=int, default=3)
    drawn = commands.add_parser("plot", help="draw what was measured")
    drawn.add_argument("results", type=Path)
    drawn.add_argument("out", type=Path)
    args = parser.parse_args()
    if args.command == "plot":
        plot(read_rows(args.results), args.out)
    elif torch.cuda.is_available():
        measure(args)
    else:
        raise SystemExit("scaling.py measures on a CUDA GPU; there is none here.")


if __name__ == "__main__":
    main()
