"""token_logprobs(entropy=True): the entropy of each next-token distribution, with its gradient."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_structure, tree_unflatten

import fastlora
from fastlora import functional as FL
from fastlora.model import Model
from fastlora.ops.loss import linear_cross_entropy
from fastlora.ops.loss.entropy import chunked_logprobs_and_entropy, logprobs_and_entropy
from oracles.batches import batch_of
from oracles.pairs import adapted
from oracles.trees import relative_error, stacked, token_ids

BATCH = batch_of(3, 8)
IDS, LABELS = BATCH["input_ids"], BATCH["labels"]


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of four rows of 24 logits."""
    monkeypatch.setattr(linear_cross_entropy, "_CHUNK_ELEMENTS", 4 * 24)


def plain(model: Model, adapter, seed) -> tuple[Tensor, Tensor]:
    """The same from whole logits."""
    logits = FL.forward(adapter, model.base, model.spec, IDS, seed=seed)[:, :-1]
    logp, following = logits.log_softmax(-1), LABELS[:, 1:]
    picked = logp.gather(-1, following.clamp(min=0)[..., None])[..., 0]
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    pad = lambda x: F.pad(torch.where(following == -100, 0.0, x), (1, 0))
    return pad(picked), pad(entropy)


def ours(model: Model, adapter, seed) -> tuple[Tensor, Tensor]:
    trees = adapter, model.base, model.spec
    return FL.token_logprobs(*trees, IDS, LABELS, seed=seed, entropy=True)


def weighted(pair: tuple[Tensor, Tensor]) -> Tensor:
    """A number that depends on every log-probability and entropy in its own way."""
    gen = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=gen, dtype=torch.float64) for x in pair]
    return torch.stack([(w.to(x) * x).sum() for w, x in zip(weights, pair, strict=True)]).sum()


HEADS = {
    "frozen": {},
    "LoRA": dict(target_modules=["q_proj", "lm_head"]),
    "copy": dict(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "rows": dict(target_modules=["q_proj"], trainable_token_indices={"lm_head": [3, 5]}),
}


@pytest.mark.parametrize("kind", HEADS)
def test_values_and_gradients_equal_those_of_whole_logits(kind, tiny, small_chunks):
    model = adapted(fastlora.disable(tiny), r=2, lora_dropout=0.2, **HEADS[kind])
    values = [x.detach() for x in ours(model, model.adapter, 3)]
    assert relative_error(values, [x.detach() for x in plain(model, model.adapter, 3)]) < 1e-10
    assert not values[1][:, 0].any() and not values[1][LABELS == -100].any()
    assert (values[1][:, 1:][LABELS[:, 1:] != -100] > 0).all()
    step = lambda fn: fastlora.value_and_grad(lambda a: weighted(fn(model, a, 3)))(model.adapter)
    assert relative_error(step(ours), step(plain)) < 1e-10


def test_float32_and_bfloat16_err_no_more_than_whole_logits(pair):
    model = adapted(pair("llama2").model, r=2)
    step = lambda fn: fastlora.value_and_grad(lambda a: weighted(fn(model, a, None)))(model.adapter)
    assert relative_error(step(ours), step(plain)) < 2e-5
    narrow = adapted(pair("llama2", torch.bfloat16).model, r=2)
    logp, entropy = ours(narrow, narrow.adapter, None)
    assert logp.dtype == entropy.dtype == torch.float32
    logits = narrow(IDS).float()[:, :-1]
    expected = torch.distributions.Categorical(logits=logits).entropy()
    trained = LABELS[:, 1:] != -100
    torch.testing.assert_close(entropy[:, 1:][trained], expected[trained], rtol=1e-4, atol=1e-4)


def test_log_probabilities_do_not_depend_on_the_entropy(tiny):
    trees = tiny.adapter, tiny.base, tiny.spec
    logp = FL.token_logprobs(*trees, IDS, LABELS, seed=3)
    torch.testing.assert_close(ours(tiny, tiny.adapter, 3)[0], logp, rtol=1e-13, atol=1e-13)


def test_the_entropy_alone_has_a_gradient(tiny):
    """And the log-probabilities alone have theirs."""
    for i in (0, 1):
        one = lambda fn, i=i: fastlora.value_and_grad(lambda a: fn(tiny, a, 3)[i].sum())
        assert relative_error(one(ours)(tiny.adapter), one(plain)(tiny.adapter)) < 1e-10


def test_bounds_of_the_entropy():
    uniform, certain = torch.zeros(1, 11), F.one_hot(torch.tensor([4]), 11) * 1e4
    labels = torch.tensor([4])
    for logits, expected in ((uniform, math.log(11)), (certain.float(), 0.0)):
        _, entropy = logprobs_and_entropy(logits, labels)
        assert abs(float(entropy) - expected) < 1e-6


def test_transforms_take_the_reference(tiny, small_chunks):
    value = lambda a: weighted(ours(tiny, a, 3))
    hot = fastlora.value_and_grad(value)(tiny.adapter)[1]
    assert relative_error(torch.func.grad(value)(tiny.adapter), hot) < 1e-10
    tangents = tree_map(torch.ones_like, tiny.adapter)
    _, slope = torch.func.jvp(value, (tiny.adapter,), (tangents,))
    assert relative_error(slope, torch.stack([x.sum() for x in tree_leaves(hot)]).sum()) < 1e-10


@pytest.mark.parametrize("kind", [{}, {"use_dora": True}], ids=["grouped", "row by row"])
def test_a_stack_gives_each_rows_entropy(kind, tiny):
    base, which = fastlora.disable(tiny), torch.tensor([1, 0, 1])
    models = [adapted(base, seed=i, r=2, **kind) for i in range(2)]
    args = stacked([m.adapter for m in models]), base.base, models[0].spec, IDS, LABELS
    pair = FL.token_logprobs(*args, adapter_ids=which, entropy=True)
    for i, model in enumerate(models):
        alone = ours(model, model.adapter, None)
        for x, y in zip(pair, alone, strict=True):
            assert relative_error(x[which == i], y[which == i]) < 1e-11


def test_no_tensor_is_larger_than_a_chunk_of_logits(monkeypatch):
    monkeypatch.setattr(linear_cross_entropy, "_CHUNK_ELEMENTS", 1024)
    gen = torch.Generator().manual_seed(0)
    h, weight = torch.randn(128, 4, generator=gen), torch.randn(100, 4, generator=gen)
    labels, largest = torch.randint(100, (128,), generator=gen), []

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **kwargs or {})
            largest.extend(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor))
            return out

    with Largest():
        h.requires_grad_()
        pair = chunked_logprobs_and_entropy(F.linear, (h,), [weight], labels, 100)
        torch.autograd.grad(pair[0].sum() + pair[1].sum(), h)
    assert max(largest) <= 1024 < 128 * 100


def test_a_second_derivative_is_refused(tiny):
    leaves = [x.detach().requires_grad_() for x in tree_leaves(tiny.adapter)]
    adapter = tree_unflatten(leaves, tree_structure(tiny.adapter))
    value = ours(tiny, adapter, None)[1].sum()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(value, leaves, create_graph=True)


@pytest.mark.compile
def test_compiled_regions_give_the_eager_values(shallow, region_backend):
    region_backend("aot_eager")
    for settings in ({}, HEADS["LoRA"]):
        model = adapted(fastlora.disable(shallow), r=2, lora_dropout=0.2, **settings)
        results = []
        for compile in (True, False):
            m = model.with_spec(compile=compile)
            step = fastlora.value_and_grad(lambda a, m=m: weighted(ours(m, a, 3)))
            results.append(step(m.adapter))
        assert relative_error(*results) < 1e-10


@pytest.mark.compile
def test_the_callers_torch_compile_gives_the_eager_values(shallow):
    run = lambda a: ours(shallow, a, None)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert relative_error(compiled(shallow.adapter), run(shallow.adapter)) < 1e-12


def test_ids_of_another_length_work(tiny):
    """One token has no prediction."""
    trees, one = (tiny.adapter, tiny.base, tiny.spec), token_ids(2, 1)
    pair = FL.token_logprobs(*trees, one, one, entropy=True)
    assert all(not x.any() and x.shape == (2, 1) for x in pair)
