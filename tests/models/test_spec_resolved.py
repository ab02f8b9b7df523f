"""Spec.resolved says what runs: compiled regions, recomputation and kernels, or none of them."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import jvp, linearize, vmap
from torch.utils._pytree import tree_map

import fastlora
from fastlora import functional as FL
from fastlora.models.spec import Spec
from oracles.batches import batch_of

grad = torch.func.grad
ONE = torch.ones(1)
BATCH = batch_of(1, 4)


def choices(spec: Spec) -> tuple:
    return spec.recompute, spec.compile, spec.kernels


def test_outside_of_transforms_auto_is_resolved(tiny):
    spec = replace(tiny.spec, recompute="full", compile="auto", kernels="auto")
    assert choices(spec.resolved("cpu")) == ("full", False, "torch")
    compiled = replace(spec, compile=True, recompute=0.5)
    assert choices(compiled.resolved(torch.device("cpu"))) == (0.5, True, "torch")
    assert spec.resolved("cpu").config is spec.config


def under_transforms(spec: Spec) -> dict[str, Spec]:
    """The spec resolved inside of each transform."""
    found: dict[str, Spec] = {}

    def seen(name: str) -> Any:
        def fn(x: torch.Tensor) -> torch.Tensor:
            found[name] = spec.resolved("cpu")
            return x.sum()

        return fn

    grad(seen("grad"))(ONE)
    vmap(seen("vmap"))(ONE)
    jvp(seen("jvp"), (ONE,), (ONE,))
    linearize(seen("linearize"), ONE)
    with forward_ad.dual_level():
        seen("forward_ad")(ONE)
    return found


def test_under_every_transform_nothing_is_compiled_recomputed_or_fused(tiny):
    spec = replace(tiny.spec, recompute="full", compile=True, kernels="auto")
    found = under_transforms(spec)
    assert len(found) == 5
    assert {choices(spec) for spec in found.values()} == {("none", False, "torch")}


def test_wrong_devices_and_impossible_kernels_are_refused(tiny, monkeypatch):
    with pytest.raises(ValueError, match="device='nonsense'"):
        tiny.spec.resolved("nonsense")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    triton = replace(tiny.spec, kernels="triton")
    with pytest.raises(ValueError, match="needs a CUDA GPU"):
        triton.resolved("cpu")
    found = []
    vmap(lambda x: (found.append(triton.resolved("cpu").kernels), x)[1])(ONE)
    assert found == ["torch"]


def test_what_it_says_about_recomputation_is_what_runs(tiny, monkeypatch):
    calls = []
    real = fastlora.models.layer.checkpoint
    monkeypatch.setattr(
        "fastlora.models.layer.checkpoint", lambda *a, **k: (calls.append(1), real(*a, **k))[1]
    )
    spec = replace(tiny.spec, recompute="full")
    loss = lambda a: FL.loss(a, tiny.base, spec, BATCH)
    grad(loss)(tiny.adapter)
    assert not calls
    fastlora.value_and_grad(loss)(tiny.adapter)
    assert len(calls) == 2  # layers


@pytest.mark.compile
def test_what_it_says_about_compilation_is_what_runs(shallow, region_backend):
    graphs = []
    region_backend(lambda graph, inputs: (graphs.append(graph), graph.forward)[1])
    spec = replace(shallow.spec, compile=True, recompute="none")
    loss = lambda a: FL.loss(a, shallow.base, spec, BATCH)
    stack = tree_map(lambda x: torch.stack([x, x]), shallow.adapter)
    vmap(grad(loss))(stack)
    assert not graphs
    with torch.no_grad():
        loss(shallow.adapter)
    assert graphs and spec.resolved("cpu").compile is True


@pytest.mark.compile
def test_inside_the_caller_s_own_compile_no_region_is_compiled(tiny, fresh_dynamo):
    spec = replace(tiny.spec, compile=True)
    fn = lambda x: x + float(spec.resolved("cpu").compile)
    assert torch.compile(fn, backend="eager")(ONE).item() == 1.0
