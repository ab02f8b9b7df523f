"""`gang`: jobs for ranks, which a server forks; it is started once a session."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from oracles.checkpoints import make_checkpoint

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def gang(tmp_path_factory) -> Iterator[Callable[..., Any]]:
    """gang(law, ranks, ...): the answer of server.py, with the job's folder as "scratch"."""
    home = tmp_path_factory.mktemp("ranks")
    make_checkpoint("llama2", home / "base", config=dict(vocab_size=4096))
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    settings = dict(PYTHONPATH=path, OMP_NUM_THREADS="1", RANKS_BASE=str(home / "base"))
    settings |= dict(XDG_CACHE_HOME=str(home / "cache"), PYTHONDONTWRITEBYTECODE="1")
    server = subprocess.Popen(
        [sys.executable, str(TESTS / "distributed/server.py")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | settings,
    )  # fmt: skip
    numbers = count()

    def run(
        law: str, ranks: int, *, scratch: Path | None = None, restarts: int = 0,
        seconds: float = 60.0, patience: float = 20.0, **arguments: Any,
    ) -> dict[str, Any]:  # fmt: skip
        scratch = home / str(next(numbers)) if scratch is None else scratch
        scratch.mkdir(exist_ok=True)
        job = dict(law=law, ranks=ranks, arguments=arguments, scratch=str(scratch))
        job |= dict(restarts=restarts, seconds=seconds, patience=patience)
        assert server.stdin is not None and server.stdout is not None
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        return json.loads(server.stdout.readline()) | {"scratch": scratch}

    yield run
    assert server.stdin is not None
    server.stdin.close()
    server.wait(60)


@pytest.fixture(scope="session")
def results(gang) -> Callable[..., list[Any]]:
    """results(law, ranks, ...): what each rank returned; fails if a rank failed."""

    def of(law: str, ranks: int, **given: Any) -> list[Any]:
        answer = gang(law, ranks, **given)
        failed = [r["text"] for r in answer["ranks"] if r["exit"]]
        assert not failed, "\n".join(failed)
        return [rank["result"] for rank in answer["ranks"]]

    return of
