"""From the start of Python to the end of the first training step: where the time goes.

    python scripts/bench/first_step.py                      # 1B on a GPU, the demo on the CPU
    python scripts/bench/first_step.py --model FOLDER --warm 5
    python scripts/bench/first_step.py --model demo --compile      # compiled regions on the CPU

Starts `scripts/finetune.py` in new processes: once with empty compile caches, then --warm times
with full ones. Without tyro, which finetune.py needs, it starts whole_job/fastlora_job.py. Each
process ends after its first step.

Prints a table for each process: for every part, the second at which it began, the second at which
it ended, both after the start of Python, and its thread. Parts overlap, because parts of other
threads run at the same time, and imports contain other imports. The rows, as results.py describes
them, are also written to $OUT/first_step.jsonl.

The first lines measure this machine's files: the time to open and read a file of a package, and to
ask for its size, in one thread and in eight.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
SCRIPTS = HERE.parent
LENGTH = 2048


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="auto", help='a checkpoint\'s folder or "demo"')
    parser.add_argument("--warm", type=int, default=2, help="runs with full caches")
    parser.add_argument("--compile", action="store_true", help="compiled regions also on the CPU")
    parser.add_argument("--no-files", action="store_true", help="do not measure files")
    args = parser.parse_args()
    if not args.no_files:
        print_files()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = checkpoint(folder) if args.model == "auto" else args.model
        caches = ["empty", *["full"] * args.warm]
        totals: dict[str, list[float]] = {}
        for number, cache in enumerate(caches):
            found = first_step(model, folder, number, args.compile)
            print_run(found, f"run {number}, {cache} caches")
            note(found, cache)
            totals.setdefault(cache, []).append(found["total_s"])
    for cache, seconds in totals.items():
        each = " ".join(f"{x:.2f}" for x in seconds)
        print(f"{cache} caches: median {statistics.median(seconds):.2f} s of {each}")


def checkpoint(folder: Path) -> str:
    """A checkpoint of 1B's shape if there is a GPU, else the demo."""
    import torch  # noqa: PLC0415  after the files are measured

    if not torch.cuda.is_available():
        return "demo"
    model = folder / "1b"
    subprocess.run([sys.executable, HERE / "random_checkpoint.py", "1b", model], check=True)
    return str(model)


def first_step(model: str, folder: Path, number: int, compile: bool) -> dict:
    """The marks of one process: [part, thread, begin, end] in seconds after the start of Python."""
    rows, marks = folder / "rows.jsonl", folder / f"marks-{number}.json"
    if not rows.exists():
        sys.path.insert(0, str(HERE / "whole_job"))
        from compare import write_rows  # noqa: PLC0415  from the folder above

        write_rows(rows)
    output = str(folder / f"run-{number}")
    if importlib.util.find_spec("tyro"):
        options = ["--model", model, "--data", str(rows), "--output", output, "--no-hold-out"]
        options += ["--train-on", "all", "--too-long", "truncate", "--batch-size", "4"]
        options += ["--max-steps", "60", "--no-progress"]
        script = [SCRIPTS / "finetune.py", *options]
    else:
        script = [HERE / "whole_job" / "fastlora_job.py", model, str(rows), output]
    environment = os.environ | {
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    started = time.time()
    watched = [HERE / "first_step_marks.py", marks, str(started), "compile" if compile else "auto"]
    command = [sys.executable, *watched, *script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    if done.returncode or not marks.exists():
        raise SystemExit(f"{command} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(marks.read_text()) | {"script": Path(script[0]).name}


def print_run(found: dict, title: str) -> None:
    print(
        f"\n{title}, {found['script']}, torch {found['torch']}: {found['total_s']:.2f} s",
        flush=True,
    )
    print(f"{'part':44s} {'begin':>7s} {'end':>7s} {'s':>7s}  thread")
    for part, thread, begin, end in sorted(found["marks"], key=lambda mark: mark[2]):
        print(f"{part:44s} {begin:7.2f} {end:7.2f} {end - begin:7.2f}  {thread}")
    for name, value in found["counts"].items():
        print(f"  {name}: {value}")
    sys.stdout.flush()


def note(found: dict, cache: str) -> None:
    """Append the run to $OUT/first_step.jsonl."""
    if not (out := os.environ.get("OUT")):
        return
    from results import append, row  # noqa: PLC0415  it imports torch

    figures = {f"{part}_s": round(end - begin, 2) for part, _, begin, end in found["marks"]}
    figures |= {"total_s": round(found["total_s"], 2), "cache": cache}
    append(Path(out) / "first_step.jsonl", row("python scripts/bench/first_step.py", figures))


def print_files(number: int = 400) -> None:
    """Time of an open and of a stat, for the files of a package that torch imports."""
    spec = importlib.util.find_spec("sympy")
    if spec is None or not spec.submodule_search_locations:
        return
    files = sorted(Path(spec.submodule_search_locations[0]).rglob("*.py"))
    parts = [files[i * number : (i + 1) * number] for i in range(3)]
    read = lambda path: path.read_bytes()
    for title, work, which, threads in (
        ("open and read, first time", read, parts[0], 1),
        ("open and read, again", read, parts[0], 1),
        ("open and read, first time, 8 threads", read, parts[1], 8),
        ("open and read, again, 8 threads", read, parts[1], 8),
        ("stat, first time", os.stat, parts[2], 1),
        ("stat, again", os.stat, parts[2], 1),
    ):
        begin = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, which))
        each = (time.perf_counter() - begin) / len(which)
        print(f"{title:44s} {1e3 * each:7.3f} ms a file", flush=True)


if __name__ == "__main__":
    main()
