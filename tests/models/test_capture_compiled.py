"""Capture and add in compiled regions: the eager values, and no other graphs than needed."""

from dataclasses import replace

import pytest
import torch
from torch.utils._pytree import tree_map

import fastlora
from fastlora import functional as FL
from fastlora.models.capture import place_names
from oracles.pairs import adapted
from oracles.trees import relative_error, same_bits, token_ids

IDS = token_ids(2, 9)


def trees(model):
    return model.adapter, model.base, model.spec


def step(model, capture, add, **how):
    """(value, gradients by adapter and added vectors) of a function of logits and captured."""

    def value(tree):
        adapter, vectors = tree
        logits, found = FL.forward(
            adapter, model.base, model.spec, IDS, capture=capture, add=vectors, seed=3, **how
        )
        return (logits**2).mean() + sum((x**3).mean() for x in found.values())

    return fastlora.value_and_grad(value)((model.adapter, add))


@pytest.mark.compile
@pytest.mark.parametrize("policy", ["none", "selective", 0.3, "full"])
def test_compiled_layers_give_the_eager_values(policy, shallow, region_backend):
    """0.3 is the level "mlp"."""
    region_backend("aot_eager")
    names = place_names(1)
    add = dict.fromkeys(names, 0.1 + torch.arange(16, dtype=torch.float64) / 16)
    model = shallow.with_spec(recompute=policy)
    run = lambda compile: step(model.with_spec(compile=compile), names, add)
    assert relative_error(run(True), run(False)) < 1e-9


@pytest.mark.compile
def test_a_stack_of_adapters_is_captured_from_compiled_layers(shallow, region_backend):
    region_backend("aot_eager")
    base = fastlora.disable(shallow)
    models = [adapted(base, seed=i, r=2) for i in range(2)]
    stack, spec = FL.stack([m.with_spec(compile=True) for m in models])
    which = torch.tensor([1, 0])
    how = dict(capture=place_names(1), add={"layers.0.mlp.out": torch.ones(2, 1, 16).double()})
    _, found = FL.forward(stack, base.base, spec, IDS, adapter_ids=which, **how)
    for i, model in enumerate(models):
        expected = model(IDS, **how)[1]
        for place, x in found.items():
            assert relative_error(x[which == i], expected[place][which == i]) < 1e-9


@pytest.mark.compile
def test_who_captures_nothing_runs_the_same_graphs(tiny, region_backend):
    """Another graph is made for the layer inside of which a tensor is captured, and only for it."""
    made = []

    def keep(module, _):
        made.append(str(module.code))
        return module.forward

    region_backend(keep)
    model = tiny.with_spec(compile=True, recompute="none")
    counts = []

    def count(**how):
        with torch.no_grad():
            FL.forward(*trees(model), IDS, **how)
        counts.append(len(made))

    count()
    plain = [*made]
    count(
        capture=["embed", "layers.0.in", "layers.0.out", "norm"],
        add={"layers.0.out": IDS.double()[:, :, None]},
    )
    assert counts == [len(plain)] * 2
    count(capture=["layers.0.mlp.out"])
    assert counts[-1] == len(plain) + 1
    count(capture=["layers.1.mlp.out"])  # the layers have equal settings
    count()
    assert counts[-2:] == [len(plain) + 1] * 2


@pytest.mark.compile
def test_inductor_gives_the_same_bits_with_capture(shallow, fresh_dynamo):
    """Of the logits, in float32 on the CPU."""
    base = fastlora.disable(shallow)
    narrow = tree_map(lambda x: x.float(), base.base)
    model = adapted(replace(base, base=narrow), r=2).with_spec(compile=True)
    with torch.no_grad():
        plain = FL.forward(*trees(model), IDS)
        logits, found = FL.forward(*trees(model), IDS, capture=place_names(1))
    assert same_bits(logits, plain)
    eager = FL.forward(*trees(model.with_spec(compile=False)), IDS, capture=place_names(1))
    assert relative_error((logits, found), eager) < 1e-5


@pytest.mark.compile
def test_the_callers_torch_compile_traces_capture(shallow):
    def run(v):
        how = dict(capture=["layers.0.attn.out", "norm"], add={"layers.0.in": v})
        return FL.forward(*trees(shallow), IDS, **how)

    v = torch.ones(16, dtype=torch.float64)
    with torch.no_grad():
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        assert relative_error(compiled(v), run(v)) < 1e-12
