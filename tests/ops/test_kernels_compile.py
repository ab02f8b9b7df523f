"""The Triton kernels compile for an H100 (sm_90) in bf16; the interpreter cannot show that.

They compile with the environment's Triton, and with that of the oldest torch that fastlora
supports. The kernels that find a step's next tokens also compile for an A100 (sm_80), without PDL.

Compilation runs in a subprocess, because this process has Triton's interpreter on. It needs no GPU.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels' tests need triton: requirements-test.txt has it")

PROGRAMS = Path(__file__).parent / "kernel_programs"
# scripts/test.sh installs it here.
OLDEST = Path(sys.prefix) / "triton" / "site-packages"


def compiled(program: str, oldest: bool) -> list[tuple[str, int, float]]:
    """Name, bytes, and share of a block's shared memory of each kernel of a program."""
    paths = [str(Path(__file__).parents[2])]
    if oldest:
        assert OLDEST.exists(), "scripts/test.sh installs scripts/requirements-triton.txt"
        paths.insert(0, str(OLDEST))
    environ = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, str(PROGRAMS / program)]
    ran = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-3000:]
    version, *lines = ran.stdout.splitlines()
    assert version.startswith("3.6.") or not oldest, version
    found = [line.split() for line in lines]
    return [(name, int(size), float(shared)) for name, size, shared in found]


@pytest.mark.parametrize("oldest", [False, True], ids=["installed", "oldest"])
@pytest.mark.parametrize(("program", "count"), [("training.py", 65), ("decoding.py", 28)])
def test_every_kernel_compiles_for_an_h100_and_fits_its_shared_memory(program, count, oldest):
    kernels = compiled(program, oldest)
    assert len(kernels) == count and min(size for _, size, _ in kernels) > 1000
    assert max(shared for *_, shared in kernels) <= 1, kernels
