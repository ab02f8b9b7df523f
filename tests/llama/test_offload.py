"""What recompute="offload" makes again: the adapter's matrices in the products' dtype.

The layer inputs' way to the host and back needs a GPU: scripts/gpu_check.py.
"""

import pytest
import torch
from conftest import adapted, relative_error, same_bits, token_ids
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

import fastlora
from fastlora import functional as FL
from fastlora.llama.offload import Copies
from fastlora.llama.params import LoRA
from fastlora.ops.cast import cast, matrices_of


def matrices():
    gen = torch.Generator().manual_seed(0)
    trained = [torch.randn(shape, generator=gen) for shape in ((4, 6), (5, 4), (3, 3))]
    return trained, [x.bfloat16() for x in trained]


def test_copies_are_made_again_with_the_same_bits():
    trained, copies = matrices()
    kept = Copies(trained, copies)
    assert [kept.index(x) for x in copies] == [0, 1, 2]
    assert kept.index(trained[0]) is None and kept.index(copies[0][:2]) is None
    assert kept.index(copies[2].t()) is None  # square: of the same address and shape
    for _ in range(2):  # a graph that is kept is walked again
        assert same_bits([kept.again(i) for i in (2, 0, 1)], [copies[i] for i in (2, 0, 1)])


def test_what_is_no_copy_is_left_to_autograd():
    trained, copies = matrices()
    kept = Copies(trained, [trained[0], *copies[1:]])
    assert kept.index(trained[0]) is None and kept.index(copies[1]) == 0
    assert Copies(trained, trained).index(trained[0]) is None


def test_an_adapter_that_was_written_to_in_between_is_told():
    trained, copies = matrices()
    kept = Copies(trained, copies)
    trained[1].add_(1)
    with pytest.raises(RuntimeError, match="between the forward and the backward"):
        kept.again(0)


def test_a_graph_works_with_copies_made_again():
    """As the stash does it: the same gradients, and no cast matrix in the graph."""
    trained, _ = matrices()
    leaves = [x.requires_grad_() for x in trained]
    narrow = cast({"q_proj": LoRA(*leaves[:2])}, torch.bfloat16)
    kept = Copies(leaves[:2], matrices_of(narrow))
    packed = []

    def pack(saved):
        packed.append(kept.index(saved))
        return saved if packed[-1] is None else packed[-1]

    def run():
        a, b = narrow["q_proj"]
        return (a * a).sum() + (b * b * b).sum()

    with saved_tensors_hooks(pack, lambda p: kept.again(p) if isinstance(p, int) else p):
        found = torch.autograd.grad(run(), leaves[:2])
    assert {0, 1} <= {*packed}
    narrow = cast({"q_proj": LoRA(*leaves[:2])}, torch.bfloat16)
    assert same_bits(found, torch.autograd.grad(run(), leaves[:2]))


@pytest.mark.compile
def test_no_leaf_of_the_embedding_is_kept(pair, region_backend):
    """Compiled, the first layer's input asks for a gradient that nobody gets; it is no leaf, which
    the graph would keep to its end, and the adapter's gradients are those of eager torch."""
    region_backend("aot_eager")
    model = adapted(pair("llama2").model, r=4)
    ids = token_ids(2, 9)
    batch = {"input_ids": ids, "labels": ids}
    run = lambda m: fastlora.value_and_grad(FL.loss)(m.adapter, m.base, m.spec, batch)[1]
    assert relative_error(run(model.with_spec(compile=True)), run(model)) <= 1e-5
    trained = model.for_training()
    loss = trained.with_spec(compile=True).loss(batch)
    loss.backward()
    grads = [x.grad for x in tree_leaves(trained.adapter)]
    assert relative_error(grads, tree_leaves(run(model))) <= 1e-5
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [n for n, _ in node.next_functions]
    leaves = [n.variable for n in seen if type(n).__name__ == "AccumulateGrad"]
    assert all(x.dim() < 3 for x in leaves)
