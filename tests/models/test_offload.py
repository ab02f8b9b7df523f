"""recompute="offload": the tensors that wait in host memory, and the matrices that are cast again.

On the CPU copies are made at once. tests/gpu shows that on a GPU they overlap with compute.
"""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

import fastlora
from fastlora import functional as FL
from fastlora.models import decoder
from fastlora.models.params import LoRA
from fastlora.ops.cast import cast, matrices_of
from fastlora.runtime import host_offload
from fastlora.runtime.host_offload import Copies, HostStash
from oracles.pairs import adapted
from oracles.trees import relative_error, same_bits, token_ids


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


def test_matrices_that_needed_no_cast_are_left_to_autograd():
    trained, copies = matrices()
    kept = Copies(trained, [trained[0], *copies[1:]])
    assert kept.index(trained[0]) is None and kept.index(copies[1]) == 0
    assert Copies(trained, trained).index(trained[0]) is None


def test_writing_to_the_adapter_before_the_backward_pass_is_an_error():
    trained, copies = matrices()
    kept = Copies(trained, copies)
    trained[1].add_(1)
    with pytest.raises(RuntimeError, match="between the forward and the backward"):
        kept.again(0)


def test_gradients_are_the_same_with_copies_made_again():
    """The graph holds no cast matrix, as with the stash."""
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
def test_the_first_layers_input_is_not_a_leaf_of_the_graph(pair, region_backend):
    """Compiled, the first layer's input requires a gradient, which is then dropped. As a leaf it
    would be kept to the end of the backward pass. The adapter's gradients are the eager ones."""
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


@pytest.fixture
def stashes(monkeypatch):
    """The stashes of all later forward passes on the CPU, which then send tensors of any size."""
    made = []

    def stash(spec, x):
        made.append(HostStash(x.device))
        return made[-1]

    monkeypatch.setattr(decoder, "_stash", stash)
    monkeypatch.setattr(host_offload, "_MIN_BYTES", 0)
    return made


def loss_and_graph(model, seed=3):
    """The loss of a batch with dropout, and the tensors to differentiate it by."""
    ids = token_ids(2, 9)
    model = model.for_training()
    batch = {"input_ids": ids, "labels": ids}
    loss = FL.loss(model.adapter, model.base, model.spec, batch, seed=seed)
    return loss, tree_leaves(model.adapter)


LEVELS = ["full", "attention", "mlp", "selective", "none"]


@pytest.mark.compile
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("level", LEVELS)
def test_every_kept_activation_can_wait_on_the_host(
    level, dtype, pair, stashes, monkeypatch, region_backend
):
    """Gradients have the same bits as without a stash, and all kept tensors are sent."""
    region_backend("aot_eager")
    model = adapted(pair("llama2", dtype).model, r=4, lora_dropout=0.1)
    model = model.with_spec(compile=True, recompute="offload")
    monkeypatch.setattr(decoder, "offload_levels", lambda c, *_: (level,) * c.num_hidden_layers)
    loss, leaves = loss_and_graph(model)
    found = torch.autograd.grad(loss, leaves)
    (stash,) = stashes
    kept = [len(parcel) for parcel in stash.host]
    assert len({*kept}) == 1 and kept[0] >= {"full": 1, "attention": 3, "mlp": 6}.get(level, 8)
    monkeypatch.setattr(decoder, "_stash", lambda spec, x: None)
    monkeypatch.setattr(decoder, "layer_levels", lambda c, _: (level,) * c.num_hidden_layers)
    assert same_bits(found, torch.autograd.grad(*loss_and_graph(model)))


@pytest.mark.compile
def test_a_retained_graph_can_be_differentiated_twice(pair, stashes, region_backend):
    region_backend("aot_eager")
    model = adapted(pair("llama2").model, r=4).with_spec(compile=True, recompute="offload")
    loss, leaves = loss_and_graph(model)
    first, again = (torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2))
    assert same_bits(first, again) and stashes[0].host[0]


def stashed(x, *saved):
    """(the stash of a layer that saves x and `saved`, the tensors that its backward pass gets)."""
    stash, given = HostStash(x.device), []

    class Layer(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x, *saved)
            return x + 1

        @staticmethod
        def backward(ctx, dy):
            given.extend(ctx.saved_tensors)
            return dy

    y = stash.run(Layer.apply, x.requires_grad_(), {"base": [saved[0], None]}, Copies([], []))
    y.sum().backward()
    return stash, given


def test_base_small_and_sliced_tensors_stay_and_sent_ones_return_unchanged(monkeypatch):
    monkeypatch.setattr(host_offload, "_MIN_BYTES", 64)
    base, turned, small = torch.rand(9, 9), torch.rand(6, 4).t(), torch.ones(3)
    slice = torch.rand(9, 9)[:, :4]
    saved = (base, base[:8], turned, turned, small, slice)
    stash, given = stashed(torch.rand(5, 5), *saved)
    assert [x.shape for x in stash.host[0]] == [(5, 5), (4, 6)]  # one copy, though saved twice
    for before, after in zip(saved, given[1:], strict=True):
        assert torch.equal(before, after) and before.stride() == after.stride()
        travelled = before is turned
        assert (before.data_ptr() == after.data_ptr()) != travelled
