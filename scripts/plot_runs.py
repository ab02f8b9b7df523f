"""Draw the curves of one run or several into one picture.

    python scripts/plot_runs.py runs/first runs/second --output runs.png

RUN is an output_dir of fastlora.train, also of a run that still goes on (with log="jsonl", or from
its newest checkpoint). Needs matplotlib: pip install -e '.[plots]'.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

from finetuning.ending import user_errors
from watching.records import records_of

import fastlora
from fastlora.training.logging.figures import draw


@user_errors()
def main() -> None:
    args = parse_arguments()
    runs = {name: asdict(history_of(path)) for name, path in names(args.runs).items()}
    draw(args.output, runs)
    print(f"{args.output}: {', '.join(runs)}")


def history_of(folder: Path) -> fastlora.History:
    """The history of a run's folder: of its end, of its log, or of its newest checkpoint."""
    return fastlora.History.of(records_of(folder))


def names(folders: list[Path]) -> dict[str, Path]:
    """A short name for each folder: its own, or its path if two have the same."""
    short = [folder.resolve().name for folder in folders]
    return {
        name if short.count(name) == 1 else str(folder): folder
        for name, folder in zip(short, folders, strict=True)
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output_dir of train")
    parser.add_argument("--output", type=Path, default=Path("runs.png"), help=".png, .svg, .pdf")
    return parser.parse_args()


if __name__ == "__main__":
    main()
