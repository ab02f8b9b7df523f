"""Tokens per second and peak memory against sequence length, batch, rank and depth, as a plot.

    python scripts/bench/scaling.py measure ROWS.jsonl [--settings selective full unsloth-gc]
    python scripts/bench/scaling.py plot ROWS.jsonl PLOT.png     # no GPU needed, but matplotlib

`measure` runs the training step of scripts/bench.py on a GPU, one process per point, with one
compile cache for all points. It starts from Llama 3.2 1B at batch 4 x 2048, r = 16, and changes one
size at a time; in the sweep of the sequence length the batch is 1. A point that does not fit is
written with its error and drawn as a gap. A point that ROWS.jsonl already holds is not measured
again, so an interrupted run can be continued. Rows have the format of scripts/bench/results.jsonl,
and `plot` also draws from that file.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import results
import torch
from measuring import (
    add_step_arguments,
    add_timing_arguments,
    command_of,
    in_own_process,
    shape_of,
)
from random_checkpoint import write_checkpoint

# Size that changes -> its values, and other sizes that differ from the common centre.
SWEEPS: dict[str, tuple[list[int], dict[str, int]]] = {
    "seq": ([512, 1024, 2048, 4096, 8192, 16384, 32768, 65536], {"batch": 1}),
    "batch": ([1, 2, 4, 8, 16], {}),
    "rank": ([8, 16, 32, 64, 128, 256], {}),
    "layers": ([4, 8, 16, 32], {}),
}
LABELS = {"seq": "tokens in a sequence", "batch": "sequences of 2,048 tokens", "rank": "rank"}
LABELS |= {"layers": "layers of Llama 3.2 1B's shape"}


def points(center: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name of the size that changes, all sizes) of every point."""
    for sweep, (values, others) in SWEEPS.items():
        for value in values:
            yield sweep, {**center, **others, sweep: value}


def is_there(rows: list[dict[str, Any]], **point: Any) -> bool:
    """Whether a point was measured before, successfully or not."""
    return any(point.items() <= row.items() for row in rows)


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The points of a file: sweep, sizes, setting, figures, card and torch version in one dict."""
    rows = [row for row in results.read(file) if "sweep" in row["figures"]]
    return [row["machine"] | row["figures"] for row in rows]


def measure(args: argparse.Namespace) -> None:
    center = {name: getattr(args, name) for name in SWEEPS}
    center["layers"] = shape_of(args)["num_hidden_layers"]
    before = read_rows(args.rows)
    with tempfile.TemporaryDirectory() as temporary:
        args.cache = Path(temporary, "cache")
        for sweep, sizes in points(center):
            folder = Path(temporary, str(sizes["layers"]))
            here = argparse.Namespace(**(vars(args) | sizes))
            point = {"shape": args.shape, "sweep": sweep, sweep: sizes[sweep]}
            settings = [x for x in args.settings if not is_there(before, **point, setting=x)]
            if settings and not folder.exists():
                write_checkpoint(shape_of(here), folder)
            for setting in settings:
                figures = {"shape": args.shape, "sweep": sweep} | sizes
                figures |= in_own_process(setting, folder, here)
                print(figures, flush=True)
                results.append(args.rows, results.row(command_of(setting, here), figures))


def plot(rows: list[dict[str, Any]], out: Path) -> None:
    """Two rows of axes, tokens/s above GiB, and one column for each size that was changed."""
    from matplotlib.figure import Figure  # noqa: PLC0415  needed for plots only

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
    figure.suptitle(f"{rows[0]['shape']}, {rows[0]['card']}, torch {rows[0]['torch']}")
    figure.savefig(out, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    measured = commands.add_parser("measure", help="append one row per point; needs a GPU")
    measured.add_argument("rows", type=Path)
    add_step_arguments(measured)
    measured.add_argument("--settings", nargs="+", default=["selective", "full"])
    add_timing_arguments(measured)
    drawn = commands.add_parser("plot", help="draw the points of a file")
    drawn.add_argument("rows", type=Path)
    drawn.add_argument("out", type=Path)
    args = parser.parse_args()
    if args.command == "plot":
        plot(read_rows(args.rows), args.out)
    elif torch.cuda.is_available():
        measure(args)
    else:
        raise SystemExit("scaling.py measures on a CUDA GPU, and this machine has none.")


if __name__ == "__main__":
    main()
