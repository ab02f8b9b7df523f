"""Triton kernels are compiled while Inductor compiles the graph that launches them."""

import importlib
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor import compile_fx

import fastlora
from fastlora import functional as FL
from fastlora.ops import launch as launching
from fastlora.ops.launch import Launch, launch
from fastlora.runtime import compiled, kernels_ahead
from oracles.pairs import adapted
from oracles.trees import token_ids

pytest.importorskip("triton", reason="the kernels' tests need triton: requirements-test.txt has it")

ROOT = Path(__file__).parents[2]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
KERNELS = (
    "attention.flash_kernel",
    "linear.low_rank_gradients_kernel",
    "linear.masked_lora_kernel",
    "swiglu.swiglu_kernel",
)


@pytest.fixture
def launched(monkeypatch) -> list[Launch]:
    """A list that gets each launch of a kernel that trained layers use."""
    found: list[Launch] = []

    def note(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        if launching._found.get() is None:
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
def planned(monkeypatch) -> list[Launch]:
    """A list that gets what would be compiled ahead. CPU graphs count as CUDA ones."""
    found: list[Launch] = []

    @contextmanager
    def compiling(device: torch.device) -> Iterator[dict[str, Any]]:
        yield kernels_ahead._settings(
            lambda graph: found.extend(kernels_ahead.graph_launches(graph))
        )

    monkeypatch.setattr(compiled, "compiling_kernels", compiling)
    return found


@pytest.fixture
def eager_inductor(monkeypatch, fresh_dynamo) -> None:
    """Inductor runs its passes, but graphs run as they are: its C++ takes most of the time."""
    eager = partial(compile_fx.compile_fx, inner_compile=lambda graph, inputs, **_: graph)
    monkeypatch.setattr(compile_fx, "compile_fx", eager)


@pytest.mark.compile
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_every_launch_of_a_layer_is_known_before_inductor_compiles_it(
    dropout, pair, planned, launched, always_supported, eager_inductor
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
    assert {x.key() for x in planned} == {x.key() for x in launched}


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
