"""records_of(): the steps of a run from its folder, whether it has ended or goes on."""

import json
from pathlib import Path
from typing import Any

from fastlora.training.checkpoint import STATE_FILE, complete_checkpoints
from fastlora.training.logging.backends import JSONL_FILE
from fastlora.training.output_folder import RUN_FILE


def records_of(folder: Path) -> list[dict[str, Any]]:
    """The records of a run: of its end, of its log, or of its newest checkpoint.

    Raises:
        SystemExit: the folder has none of these.
    """
    # A run that resumes writes its log anew, while the file of the end is older.
    log, end = folder / JSONL_FILE, folder / RUN_FILE
    if log.is_file() and (not end.is_file() or log.stat().st_mtime_ns > end.stat().st_mtime_ns):
        lines = log.read_text(encoding="utf-8").split("\n")
        # The text after the last line break is a line that is being written.
        return [json.loads(line) for line in lines[:-1]]
    if end.is_file():
        return json.loads(end.read_text(encoding="utf-8"))["history"]
    if checkpoints := [*complete_checkpoints(folder).values()]:
        return json.loads((checkpoints[-1] / STATE_FILE).read_text(encoding="utf-8"))["history"]
    raise SystemExit(
        f"{folder} holds no {RUN_FILE}, no {JSONL_FILE} and no complete checkpoint; expected an"
        ' output_dir of fastlora.train(..., log="jsonl")'
    )
