"""Triton kernels are compiled while Inductor compiles the graph that launches them."""

import importlib
import json
import os
import subprocess
import sys
import textwrap
import threading
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import sleep
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._inductor import compile_fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import fastlora
from fastlora import functional as FL
from fastlora.models.head_logprobs import loss_launches
from fastlora.ops import launch as launching
from fastlora.ops.launch import Launch, Pointer, implement, launch, launches_of
from fastlora.ops.loss.linear_cross_entropy import label_logprobs_and_grad_kernel
from fastlora.runtime import compiled, kernels_ahead
from fastlora.runtime.kernels_ahead import compiling_kernels
from oracles.pairs import adapted
from oracles.trees import token_ids

pytest.importorskip("triton", reason="the kernels' tests need triton: requirements-test.txt has it")

ROOT = Path(__file__).parents[2]
SHAPES = ShapeEnv()
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
KERNELS = (
    "attention.flash_kernel",
    "linear.low_rank_gradients_kernel",
    "linear.masked_lora_kernel",
    "loss.softmax_kernel",
    "swiglu.swiglu_kernel",
)


@pytest.fixture
def launched(monkeypatch) -> list[Launch]:
    """A list that gets each launch of a kernel that trained layers use."""
    found: list[Launch] = []

    def note(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        if launching._found.get() is None:
            options = launching._DEFAULTS | options
            found.append(Launch(kernel, launching._pointers(args), options))
        launch(kernel, grid, *args, **options)

    for name in KERNELS:
        monkeypatch.setattr(importlib.import_module(f"fastlora.ops.{name}"), "launch", note)
    return found


@pytest.fixture
def always_supported(monkeypatch) -> None:
    """The model uses the kernels for every dtype, head size and length."""
    for name in (
        "fastlora.models.decoder.kernel_supports",
        "fastlora.models.attention.flash.kernel_supports",
        "fastlora.models.attention.flash.kernel_is_faster",
        "fastlora.ops.linear.low_rank_gradients.kernel_supports",
    ):
        monkeypatch.setattr(name, lambda *_: True)


@pytest.fixture
def ahead(monkeypatch) -> list[Launch]:
    """A list that gets what is compiled ahead. Graphs on the CPU count as graphs on CUDA."""
    found: list[Launch] = []
    monkeypatch.setattr(compiled, "device_of", lambda inputs: CUDA)
    monkeypatch.setattr(kernels_ahead, "compile_launch", lambda launch, _: found.append(launch))
    return found


@pytest.fixture
def eager_inductor(monkeypatch, fresh_dynamo) -> None:
    """Inductor runs its passes, but graphs run as they are: its C++ takes most of the time."""
    inner = lambda graph, *_, **__: make_boxed_func(graph)
    inductor: Any = compile_fx.compile_fx
    monkeypatch.setattr(compile_fx, "compile_fx", partial(inductor, inner_compile=inner))


@pytest.mark.compile
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_every_launch_of_a_layer_is_known_before_inductor_compiles_it(
    dropout, pair, ahead, launched, always_supported, eager_inductor
):
    """With the same types, alignments, numbers and constants: Triton compiles nothing again."""
    model = adapted(pair("llama3.2").model, r=3, lora_dropout=dropout)
    ids = token_ids(2, 41, vocab_size=96)
    spec = model.with_spec(compile=True, kernels="triton").spec
    batch = {"input_ids": ids, "labels": ids}
    fastlora.value_and_grad(FL.loss)(model.adapter, model.base, spec, batch, seed=5)
    names = {x.kernel.__name__ for x in launched}
    expected = {"_forward_kernel", "_query_gradient_kernel", "_key_value_gradient_kernel"}
    expected |= {"_masked_x_a_backward_kernel"} if dropout else {"_swiglu_backward_kernel"}
    assert expected | {"_parts_kernel", "_sums_kernel"} <= names
    of_layers = [x for x in launched if x.kernel.__name__ != "_logprob_kernel"]
    assert {x.key() for x in ahead} == {x.key() for x in of_layers}


def test_the_launch_of_the_loss_is_known(pair, launched):
    model = pair("llama3.2").model
    spec, norm = model.with_spec(kernels="triton").spec, model.base["norm"]
    (known,) = loss_launches(spec, norm)
    labels = torch.zeros(7, dtype=torch.int64)
    logits = torch.zeros(7, spec.config.vocab_size, dtype=norm.dtype)
    label_logprobs_and_grad_kernel(logits, labels, spec.config.logit_cap)
    assert [x.key() for x in launched] == [known.key()]
    assert not loss_launches(model.spec, norm)  # on the CPU "auto" runs no kernels


def graph_of(n: Any, f: int = 32, r: int = 2) -> torch.fx.Graph:
    """A graph that calls lora_swiglu on n rows, f columns and rank r."""
    graph, args = torch.fx.Graph(), []
    with FakeTensorMode(shape_env=SHAPES):
        for shape in [(n, f), (n, f), (n, r), (n, r), (f, r), (f, r)]:
            args.append(graph.placeholder(f"x{len(args)}"))
            args[-1].meta["val"] = torch.empty(shape)
    graph.call_function(torch.ops.fastlora.lora_swiglu.default, (*args, None, 1.0, 1.0))
    return graph


def test_launches_of_ops_that_an_op_calls_are_found(monkeypatch):
    monkeypatch.setattr(launching, "_implementations", {})  # it gets the two ops of this test
    for name in ("outer", "inner"):
        torch.library.define(f"fastlora_test::{name}", "(Tensor x) -> Tensor")
        torch.library.register_fake(f"fastlora_test::{name}")(torch.empty_like)

    @implement("fastlora_test::inner")
    def inner(x: torch.Tensor) -> torch.Tensor:
        y = torch.empty_like(x)
        launch("kernel", (1,), x[1:], y, (x, 3), BLOCK=16)
        return y

    @implement("fastlora_test::outer")
    def outer(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.fastlora_test.inner(2 * x)

    with FakeTensorMode():
        (found,) = launches_of(outer, torch.empty(4))
    at = lambda address: Pointer(torch.float32, address)
    options = {"enable_fp_fusion": True, "BLOCK": 16}
    assert found == Launch("kernel", (at(4), at(0), (at(0), 3)), options)


def test_symbolic_sizes_are_left_out():
    assert len(kernels_ahead.graph_launches(graph_of(4))) == 1
    assert not kernels_ahead.graph_launches(graph_of(SHAPES.create_unbacked_symint()))


def test_launches_differ_by_what_triton_compiles_for():
    launches = lambda *sizes: {x.key() for x in kernels_ahead.graph_launches(graph_of(*sizes))}
    assert launches(4, 32, 2) == launches(4, 32, 2) != launches(4, 32, 3)


def test_the_end_of_the_block_waits_for_kernels(monkeypatch):
    done = []
    monkeypatch.setattr(kernels_ahead, "compile_launch", lambda *_: (sleep(0.2), done.append(1)))
    with compiling_kernels(CUDA) as settings:
        settings["joint_custom_pre_pass"](graph_of(4))
        assert not done
    assert done == [1]


def test_an_error_of_the_block_waits_for_no_kernel(monkeypatch):
    begun, end = threading.Event(), threading.Event()
    monkeypatch.setattr(kernels_ahead, "compile_launch", lambda *_: (begun.set(), end.wait(60)))
    with pytest.raises(KeyError), compiling_kernels(CUDA) as settings:
        settings["joint_custom_pre_pass"](graph_of(4))
        begun.wait(60)
        raise KeyError
    assert not end.is_set()
    end.set()


def test_an_error_of_a_thread_is_left_to_the_launch(monkeypatch):
    def fail(*_: object) -> None:
        raise RuntimeError("ptxas")

    monkeypatch.setattr(kernels_ahead, "compile_launch", fail)
    with compiling_kernels(CUDA) as settings:
        settings["joint_custom_pre_pass"](graph_of(4))


@dataclass(frozen=True)
class Kernel:
    """What is read of Triton's kernels to sort them."""

    fn: Any


def test_threads_are_at_most_as_many_as_cores_and_begin_with_long_kernels(monkeypatch):
    done = []
    monkeypatch.setattr(kernels_ahead, "compile_launch", lambda launch, _: done.append(launch))
    short, long = map(Kernel, (lambda: 1, lambda x: x * x * x + x))
    launches = [Launch(kernel, (i,), {}) for kernel, i in ((short, 1), (short, 2), (long, 3))]
    for cores in (1, 2):
        done.clear()
        monkeypatch.setattr("os.sched_getaffinity", lambda _, n=cores: {*range(n)}, raising=False)
        threads = kernels_ahead.start_compiling([*launches, launches[0]], CUDA)
        for thread in threads:
            thread.wait()
        assert len(threads) == cores and sorted(x.args for x in done) == [(1,), (2,), (3,)]
        assert cores > 1 or done[0].kernel is long


@pytest.mark.parametrize("chosen", [None, "/chosen"])
def test_kernels_are_kept_where_inductor_has_triton_look_for_them(chosen, monkeypatch, tmp_path):
    """It sets the folder when it makes its first kernel, after these threads have begun."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    if chosen:
        monkeypatch.setenv("TRITON_CACHE_DIR", chosen)
    else:
        monkeypatch.delenv("TRITON_CACHE_DIR")
    seen = []
    monkeypatch.setattr(
        kernels_ahead, "compile_launch", lambda *_: seen.append(os.environ["TRITON_CACHE_DIR"])
    )
    launches = [Launch(Kernel(lambda: None), (), {})]
    for thread in kernels_ahead.start_compiling(launches, torch.device("cuda", 1)):
        thread.wait()
    assert seen == [chosen or f"{tmp_path}/triton/1"]


def test_launchers_of_the_same_types_are_loaded_one_after_the_other(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    inside, together = {"one": [], "other": []}, []

    class Compiled:  # what Triton's `warmup` returns
        def __init__(self, types: str) -> None:
            self.src, self.types = SimpleNamespace(signature={"x": types}), types

        @property
        def run(self) -> object:
            inside[self.types].append(self)
            sleep(0.05)
            together.append({types: len(those) for types, those in inside.items()})
            inside[self.types].remove(self)
            return object()

    launches = [
        Launch(SimpleNamespace(warmup=lambda of=of, **_: Compiled(of)), (), {})
        for of in ("one", "other", "one", "other", "one")
    ]
    threads = [
        threading.Thread(target=kernels_ahead.compile_launch, args=(launch, torch.device("cpu")))
        for launch in launches
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(together) == len(launches)
    assert max(count for counts in together for count in counts.values()) == 1
    assert {"one": 1, "other": 1} in together  # launchers of other types do not wait


def test_settings_of_the_cpu_and_of_the_user_stay(monkeypatch):
    with compiling_kernels(CPU) as settings:
        assert not settings
    monkeypatch.setattr("torch._inductor.config.joint_custom_pre_pass", lambda graph: None)
    with compiling_kernels(CUDA) as settings:
        assert not settings


# Ops run on tensors of the CPU, with a driver of an H100 that compiles kernels but runs none.
COMPILE = """
    import json
    from types import SimpleNamespace

    import torch
    import triton
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._pytree import tree_map_only
    from triton.backends.compiler import GPUTarget

    from fastlora.ops.attention import flash
    from fastlora.ops.launch import implementation, launches_of
    from fastlora.ops.linear import low_rank_gradients
    from fastlora.runtime.kernels_ahead import start_compiling

    properties = {"max_shared_mem": 232448}
    ran, compiled = [], []
    triton.runtime.driver.set_active(SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        launcher_cls=lambda source, metadata: lambda *_: ran.append(source.name),
        utils=SimpleNamespace(
            load_binary=lambda *_: (1, 1, 0, 0, 1024),
            get_device_properties=lambda device: properties,
        ),
    ))
    triton.knobs.compilation.listener = lambda **of: compiled.append(of["src"].name)

    x = lambda *shape: torch.zeros(shape, dtype=torch.bfloat16)
    rows = x(64, 256 + 48)
    calls = [  # dy begins at a multiple of 16 bytes, then not; then t is a multiple of 16, then not
        ("fastlora::low_rank_gradients", rows[:, 16:], [x(256, 16)], x(64, 16), [0], [2.0]),
        ("fastlora::low_rank_gradients", rows[:, 3:], [x(256, 16)], x(64, 16), [0], [2.0]),
        *(
            ("fastlora::flash_attention", x(1, 2, t, 16), x(1, 1, t, 16), x(1, 1, t, 16), None)
            for t in (64, 41)
        ),
    ]
    launches = []
    for op, *args in calls:
        with FakeTensorMode() as mode:
            fake = tree_map_only(torch.Tensor, mode.from_tensor, args)
            launches += launches_of(implementation(op), *fake)
    assert not ran and not compiled
    for thread in start_compiling(launches, torch.device("cpu")):
        thread.wait()
    before = sorted(compiled)
    for op, *args in calls:
        implementation(op)(*args)
    print(json.dumps([before, len(compiled), ran]))
"""


def test_a_launch_compiles_nothing_after_its_kernel_was_compiled_ahead(tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", textwrap.dedent(COMPILE)]
    ran = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert not ran.returncode, ran.stderr[-3000:]
    ahead, all_compiled, launched = json.loads(ran.stdout.splitlines()[-1])
    # dx_a and dB are summed by one kernel for both calls of low_rank_gradients.
    assert ahead == ["_forward_kernel", "_forward_kernel", "_parts_kernel", "_parts_kernel",
                     "_sums_kernel"]  # fmt: skip
    assert all_compiled == len(ahead)
    assert launched == ["_parts_kernel", "_sums_kernel"] * 2 + ["_forward_kernel"] * 2
