"""page(): one HTML file with the figures of a run inside; it loads nothing and renews itself."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastlora.training.logging.backends import JSONL_FILE, RUN_RECORD, SAMPLES, shown
from watching.records import records_of

_TEMPLATE = Path(__file__).with_name("page.html")
_PLACE = "/*DATA*/null"
_POINTS = 1500  # of each curve; more cannot be told apart on a screen
_EVALUATIONS = 20  # whose samples are shown, the newest


def page(folder: Path, every: float) -> tuple[str, bool]:
    """(HTML of a run as it is now, whether the run has ended).

    Args:
        folder: output_dir of the run.
        every: seconds between two renewals of an open page.
    """
    data = figures(folder) | {"every": every}
    # "<" could end the script element; JSON has it only within texts.
    text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    return _TEMPLATE.read_text(encoding="utf-8").replace(_PLACE, text), bool(data["ended"])


def figures(folder: Path) -> dict[str, Any]:
    """The page's content as JSON values."""
    records = records_of(folder)
    path = folder / RUN_RECORD
    run = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    log = folder / JSONL_FILE
    changed = log.stat().st_mtime if log.is_file() else time.time()
    ended = "ended" in run.get("result", {})
    kept = [{k: v for k, v in r.items() if k != SAMPLES} for r in thinned(records)]
    return {
        "name": folder.resolve().name,
        "steps": run.get("steps"),
        "seconds": sum(record["seconds"] for record in records),
        "ended": ended,
        "changed": changed,
        "written": time.time(),
        "records": kept,
        "samples": _samples(records),
        "facts": _facts(run),
    }


def thinned(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most about 1,500 records, evenly spread, with all evaluations and the last one."""
    every = -(-len(records) // _POINTS)
    last = len(records) - 1
    return [r for i, r in enumerate(records) if i % every == 0 or "eval_loss" in r or i == last]


def _samples(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The newest evaluations with samples, the newest first."""
    found = [
        {
            "step": record["step"],
            "texts": [{"prompt": shown(s["prompt"]), "text": s["text"]} for s in record[SAMPLES]],
        }
        for record in records
        if SAMPLES in record
    ]
    return found[: -_EVALUATIONS - 1 : -1]


def _facts(run: dict[str, Any]) -> dict[str, str]:
    """Name -> text, of what the run was given."""
    if not run:
        return {}
    facts = {
        "base": f"{run['model']['name']}, {run['model']['dtype']}",
        "rank": str(run["lora"]["r"]),
        "data": f"{run['data']['name']}: {run['data']['sequences']:,} sequences of"
        f" {run['data']['tokens']:,} tokens",
        "device": run["device"]["name"],
    }
    settings = {k: v for k, v in run["settings"].items() if v is not None and k != "sample_prompts"}
    return facts | {name: json.dumps(value).strip('"') for name, value in settings.items()}
