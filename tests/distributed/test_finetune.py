"""scripts/finetune.py under torchrun itself, with a rank that is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from fastlora.checkpoints.hub import DEMO

ROOT = Path(__file__).parents[2]


def children(pid: int) -> dict[str, int]:
    """RANK -> process id of torchrun's ranks."""
    found = {}
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        found |= {x[5:].decode(): int(child) for x in environment if x.startswith(b"RANK=")}
    return found


def test_a_killed_rank_of_finetune_is_started_again_and_the_run_ends(tmp_path):
    rows = (DEMO / "train.jsonl").read_text().splitlines()[:40]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    out = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command += ["2", "--max-restarts", "1", "--monitor-interval", "0.1"]
    command += [str(ROOT / "scripts/finetune.py"), "--data", str(tmp_path / "rows.jsonl")]
    command += ["--no-hold-out", "--output", str(out), "--max-steps", "15", "--save-every", "1"]
    command += ["--max-seq-length", "64", "--batch-size", "1", "--no-progress", "--keep", "3"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with (tmp_path / "text").open("w") as text:
        run = subprocess.Popen(command, env=environment, stdout=text, stderr=text)
        try:
            while run.poll() is None and not list(out.glob("checkpoint-*/trainer_state.json")):
                time.sleep(0.02)
            os.kill(children(run.pid)["1"], signal.SIGKILL)
            code = run.wait(120)
        finally:
            run.kill()
    written = (tmp_path / "text").read_text()
    assert code == 0, written[-3000:]
    assert "exitcode: -9" in written  # torchrun reports the kill
    assert written.count("the reloaded model agrees") == 1  # rank 0 prints, the other does not
    assert "a step: 2 ranks x 1 sequences x 1 micro-batches = 2" in written
    steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert steps == [*range(1, 16)]
    assert not (tmp_path / "run.1").exists()  # the second attempt went on in the same folder
