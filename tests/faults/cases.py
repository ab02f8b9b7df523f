"""All cases of the suite by name, and `run`, which a child of the fault server calls."""

import json
import os
import resource
import shutil
import traceback
from pathlib import Path

from faults import (
    calls_adapter,
    calls_load,
    calls_run,
    calls_special,
    files_checkpoint,
    files_model,
    files_rows,
    files_tokenizer,
    folders,
)
from faults.case import Case, Context, verdict

CALLS: dict[str, Case] = {}
FILES: dict[str, Case] = {}
for _module in (calls_load, calls_adapter, calls_run, calls_special):
    CALLS |= {case.name: case for case in _module.cases()}
_FILE_MODULES = (files_checkpoint, files_rows, files_model, files_tokenizer)
for _module in _FILE_MODULES:
    FILES |= {case.name: case for case in _module.cases()}
CASES = CALLS | FILES


def run(names: list[str], log: str, scratch: str) -> None:
    """Run cases one after another; `log` gets a line when one begins and one with its result."""
    good = Path(scratch) / "good"
    if not good.exists():
        folders.write_all(good)
    context = Context(good)
    root = Path(scratch) / "cwd"
    home = os.environ["HOME"]
    with open(log, "a") as file:

        def write(line: dict) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        for name in names:
            shutil.rmtree(root, ignore_errors=True)
            context.enter(root)
            write({"name": name, "item": CASES[name].item})
            try:
                result = verdict(CASES[name], context)
            except Exception:  # noqa: BLE001  a case that is wrong is one line of the table
                detail = f"the case itself is wrong: {traceback.format_exc()[-600:]}"
                result = dict(name=name, item=CASES[name].item, outcome="broken", detail=detail)
            result["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            write(result)
            os.chdir(home)
