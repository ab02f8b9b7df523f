"""Draw the curves of one run or several into one picture.

    python scripts/plot_runs.py runs/first runs/second --output runs.png

RUN is an output_dir of fastlora.train, also of a run that still goes on (with log="jsonl", or from
its newest checkpoint). Needs matplotlib: pip install "fastlora[plots]".
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import fastlora
from fastlora.training.checkpoint import STATE_FILE, complete_checkpoints
from fastlora.training.logging.backends import JSONL_FILE
from fastlora.training.logging.figures import draw
from fastlora.training.output_folder import RUN_FILE


def main() -> None:
    args = parse_arguments()
    runs = {name: asdict(history_of(path)) for name, path in names(args.runs).items()}
    draw(args.output, runs)
    print(f"{args.output}: {', '.join(runs)}")


def history_of(folder: Path) -> fastlora.History:
    """The history of a run's folder: of its end, of its log, or of its newest checkpoint."""
    if (folder / RUN_FILE).is_file():
        return fastlora.History.of(json.loads((folder / RUN_FILE).read_text())["history"])
    if (folder / JSONL_FILE).is_file():
        lines = (folder / JSONL_FILE).read_text().split("\n")
        # The text after the last line break is a line that is being written.
        return fastlora.History.of([json.loads(line) for line in lines[:-1]])
    if checkpoints := [*complete_checkpoints(folder).values()]:
        state = json.loads((checkpoints[-1] / STATE_FILE).read_text())
        return fastlora.History.of(state["history"])
    raise SystemExit(
        f"{folder} holds no {RUN_FILE}, no {JSONL_FILE} and no complete checkpoint; expected an"
        " output_dir of fastlora.train"
    )


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
