"""A whole fine-tuning job, from a script's first line to the saved adapter, in several libraries.

    python scripts/bench/random_checkpoint.py 1b /tmp/1b
    python scripts/bench/whole_job/compare.py /tmp/1b /tmp/job --repeat 3

Makes chats of ragged length and runs each library in a new process, alternating. Prints a
line of JSON for every run, with total_s, and the medians. Unsloth needs PYTHONPATH to lead to it.
Compile caches are empty in the first run unless --warm-cache is given.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

HERE = Path(__file__).parent
JOBS = {
    "fastlora": ["fastlora_job.py"],
    "unsloth-packing": ["unsloth_job.py", "--packing"],
    "unsloth-padding": ["unsloth_job.py"],
}


def write_rows(path: Path, number: int = 4000) -> None:
    """Chats cut from Python's standard library, lognormal lengths around 500 bytes."""
    rng = random.Random(7)
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:120]
    text = "".join(file.read_text(encoding="utf-8", errors="ignore") for file in files)
    with path.open("w") as out:
        for _ in range(number):
            size = min(1800, max(40, int(rng.lognormvariate(6.2, 0.8))))
            at = rng.randrange(len(text) - size)
            cut = at + max(20, size // 4)
            turns = [("user", text[at:cut]), ("assistant", text[cut : at + size])]
            messages = [dict(role=role, content=content) for role, content in turns]
            out.write(json.dumps({"messages": messages}) + "\n")


def run(job: str, args: argparse.Namespace, rows: Path, cache: Path) -> dict[str, object]:
    """The figures that a job prints, with its whole time in seconds."""
    script, *options = JOBS[job]
    command = [HERE / script, args.model, rows, args.folder / job, "--steps", str(args.steps)]
    environment = os.environ | {
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
        "HF_HUB_OFFLINE": "1",
        "UNSLOTH_DISABLE_STATISTICS": "1",
    }
    started = time.time()
    settings = ["--length", str(args.length), "--started", str(started)]
    command = [sys.executable, *command, *options, *settings]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    seconds = time.time() - started
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        return {"job": job, "error": (done.stderr or done.stdout)[-500:]}
    figures = json.loads(lines[-1].removeprefix("RESULT "))
    return {"job": job, "total_s": round(seconds, 2), **figures}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a checkpoint folder")
    parser.add_argument("folder", type=Path, help="where adapters, rows and caches are written")
    parser.add_argument("--jobs", nargs="*", choices=JOBS, default=list(JOBS))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--warm-cache", action="store_true", help="run each once before")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    rows = args.folder / "rows.jsonl"
    write_rows(rows)
    caches = {job: args.folder / f"cache-{job}" for job in args.jobs}
    if args.warm_cache:
        for job in args.jobs:
            run(job, args, rows, caches[job])
    seen: dict[str, list[float]] = {}
    for repeat in range(args.repeat):
        for job in args.jobs:
            figures = run(job, args, rows, caches[job])
            print(json.dumps({"repeat": repeat, **figures}), flush=True)
            if "total_s" in figures:
                seen.setdefault(job, []).append(float(str(figures["total_s"])))
    for job, totals in seen.items():
        spread = max(totals) - min(totals)
        print(f"{job}: median {statistics.median(totals):.1f} s, spread {spread:.1f} s")


if __name__ == "__main__":
    main()
