"""A thread prepares the first step while data are read."""

import json
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch

import fastlora
from fastlora import loading
from fastlora.checkpoints.hub import DEMO
from fastlora.distributed.data_parallel import Group
from fastlora.distributed.ranks import Ranks
from fastlora.model import Model
from fastlora.ops.launch import Launch
from fastlora.runtime import ahead, first_step, kernels_ahead
from fastlora.runtime.compiled import Compile
from fastlora.runtime.first_step import (
    CACHE,
    DYNAMO,
    INDUCTOR,
    importing_compiler,
    preparing_first_step,
)
from fastlora.training import loop

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ROOT = Path(__file__).parents[2]


class Kernel:
    """A fake Triton kernel."""

    @staticmethod
    def fn() -> None: ...


@pytest.fixture
def tasks(monkeypatch) -> list[str]:
    """A list that gets the tasks of the thread, which do nothing: modules and functions."""
    found: list[str] = []
    monkeypatch.setattr(ahead, "import_module", found.append)
    for name in ("_start_compilers", "_hash_triton", "_hash_torch"):
        monkeypatch.setattr(first_step, name, partial(lambda name, *_: found.append(name), name))
    return found


@pytest.fixture
def slow_imports(monkeypatch) -> tuple[list[str], threading.Event, threading.Event]:
    """(the modules whose import has begun, set when one has, to be set for imports to end)."""
    names: list[str] = []
    begun, end = threading.Event(), threading.Event()

    def slow(name: str) -> None:
        names.append(name)
        begun.set()
        end.wait(60)

    monkeypatch.setattr(ahead, "import_module", slow)
    return names, begun, end


def test_inductor_is_prepared_for_compiled_models_only(tasks):
    everything = {*DYNAMO, CACHE, *INDUCTOR, "_start_compilers", "_hash_triton", "_hash_torch"}
    settings: list[tuple[Compile, torch.device]] = [("auto", CPU), (False, CPU), (True, CPU)]
    for compile, device in [*settings, (False, CUDA), ("auto", CUDA)]:
        tasks.clear()
        with preparing_first_step(compile, device):
            pass
        whole = compile is True or (compile == "auto" and device == CUDA)
        assert {*tasks} == (everything if whole else {*DYNAMO})
        assert tasks[:2] == ["sympy", "torch._dynamo"]


def test_kernels_outside_of_regions_are_compiled_while_rows_are_read(tasks, monkeypatch):
    compiled = threading.Event()
    monkeypatch.setattr(kernels_ahead, "compile_launch", lambda *_: compiled.set())
    launches = [Launch(Kernel, (), {})]
    with preparing_first_step(False, CUDA, launches=lambda: launches):
        pass
    assert not compiled.is_set()
    with preparing_first_step("auto", CUDA, launches=lambda: launches):
        assert compiled.wait(60)


def test_triton_is_hashed_beside_the_imports(tasks, monkeypatch):
    begun, end = threading.Event(), threading.Event()

    def hash_files(_: torch.device) -> None:
        begun.set()
        end.wait(60)
        tasks.append("hashed")

    monkeypatch.setattr(first_step, "_hash_triton", hash_files)
    monkeypatch.setattr(first_step, "_hash_torch", end.set)  # it follows the imports
    with preparing_first_step(True, CPU, launches=lambda: tasks.append("launches") or []):
        assert begun.wait(60)
    assert tasks[-2:] == ["hashed", "launches"]  # what compiles kernels waited for the hash


def test_only_the_first_rank_starts_compilers(tasks):
    for first in (True, False):
        tasks.clear()
        with preparing_first_step(True, CPU, first):
            pass
        assert ("_start_compilers" in tasks) == first and "_hash_torch" in tasks


def test_a_rank_imports_while_it_waits_for_the_first_one_of_its_machine(monkeypatch):
    order: list[str] = []
    ranks = object.__new__(Group)
    ranks.rank, ranks.node_leader = 9, 8

    @contextmanager
    def turn(what: str) -> Iterator[None]:
        order.append(what)
        yield

    @contextmanager
    def preparing(model: Model, compilers: bool) -> Iterator[None]:
        order.append(f"imports, compilers: {compilers}")
        yield

    def end(*_: object) -> None:
        raise KeyError

    monkeypatch.setattr(ranks, "first_on_node", turn)
    monkeypatch.setattr(loop, "preparing_training", preparing)
    monkeypatch.setattr(loop, "joined_ranks", lambda *_: nullcontext(ranks))
    monkeypatch.setattr(loop, "prepare_run", end)
    base, tokenizer = fastlora.load("demo", device="cpu")
    with pytest.raises(KeyError):
        fastlora.train(fastlora.lora(base, r=2), tokenizer, ["a"], max_steps=1, progress=False)
    assert order == ["imports, compilers: False", "encoding"]
    assert Ranks().leads_node


def test_imports_stop_at_the_end_of_the_block(slow_imports, monkeypatch):
    """Code of the caller that follows may import parts of torch itself."""
    names, begun, end = slow_imports
    stop = ahead.Ahead.stop

    def stop_and_end_later(thread: ahead.Ahead) -> None:
        stop(thread)
        threading.Timer(0.1, end.set).start()

    monkeypatch.setattr(ahead.Ahead, "stop", stop_and_end_later)
    with importing_compiler(False):
        pass
    with pytest.raises(KeyError), importing_compiler(True):
        begun.wait(60)
        raise KeyError
    assert names == ["sympy"] and end.is_set()


@pytest.mark.parametrize("precision", [None, "nf4", "fp8"])
def test_the_compiler_is_imported_only_while_dense_weights_are_read_to_a_gpu(
    precision, monkeypatch
):
    """bitsandbytes imports dynamo in the main thread, and the kernels of fp8 import Triton."""
    wanted: list[bool] = []

    @contextmanager
    def note(value: bool) -> Iterator[None]:
        wanted.append(value)
        yield

    monkeypatch.setattr(loading, "importing_compiler", note)
    monkeypatch.setattr(loading, "read_checked", lambda checked, device: (checked.config, {}))
    for device in ("cpu", "cuda"):
        loading._read_base(DEMO, device, None, "auto", None, precision)
    assert wanted == [False, precision is None]


def test_an_error_of_the_block_does_not_wait(slow_imports):
    """And the thread ends after the module that it imports."""
    names, begun, end = slow_imports
    with pytest.raises(KeyError), preparing_first_step(False, CPU):
        begun.wait(60)
        raise KeyError("row")
    assert not end.is_set()
    end.set()
    ahead._wait_for_all()
    assert names == ["sympy"]


# A run until its rows are read. Prints the imports: [module, thread, whether the other one runs].
RUN = """
    import json, sys, threading
    import torch
    import fastlora
    from fastlora.runtime.first_step import DYNAMO, INDUCTOR
    from fastlora.training import loop

    seen = []

    class Watch:
        def find_spec(self, name, path=None, target=None):
            names = [thread.name for thread in threading.enumerate()]
            seen.append((name, threading.current_thread().name, "fastlora-ahead" in names))

    def end(*_):
        missing = [name for name in (*DYNAMO, *INDUCTOR) if name not in sys.modules]
        print(json.dumps([seen, missing]))
        raise SystemExit

    model, tokenizer = fastlora.load("demo", device="cpu")
    model = fastlora.lora(model, r=2).with_spec(compile=True)
    sys.meta_path.insert(0, Watch())
    loop.make_learner = end
    rows = [{"text": "def add(a, b): return a + b"}] * 20
    fastlora.train(model, tokenizer, rows, max_steps=1, batch_size=1, progress=False)
"""


def test_the_main_thread_imports_no_part_of_torch_meanwhile():
    """Else two threads could be in one circular import, and see modules that are not complete."""
    command = [sys.executable, "-c", textwrap.dedent(RUN)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert not ran.returncode, ran.stderr[-3000:]
    seen, missing = json.loads(ran.stdout.splitlines()[-1])
    assert not missing
    own = [name for name, thread, running in seen if running and thread == "MainThread"]
    assert not [name for name in own if name.split(".")[0] in ("torch", "sympy", "triton")]
    others = {name for name, thread, _ in seen if thread == "fastlora-ahead"}
    assert {"torch._dynamo", "torch._inductor.compile_fx", "sympy"} <= others


def test_compilers_start_if_the_cache_is_empty(monkeypatch, tmp_path):
    import torch._inductor.async_compile as async_compile

    started: list[int] = []
    monkeypatch.setattr(async_compile, "maybe_warm_pool", lambda: started.append(1))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    first_step._start_compilers(CPU)  # its kernels are C++, which other processes do not compile
    assert not started
    first_step._start_compilers(CUDA)
    assert started
    (tmp_path / "aotautograd").mkdir()
    first_step._start_compilers(CUDA)
    assert len(started) == 1


def test_inductor_keeps_what_was_hashed(fresh_dynamo):
    from torch._inductor.codecache import CacheBase, torch_key

    CacheBase.get_system.cache_clear()
    first_step._hash_triton(CPU)
    assert CacheBase.get_system.cache_info().currsize == 1
    first_step._hash_torch()
    begun = time.perf_counter()
    torch_key()
    assert time.perf_counter() - begun < 0.01
