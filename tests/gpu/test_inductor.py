"""Inductor's kernels of these checks: none reads back what it stored.

conftest.py runs this module last, so that it sees what every other test of the process compiled;
with several processes, scripts/gpu_check.sh runs it after all of them.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from layer_kernels import read_back
from torch._inductor.runtime.cache_dir_utils import cache_dir

from oracles.gpu_models import Row

pytestmark = pytest.mark.gpu


def read_backs(since: float) -> Iterator[Row]:
    """No kernel that Inductor wrote since then reads back what it stored."""
    files = [x for x in Path(cache_dir()).rglob("*.py") if x.stat().st_mtime >= since]
    found = sorted({name for file in files for name in read_back(file.read_text())})
    for name in found:
        print(f"reads back what it stored: {name}")
    yield f"of {len(files)} files of Inductor's, kernels that read back", float(len(found)), 0


def test_no_kernel_reads_back_what_it_stored(session_start, check):
    check(read_backs(session_start))
