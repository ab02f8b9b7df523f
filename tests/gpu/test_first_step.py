"""In the first training step threads compile the kernels that compiled layers and the loss launch.

A new process with empty caches trains for one step.
"""

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from oracles.gpu_models import Row

pytestmark = [pytest.mark.gpu, pytest.mark.part("training")]

ROOT = Path(__file__).parents[2]

# Prints [kernel, thread] for each kernel of ours that Triton compiles.
RUN = """
    import json, threading
    import triton
    import fastlora

    compiled = []

    def note(*, src, cache_hit, **_):
        if src.fn.module.startswith("fastlora.") and not cache_hit:
            compiled.append([src.name, threading.current_thread().name])

    triton.knobs.compilation.listener = note
    model, tokenizer = fastlora.load("demo", max_seq_length=256, device="cuda")
    model = fastlora.lora(model, r=16)
    rows = [{"text": "def add(a, b): return a + b"}] * 64
    fastlora.train(model, tokenizer, rows, max_steps=1, batch_size=2, progress=False)
    print(json.dumps(compiled))
"""


def kernels_of_a_step(caches: Path) -> Iterator[Row]:
    names = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME")
    environment = os.environ | {name: str(caches / name) for name in names}
    command = [sys.executable, "-c", textwrap.dedent(RUN)]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert not ran.returncode, ran.stderr[-3000:]
    compiled = json.loads(ran.stdout.splitlines()[-1])
    late = sorted(name for name, thread in compiled if thread == "MainThread")
    print(f"{len(compiled)} kernels compiled; at their launch: {late}")
    ahead = {name for name, thread in compiled if thread == "fastlora-ahead"}
    yield "kernels of which none was compiled ahead", float(not {"_logprob_kernel"} < ahead), 0
    yield "kernels compiled at their launch", float(len(late)), 0


def test_the_main_thread_compiles_no_kernel(check, tmp_path):
    check(kernels_of_a_step(tmp_path))
