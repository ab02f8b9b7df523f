"""The ranks' server: imports torch and fastlora once, then forks the ranks of every job.

A job is a line of JSON on stdin: {"law": name, "ranks": N, "arguments": {...}, "scratch": folder,
"restarts": 0, "seconds": 60}. A law that is not in laws.py is "file.name". The answer on stdout is
{"ranks": [{"exit": ..., "result": ..., "text": ...}, ...], "attempts": ...}. Each rank gets
torchrun's environment, and like torchrun the server ends all ranks when one has failed, and starts
them again if the job allows restarts. With one rank there is no such environment.
"""

import importlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _run(job: dict[str, Any], rank: int, attempt: int, port: int) -> NoReturn:
    """In a child: run a law, write its result, and leave without the server's clean-up."""
    scratch = Path(job["scratch"])
    output = os.open(scratch / f"{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = 0
    if job["ranks"] > 1:
        place = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=job["ranks"], MASTER_PORT=port)
        place |= dict(LOCAL_WORLD_SIZE=job["ranks"], TORCHELASTIC_RESTART_COUNT=attempt)
        os.environ |= {name: str(x) for name, x in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
    try:
        *file, name = job["law"].split(".")
        law = getattr(importlib.import_module(f"distributed.{(file or ['laws'])[0]}"), name)
        result = law(scratch, **job["arguments"])
        (scratch / f"{rank}.json").write_text(json.dumps(result))
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
        traceback.print_exc()
    except BaseException:  # noqa: BLE001  a child must never run the server's loop
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _wait(pids: list[int], seconds: float, patience: float) -> list[int]:
    """Exit statuses. After the first failure the others have `patience` seconds."""
    codes: dict[int, int] = {}
    end = time.monotonic() + seconds
    while len(codes) < len(pids):
        for pid in set(pids) - codes.keys():
            if (status := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid] = os.waitstatus_to_exitcode(status[1])
                if codes[pid]:
                    end = min(end, time.monotonic() + patience)
        if time.monotonic() > end:
            for pid in set(pids) - codes.keys():
                os.kill(pid, signal.SIGKILL)
            end = time.monotonic() + 60
        time.sleep(0.005)
    return [codes[pid] for pid in pids]


def _job(job: dict[str, Any]) -> dict[str, Any]:
    scratch, codes, attempt = Path(job["scratch"]), [1], -1
    while any(codes) and attempt < job["restarts"]:
        attempt += 1
        port, pids = _free_port(), []
        for rank in range(job["ranks"]):
            (scratch / f"{rank}.json").unlink(missing_ok=True)
            if not (pid := os.fork()):
                _run(job, rank, attempt, port)
            pids.append(pid)
        codes = _wait(pids, job["seconds"], job["patience"])
    ranks = []
    for rank, code in enumerate(codes):
        found = scratch / f"{rank}.json"
        result = json.loads(found.read_text()) if found.exists() else None
        text = (scratch / f"{rank}.txt").read_text(errors="replace")
        ranks.append({"exit": code, "result": result, "text": text})
    return {"ranks": ranks, "attempts": attempt + 1}


def main() -> None:
    """Serve until stdin ends."""
    sys.path[0] = str(Path(__file__).parents[1])  # "distributed" is imported from tests/
    import torch

    torch.set_num_threads(1)
    for module in ("distributed.laws", "torch._dynamo", "jinja2", "tqdm"):
        importlib.import_module(module)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        replies.write(json.dumps(_job(json.loads(line))) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
