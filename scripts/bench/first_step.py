"""From the start of Python to the end of the first training step: where the time goes.

    python scripts/bench/first_step.py                      # 1B on a GPU, the demo on the CPU
    python scripts/bench/first_step.py --model FOLDER --cold 2 --warm 5
    python scripts/bench/first_step.py --model demo --compile      # compiled regions on the CPU

Starts `scripts/finetune.py` in new processes: --cold times with empty compile caches, then
--warm times with full ones. Without tyro, which finetune.py needs, it starts
whole_job/fastlora_job.py. Each process ends after its first step.

Prints a table for each process: for every part, the second at which it began, the second at which
it ended, both after the start of Python, and its thread. Parts overlap, because parts of other
threads run at the same time, and imports contain other imports. The rows, as results.py describes
them, are also written to $OUT/first_step.jsonl.

The first lines say how this machine imports: the time to read a file of a package, and to import
sympy (470 files) with and without bytecode. If a package was installed without bytecode and Python
may not write it, every process compiles all files again. --keep-bytecode FOLDER has the processes
keep it there.
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
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SCRIPTS = HERE.parent
LENGTH = 2048


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="auto", help='a checkpoint\'s folder or "demo"')
    parser.add_argument("--cold", type=int, default=1, help="runs with empty caches")
    parser.add_argument("--warm", type=int, default=2, help="runs with full caches")
    parser.add_argument("--compile", action="store_true", help="compiled regions also on the CPU")
    parser.add_argument("--keep-bytecode", type=Path, metavar="FOLDER")
    parser.add_argument("--no-files", action="store_true", help="without the first lines")
    args = parser.parse_args()
    if not args.no_files:
        print_imports()
    if args.keep_bytecode:
        keep_bytecode(args.keep_bytecode)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = checkpoint(folder) if args.model == "auto" else args.model
        caches = ["empty"] * args.cold + ["full"] * args.warm
        totals: dict[str, list[float]] = {}
        for number, cache in enumerate(caches):
            kept = folder / f"caches-{min(number, max(args.cold - 1, 0))}"
            found = first_step(model, folder, number, args.compile, kept)
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


def first_step(model: str, folder: Path, number: int, compile: bool, caches: Path) -> dict:
    """The marks of one process: [part, thread, begin, end] in seconds after the start of Python.

    `caches` is the folder of its compile caches.
    """
    rows, marks = folder / "rows.jsonl", folder / f"marks-{number}.json"
    if not rows.exists():
        sys.path.insert(0, str(HERE / "whole_job"))
        from compare import write_rows  # noqa: PLC0415  # pyright: ignore[reportMissingImports]

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
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "XDG_CACHE_HOME": str(caches / "cache"),
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

    seconds: dict[str, float] = {}  # of all calls of a part
    for part, _, begin, end in found["marks"]:
        seconds[part] = seconds.get(part, 0.0) + end - begin
    figures: dict[str, Any] = {f"{part}_s": round(s, 2) for part, s in seconds.items()}
    figures |= {"total_s": round(found["total_s"], 2), "cache": cache}
    command = f"python scripts/bench/first_step.py {' '.join(sys.argv[1:])}".strip()
    append(Path(out) / "first_step.jsonl", row(command, figures))


def keep_bytecode(folder: Path) -> None:
    """Have the processes that this one starts write and read bytecode in a folder."""
    os.environ["PYTHONPYCACHEPREFIX"] = str(folder.resolve())
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def print_imports(number: int = 400) -> None:
    """Time to read files, and to import a package with and without bytecode."""
    spec = importlib.util.find_spec("sympy")
    if spec is None or spec.origin is None:
        return
    cached = importlib.util.cache_from_source(spec.origin)
    print(f"Python writes bytecode: {not sys.dont_write_bytecode}, prefix {sys.pycache_prefix}")
    print(
        f"beside sympy there is bytecode: {Path(cached).exists()}, the folder can be written: ",
        end="",
    )
    print(os.access(Path(spec.origin).parent, os.W_OK))
    files = sorted(Path(spec.origin).parent.rglob("*.py"))[:number]
    for title in ("open and read, first time", "open and read, again"):
        begin = time.perf_counter()
        for file in files:
            file.read_bytes()
        each = (time.perf_counter() - begin) / len(files)
        print(f"{title:44s} {1e3 * each:7.3f} ms a file", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        plain = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        kept = plain | {"PYTHONPYCACHEPREFIX": folder}
        for title, environment in (
            ("import sympy, this environment", dict(os.environ)),
            ("import sympy, no bytecode yet", kept),
            ("import sympy, with bytecode", kept),
        ):
            begin = time.perf_counter()
            subprocess.run([sys.executable, "-c", "import sympy"], env=environment, check=True)
            print(f"{title:44s} {time.perf_counter() - begin:7.2f} s", flush=True)


if __name__ == "__main__":
    main()
