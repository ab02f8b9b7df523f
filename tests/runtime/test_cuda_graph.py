"""cuda_graph=True on the CPU: which tensors are copied or kept, and when a recording is made.

Here the function is run again on the recorded inputs to replay a graph. tests/gpu/test_steps.py
shows that on a GPU the bits are the same, and that no step waits for the host.
"""

import gc
import weakref
from contextlib import contextmanager

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

import fastlora
from fastlora import functional as FL
from fastlora.runtime import cuda_graph
from fastlora.runtime.cuda_graph import CUDAGraphed
from fastlora.runtime.tree import leaves, with_leaves
from oracles.pairs import adapted
from oracles.trees import same_bits, token_ids


def affine(tree, x, factor=2.0):
    return {"y": tree["a"] * x * factor + tree["b"][0], "x": x}


def drawn(seed=0):
    gen = torch.Generator().manual_seed(seed)
    new = lambda: torch.randn(3, generator=gen)
    return {"a": new(), "b": (new(),)}, new()


def test_the_second_call_is_recorded_and_later_ones_replayed(captures):
    run, (tree, _) = CUDAGraphed(affine), drawn()
    for i in range(5):
        _, x = drawn(i)
        tree["a"].add_(1)  # as an optimiser does
        found = run(tree, x)
        assert same_bits([*leaves(found)], [*leaves(affine(tree, x))])
        assert len(captures) == (i > 0)


def test_a_first_call_that_raised_does_not_count(captures):
    """It has not asked for all of the pinned memory that a recording takes from its sizes."""
    errors = [MemoryError()]

    def fails_once(x):
        if errors:
            raise errors.pop()
        return {"y": x * 2}

    run, x = CUDAGraphed(fails_once), torch.ones(3)
    with pytest.raises(MemoryError):
        run(x)
    for count in (0, 1, 1):
        assert torch.equal(run(x)["y"], x * 2)
        assert len(captures) == count


def test_results_belong_to_the_caller(captures):
    run, (tree, x) = CUDAGraphed(affine), drawn()
    kept = [run(tree, x + i) for i in range(4)]
    assert [torch.equal(k["x"], x + i) for i, k in enumerate(kept)] == [True] * 4
    before = x.clone()
    kept[-1]["x"].zero_()
    assert torch.equal(x, before)


def test_an_input_that_moved_once_is_copied_from_then_on(captures):
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
def test_other_arguments_make_another_recording(captures, other):
    run, (tree, x) = CUDAGraphed(affine), drawn()
    for _ in range(3):
        run(tree, x)
    args, kwargs = other(tree, x)
    for count in (1, 2, 2):
        found = run(*args, **kwargs)
        assert len(captures) == count
        assert torch.equal(found["y"], affine(*args, **kwargs)["y"])


def test_at_most_eight_recordings_are_kept(captures):
    run, (tree, x) = CUDAGraphed(affine), drawn()
    for i in range(30):
        run(tree, x, float(i))
    assert len(run.calls) == 8 and not captures  # no value came twice


def test_the_memory_of_an_old_batch_is_freed(captures):
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


def test_arguments_that_are_not_hashable_are_refused(captures):
    tree, x = drawn()
    with pytest.raises(ValueError, match="a bytearray, which cannot be compared"):
        CUDAGraphed(affine)(tree, x, bytearray(b"a"))


def test_a_function_that_cannot_be_recorded_raises_an_error_with_the_cure(monkeypatch):
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


def test_a_tree_with_other_leaves_keeps_its_containers():
    tree = {"a": [1, (2, 3)], "b": ()}
    assert [*leaves(tree)] == [1, 2, 3]
    assert with_leaves(tree, iter("xyz")) == {"a": ["x", ("y", "z")], "b": ()}


class Pools:
    """torch.cuda.CUDAGraph and torch.cuda.graph without CUDA: which pools recordings ask for."""

    def __init__(self):
        self.asked, self.live = [], set()
        pools = self

        class Graph:
            def __init__(self):
                self.number = len(pools.asked)

            def replay(self):
                pass

            def pool(self):
                return self.number

            def __del__(self):
                pools.live.discard(self.number)

        self.Graph = Graph

    @contextmanager
    def graph(self, graph, pool):
        assert pool is None or self.live, "torch's allocator: no recording uses this pool"
        self.asked.append(pool)
        self.live.add(graph.number)
        yield


def test_a_pool_is_shared_only_while_a_recording_uses_it(monkeypatch):
    pools = Pools()
    monkeypatch.setattr(cuda_graph, "_check_devices", lambda given: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", pools.Graph)
    monkeypatch.setattr(torch.cuda, "graph", pools.graph)
    run, (tree, x) = CUDAGraphed(affine), drawn()
    for _ in range(3):  # recorded with x where it is
        run(tree, x)
    x = drawn(1)[1]
    for _ in range(3):  # x moved: the only recording is dropped, and another one made
        run(tree, x)
    for _ in range(3):
        run(tree, x, 3.0)  # a second recording beside the first
    assert pools.asked == [None, None, 1]
