"""Kills: a run is ended by SIGKILL at random moments, resumed, and must give the same bits.

`train_once` runs in a child of the fault server; `kill_loop` is the parent's side.
"""

import hashlib
import json
import random
import time
from pathlib import Path
from typing import Any, NamedTuple

STEPS = 10
OPTIMIZER, STATE = "optimizer.safetensors", "trainer_state.json"


def train_once(good: str, out: str, seed: int = 3407, pause: float = 0.0) -> None:
    """One run with a checkpoint at every step, resumed from the newest if there is one.

    A line "step N" is printed after every step, and "done" at the end.
    """
    from fault_case import tuned

    import fastlora

    folder = Path(good)
    model, tokenizer = fastlora.load(folder / "base", device="cpu")
    model = tuned(model, lora_dropout=0.1)

    def log(record: dict[str, Any]) -> None:
        print("step", record["step"], flush=True)
        time.sleep(pause)

    resume = any(Path(out).glob(f"checkpoint-*/{STATE}"))
    settings: dict[str, Any] = dict(max_steps=STEPS, batch_size=2, packing=False, save_every=1)
    rows = folder / "rows.jsonl"
    fastlora.train(
        model, tokenizer, rows, output_dir=out, resume=resume, seed=seed, log=log,
        progress=False, **settings,
    )  # fmt: skip
    print("done", flush=True)


def prepare(good: str) -> None:
    """Write the folders that `train_once` reads."""
    import fault_folders

    fault_folders.write_all(Path(good))


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
    return [str(p) for p in found if p.is_file() and p.name != ".lock"]


class Tally(NamedTuple):
    """What came of a number of kills."""

    kills: int
    runs: int  # finished
    same_bits: int  # of them
    stale: list[str]  # temporary files left in finished runs
    errors: list[str]  # outputs of runs that ended by an error
    seconds_a_kill: float


def kill_loop(worker: Any, kills: int, seed: int = 0) -> Tally:
    """SIGKILL runs at random moments, `kills` times in all, each run until it is done."""
    good, root = worker.scratch / "kills-good", worker.scratch / "kills"
    root.mkdir(parents=True, exist_ok=True)
    output = root / "output"
    worker.start("fault_kills:prepare", output, good=str(good))
    assert worker.wait(120) == 0, output.read_text()
    start = lambda out: worker.start(
        "fault_kills:train_once", output, good=str(good), out=str(out)
    )
    begun = time.monotonic()
    start(root / "whole")
    assert worker.wait(120) == 0, output.read_text()[-3000:]
    duration = time.monotonic() - begun
    expected = fingerprint(root / "whole")
    draw = random.Random(seed)
    done = runs = same = 0
    stale: list[str] = []
    errors: list[str] = []
    begun = time.monotonic()
    while done < kills or runs == 0:
        out = root / f"run-{runs}-{done}"
        while True:
            output.unlink(missing_ok=True)
            start(out)
            # Once the kills are spent, the run may end.
            delay = draw.uniform(0.0, 0.7 * duration) if done < kills else 120
            code = worker.wait(delay)
            if code is None:
                worker.kill()
                done += 1
            elif code == 0:
                break
            else:
                errors.append(output.read_text()[-2000:])
                break
        runs += 1
        same += (out / f"checkpoint-{STEPS}" / STATE).exists() and fingerprint(out) == expected
        stale += stale_files(out)
        if errors:
            break
    seconds = (time.monotonic() - begun) / max(1, done)
    return Tally(done, runs, same, stale, errors, round(seconds, 3))


def stop(worker: Any, number: int, out: Path, after: int = 3) -> dict[str, Any]:
    """Send SIGINT or SIGTERM after some steps; gives exit status, steps, output, checkpoints."""
    good, output = worker.scratch / "kills-good", worker.scratch / f"signal-{number}"
    output.unlink(missing_ok=True)
    if not good.exists():
        worker.start("fault_kills:prepare", output, good=str(good))
        assert worker.wait(120) == 0
    arguments = dict(good=str(good), out=str(out), pause=0.1)
    worker.start("fault_kills:train_once", output, **arguments)
    end = time.monotonic() + 60
    reached = lambda: output.exists() and f"step {after}\n" in output.read_text()
    while not reached() and time.monotonic() < end:
        time.sleep(0.01)
    code = worker.kill(number)
    text = output.read_text()
    steps = [int(line.split()[1]) for line in text.splitlines() if line.startswith("step ")]
    saved = sorted(int(p.parent.name.split("-")[1]) for p in out.glob(f"checkpoint-*/{STATE}"))
    return dict(exit=code, steps=steps, text=text, saved=saved)
