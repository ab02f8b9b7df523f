"""The complete form of the fault suite: prints its tally and writes a table of every case.

    python -m tests.faults.full TABLE.json [--kills 200] [--hang 10]

`--only TEXT` runs the cases whose names hold a text, `--kills 0` no kills. The exit status is 1
unless every run gave the same bits, no temporary file stayed, and every case came out as it must.
"""

import argparse
import json
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # "faults" is imported from tests/

from faults.bounded import GOOD
from faults.cases import CALLS, CASES, FILES
from faults.kills import Tally, kill_loop, stop
from faults.worker import Worker, run_cases

# In the order of the tally.
OUTCOMES = ("refused", "accepted rightly", "accepted silently", "refused badly")
OUTCOMES += ("slow", "crashed", "hung", "broken")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("table", type=Path, nargs="?", help="JSON file for the result of each case")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--hang", type=float, default=10.0, help="seconds that count as hung")
    parser.add_argument("--only", default="", help="run the cases whose names hold this text")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def _kills(worker: Worker, count: int, seed: int) -> tuple[Tally, dict[str, Any]]:
    tally = kill_loop(worker, count, seed)
    print(f"kills: {tally.kills} in {tally.runs} runs, {tally.seconds_a_kill} s each")
    print(f"  same bits: {tally.same_bits} of {tally.runs} runs")
    print(f"  stale files: {len(tally.stale)}")
    for text in tally.errors:
        print(f"  a run ended by an error: {text[-500:]}")
    signals = {}
    for number, name in ((signal.SIGINT, "SIGINT"), (signal.SIGTERM, "SIGTERM")):
        ended = stop(worker, number, worker.scratch / name)
        signals[name] = ended
        print(f"  {name}: exit {ended['exit']}, steps {ended['steps']}, saved {ended['saved']}")
    return tally, signals


def _print_tally(results: dict[str, dict[str, Any]]) -> None:
    for title, table in (("bad calls", CALLS), ("damaged files", FILES)):
        counts = Counter(results[name]["outcome"] for name in table if name in results)
        print(f"{title}: {sum(counts.values())}")
        for outcome in OUTCOMES:
            print(f"  {outcome}: {counts[outcome]}")
    by_item = Counter(r["item"] for r in results.values() if r["outcome"] not in GOOD)
    print("failing by item of issue 16:", dict(sorted(by_item.items())))


def main() -> int:
    """Run everything."""
    given = _arguments()
    begun = time.monotonic()
    scratch = Path(tempfile.mkdtemp(prefix="fastlora-faults-"))
    worker = Worker(scratch)
    report: dict[str, Any] = {}
    good = True
    try:
        if given.kills:
            tally, report["signals"] = _kills(worker, given.kills, given.seed)
            report["kills"] = tally._asdict()
            good = tally.same_bits == tally.runs and not tally.stale and not tally.errors
        names = [name for name in CASES if given.only in name]
        results = run_cases(worker, names, given.hang)
    finally:
        worker.close()
        shutil.rmtree(scratch, ignore_errors=True)
    _print_tally(results)
    report["cases"] = list(results.values())
    bad = [name for name, result in results.items() if result["outcome"] not in GOOD]
    print(f"seconds: {time.monotonic() - begun:.0f}")
    if given.table is not None:
        given.table.write_text(json.dumps(report, indent=1))
    return 0 if good and not bad else 1


if __name__ == "__main__":
    sys.exit(main())
