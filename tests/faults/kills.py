"""Kills: a run is ended by SIGKILL at random moments, resumed, and must give the same bits.

`train_once` runs in a child of the fault server; `kill_loop` is the parent's side.
"""

import hashlib
import itertools
import json
import os
import random
import signal
import stat
import time
from pathlib import Path
from typing import Any, NamedTuple

STEPS = 10
OPTIMIZER, STATE = "optimizer.safetensors", "trainer_state.json"


def train_once(
    good: str, out: str, pause: float = 0.0, save_every: int = 1, die_at_write: int = 0
) -> None:
    """One run, resumed from the newest checkpoint if there is one.

    A line "step N" is printed after every step, and "done" at the end. With `die_at_write`, the
    process kills itself while the file of this number is on its way to the disk.
    """
    import fastlora
    from faults.case import tuned

    folder, resume = Path(good), any(Path(out).glob(f"checkpoint-*/{STATE}"))
    model, tokenizer = fastlora.load(folder / "base", device="cpu")
    model = tuned(model, lora_dropout=0.1)

    def log(record: dict[str, Any]) -> None:
        print("step", record["step"], flush=True)
        time.sleep(pause)

    if die_at_write:
        _kill_at_write(die_at_write)
    settings: dict[str, Any] = dict(max_steps=STEPS, batch_size=2, packing=False, progress=False)
    settings |= dict(output_dir=out, resume=resume, save_every=save_every, log=log)
    fastlora.train(model, tokenizer, folder / "rows.jsonl", **settings)
    print("done", flush=True)


def _kill_at_write(number: int) -> None:
    """Replace os.fsync by one that ends the process at its n-th file, folders not counted."""
    plain, files = os.fsync, itertools.count(1)

    def fsync(descriptor: int) -> None:
        if stat.S_ISREG(os.fstat(descriptor).st_mode) and next(files) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        plain(descriptor)

    os.fsync = fsync


def prepare(good: str) -> None:
    """Write the folders that `train_once` reads."""
    from faults import folders

    folders.write_all(Path(good))


def fingerprint(out: Path) -> dict[str, Any]:
    """Hashes of the final adapter and the optimizer's state, and the history without seconds."""
    last = out / f"checkpoint-{STEPS}"
    digest = lambda path: hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    records = json.loads((last / STATE).read_text())["history"]
    return dict(
        adapter=digest(out / "adapter_model.safetensors"),
        optimizer=digest(last / OPTIMIZER),
        history=[{k: v for k, v in r.items() if k != "seconds"} for r in records],
    )


def stale_files(*folders: Path) -> list[str]:
    """Temporary files that no process will rename any more."""
    found = [p for folder in folders for p in folder.rglob("*") if p.name.startswith(".")]
    return [str(p) for p in found if p.is_file() and not p.name.endswith("lock")]


class Tally(NamedTuple):
    """What came of a number of kills."""

    kills: int
    runs: int  # finished
    same_bits: int  # of them
    stale: list[str]  # temporary files left in finished runs
    errors: list[str]  # outputs of runs that ended by an error
    seconds_a_kill: float


def start(worker: Any, out: Path, **settings: Any) -> Path:
    """Start `train_once` in a child; gives the file of its output."""
    good, output = worker.scratch / "kills-good", worker.scratch / "kills-output"
    output.unlink(missing_ok=True)
    if not good.exists():
        worker.start("faults.kills:prepare", output, good=str(good))
        assert worker.wait(120) == 0, output.read_text()
    worker.start("faults.kills:train_once", output, good=str(good), out=str(out), **settings)
    return output


def run_once(worker: Any, out: Path, **settings: Any) -> float:
    """A run to its end; gives its seconds."""
    output, begun = start(worker, out, **settings), time.monotonic()
    code = worker.wait(120)
    assert code == 0, output.read_text()[-3000:]
    return time.monotonic() - begun


def die_in_save(worker: Any, out: Path, write: int) -> int:
    """A run that kills itself while it writes its n-th file; gives the exit status."""
    start(worker, out, die_at_write=write)
    return worker.wait(120)


def _kill_later(worker: Any, output: Path, draw: random.Random, step_seconds: float) -> int | None:
    """Kill the child within the step after its next 0 to 4 ones; gives the exit status if it ends
    by itself, else None."""
    steps, code = draw.randrange(5), None
    printed = lambda: output.read_text().count("step ") if output.exists() else 0
    while printed() < steps and code is None:
        code = worker.wait(0.003)
    if code is None:
        code = worker.wait(draw.uniform(0.0, 1.2 * step_seconds))
    if code is None:
        worker.kill()
    return code


def kill_loop(worker: Any, kills: int, seed: int = 0) -> Tally:
    """SIGKILL runs at random moments, `kills` times in all, each run until it is done."""
    root = worker.scratch / f"kills-{seed}"
    duration = run_once(worker, root / "whole")
    expected, draw = fingerprint(root / "whole"), random.Random(seed)
    done = runs = same = 0
    stale: list[str] = []
    errors: list[str] = []
    begun = time.monotonic()
    while (done < kills or runs == 0) and not errors:
        out, code = root / f"run-{runs}", None
        while code is None:
            output = start(worker, out)
            if done < kills:
                code = _kill_later(worker, output, draw, duration / (2 * STEPS))
                done += code is None
            else:  # the kills are spent: the run may end
                code = worker.wait(120)
        if code != 0:
            errors.append(output.read_text()[-2000:])
            continue
        runs += 1
        same += fingerprint(out) == expected
        stale += stale_files(out)
    seconds = (time.monotonic() - begun) / max(1, done)
    return Tally(done, runs, same, stale, errors, round(seconds, 3))


def stop(worker: Any, number: int, out: Path, after: int = 3) -> dict[str, Any]:
    """Send SIGINT or SIGTERM after some steps; gives exit status, steps, output, checkpoints."""
    output = start(worker, out, pause=0.1, save_every=100)
    end = time.monotonic() + 60
    reached = lambda: output.exists() and f"step {after}\n" in output.read_text()
    while not reached() and time.monotonic() < end:
        time.sleep(0.01)
    code = worker.kill(number)
    text = output.read_text()
    steps = [int(line.split()[1]) for line in text.splitlines() if line.startswith("step ")]
    saved = sorted(int(p.parent.name.split("-")[1]) for p in out.glob(f"checkpoint-*/{STATE}"))
    return dict(exit=code, steps=steps, text=text, saved=saved)
