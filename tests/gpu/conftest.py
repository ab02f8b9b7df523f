"""The checks on a CUDA GPU: parts, rows of figures, and the order of the tests.

Each check is a test that takes rows (law, value, limit). The test fails if a value exceeds its
limit. Every row is printed, and with the environment variable OUT set also written to
$OUT/gpu_rows_<process>.txt, one line each. $OUT/gpu_tests.txt gets the seconds and the outcome of
every test as soon as it ends, and the error of one that failed: a run that is cut short has them.
"""

import gc
import os
import time
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from oracles.checkpoints import make_checkpoint
from oracles.gpu_models import FAMILIES, SIZES, Row

PARTS = ("kernels", "training", *FAMILIES, "offload", "fp8")
PARTS_4BIT = ("4bit-training", "4bit-llama3.2", "4bit-qwen2")
# The files with the longest tests come first, so that no process ends long after the others.
LONG = ("test_quantized.py", "test_steps.py", "test_training.py", "test_fp8.py", "test_kernels.py")
ORDER = {name: i - len(LONG) for i, name in enumerate(LONG)} | {"test_inductor.py": 1}
# GPU_CHECK_START: when the first of several processes began.
START = float(os.environ.get("GPU_CHECK_START") or time.time())


def pytest_addoption(parser: pytest.Parser) -> None:
    parts = [*PARTS, *PARTS_4BIT]
    text = f"run only these parts of tests/gpu, of {', '.join(parts)}; may be repeated"
    parser.addoption("--part", action="append", choices=parts, default=[], help=text)


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """Ignore this folder unless the run asks for it with -m gpu."""
    return None if "gpu" in (config.getoption("markexpr") or "") else True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect other parts and, without CUDA, skip; long tests first, test_inductor.py last."""
    wanted = set(config.getoption("--part", default=[]) or [])
    here = [x for x in items if x.get_closest_marker("gpu")]
    parts = {x: {m.args[0] for m in x.iter_markers("part")} for x in here}
    dropped = [x for x in here if wanted and parts[x] and not parts[x] & wanted]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
    items[:] = [x for x in items if x not in dropped]
    items.sort(key=lambda x: ORDER.get(x.path.name, 0) if x in parts else 0)
    if not torch.cuda.is_available():
        for item in here:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Append a test's outcome to $OUT/gpu_tests.txt. Of several processes the first one does it."""
    out, worker = os.environ.get("OUT"), "PYTEST_XDIST_WORKER" in os.environ
    here = report.nodeid.startswith("tests/gpu/")
    if not out or worker or not here or (report.when != "call" and report.passed):
        return
    at = f"{time.time() - START:6.1f} s: {report.outcome} after {report.duration:.1f} s:"
    error = report.longreprtext if report.failed else ""
    with open(Path(out) / "gpu_tests.txt", "a") as file:
        print(at, report.nodeid, report.when, error, file=file)


@pytest.fixture(scope="session")
def session_start() -> float:
    """When the checks began, in seconds since the epoch."""
    return START


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Callable[[str], tuple[Path, Any]]:
    """checkpoint(family): a folder in bf16, and transformers' model of it on the GPU."""

    @cache
    def of(family: str) -> tuple[Path, Any]:
        folder = tmp_path_factory.mktemp("gpu") / family
        config = SIZES | FAMILIES[family]
        theirs: Any = make_checkpoint(family, folder, torch.bfloat16, config=config)
        return folder, theirs.cuda()

    return of


@pytest.fixture
def check() -> Callable[[Iterable[Row]], None]:
    """check(rows): print every row as it comes; fail if a value exceeds its limit, or is NaN."""

    def of(rows: Iterable[Row]) -> None:
        wrong, count = [], 0
        for law, value, limit in rows:
            count += 1
            good = value <= limit
            line = f"{law:<55} {value:10.2e}  <= {limit:8.1e}  {'ok' if good else 'WRONG'}"
            print(line, flush=True)
            if out := os.environ.get("OUT"):
                with open(Path(out) / f"gpu_rows_{os.getpid()}.txt", "a") as file:
                    file.write(line + "\n")
            if not good:
                wrong.append(line)
        gc.collect()
        assert count, "no row was measured"
        assert not wrong, f"{len(wrong)} of {count} rows exceed their limits:\n" + "\n".join(wrong)

    return of
