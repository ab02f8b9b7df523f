"""cuda_graph=True on the CPU: what is copied, held and recorded anew. A graph is played by the
function run again on the recorded inputs; that CUDA's own gives the same bits, and no step waits
for the host, is for a GPU to show (scripts/gpu_check.py)."""

import gc
import weakref

import pytest
import torch
from conftest import adapted, same_bits, token_ids
from torch.utils._pytree import tree_leaves, tree_map

import fastlora
from fastlora import functional as FL
from fastlora.runtime import cuda_graph
from fastlora.runtime.cuda_graph import CUDAGraphed
from fastlora.runtime.tree import leaves, with_leaves


def affine(tree, x, factor=2.0):
    return {"y": tree["a"] * x * factor + tree["b"][0], "x": x}


def drawn(seed=0):
    gen = torch.Generator().manual_seed(seed)
    new = lambda: torch.randn(3, generator=gen)
    return {"a": new(), "b": (new(),)}, new()


def test_the_second_call_is_recorded_and_later_ones_played(captures):
    run, (tree, _) = CUDAGraphed(affine), drawn()
    for i in range(5):
        _, x = drawn(i)
        tree["a"].add_(1)  # as an optimiser does
        found = run(tree, x)
        assert same_bits([*leaves(found)], [*leaves(affine(tree, x))])
        assert len(captures) == (i > 0)


def test_results_are_the_callers_own(captures):
    run, (tree, x) = CUDAGraphed(affine), drawn()
    kept = [run(tree, x + i) for i in range(4)]
    assert [torch.equal(k["x"], x + i) for i, k in enumerate(kept)] == [True] * 4
    before = x.clone()
    kept[-1]["x"].zero_()
    assert torch.equal(x, before)


def test_what_moves_once_is_copied_from_then_on(captures):
    run, (tree, x) = CUDAGraphed(affine), drawn()
    for _ in range(3):
        run(tree, x)
    assert len(captures) == 1
    for i in range(1, 4):
        tree, x = drawn(i)
        found = run(tree, x)
        assert torch.equal(found["y"], affine(tree, x)["y"])
    assert len(captures) == 2  # once more for all that moved


@pytest.mark.parametrize(
    "other",
    [
        lambda tree, x: ((tree, x, 3.0), {}),
        lambda tree, x: ((tree, x.double()), {}),
        lambda tree, x: ((tree, x), {"factor": 2.0}),
        lambda tree, x: (({"b": tree["b"], "a": tree["a"]}, x), {}),
        lambda tree, x: ((tree, x[None]), {}),
    ],
)
def test_other_arguments_are_another_recording(captures, other):
    run, (tree, x) = CUDAGraphed(affine), drawn()
    for _ in range(3):
        run(tree, x)
    args, kwargs = other(tree, x)
    for count in (1, 2, 2):
        found = run(*args, **kwargs)
        assert len(captures) == count
        assert torch.equal(found["y"], affine(*args, **kwargs)["y"])


def test_few_recordings_are_kept(captures):
    run, (tree, x) = CUDAGraphed(affine), drawn()
    for i in range(30):
        run(tree, x, float(i))
    assert len(run.calls) == 8 and not captures  # no value came twice


def test_a_batch_is_let_go(captures):
    run, (tree, x) = CUDAGraphed(affine), drawn()
    first = weakref.ref(x)
    run(tree, x)
    for i in range(1, 4):
        x = drawn(i)[1]
        run(tree, x)
    gc.collect()
    assert first() is None


def test_gradients_are_those_of_the_plain_function(pair, captures):
    model = adapted(pair("llama2").model, r=4, lora_dropout=0.1)
    plain = fastlora.value_and_grad(FL.loss)
    played = fastlora.value_and_grad(FL.loss, cuda_graph=True)
    adapter = model.adapter
    for i in range(4):
        ids = token_ids(2, 7, seed=i)
        args = (adapter, model.base, model.spec, {"input_ids": ids, "labels": ids})
        seed = torch.tensor(i)
        found, expected = played(*args, seed=seed), plain(*args, seed=seed)
        assert same_bits(tree_leaves(found), tree_leaves(expected))
        assert type(found[1]["layers"][0]["q_proj"]) is type(adapter["layers"][0]["q_proj"])
        adapter = tree_map(lambda x, g: x - 0.1 * g, adapter, found[1])
    assert len(captures) == 1


def test_tensors_on_the_cpu_are_refused():
    tree, x = drawn()
    with pytest.raises(ValueError, match="tensors on cpu"):
        CUDAGraphed(affine)(tree, x)


def test_what_cannot_be_compared_is_refused(captures):
    tree, x = drawn()
    with pytest.raises(ValueError, match="a bytearray, which cannot be compared"):
        CUDAGraphed(affine)(tree, x, bytearray(b"a"))


def test_what_cannot_be_recorded_is_told(monkeypatch):
    class Refuses:
        def __enter__(self):
            raise RuntimeError("operation not permitted when stream is capturing")

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(cuda_graph, "_check_devices", lambda given: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", lambda *a, **k: Refuses())
    run, (tree, x) = CUDAGraphed(affine), drawn()
    run(tree, x)
    with pytest.raises(RuntimeError, match="must not wait for the GPU"):
        run(tree, x)


def test_a_tree_with_other_leaves_is_of_the_same_kind():
    tree = {"a": [1, (2, 3)], "b": ()}
    assert [*leaves(tree)] == [1, 2, 3]
    assert with_leaves(tree, iter("xyz")) == {"a": ["x", ("y", "z")], "b": ()}
