"""value_and_grad equals torch.func.grad_and_value at every recompute policy, compiled or not."""

import gc
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from fastlora import functional as FL
from fastlora import value_and_grad
from fastlora.model import Model
from fastlora.models import decoder
from fastlora.models.levels import layer_levels
from fastlora.runtime import host_offload
from fastlora.runtime.compiled import _region as compiled_regions
from fastlora.runtime.host_offload import HostStash
from oracles.pairs import adapted
from oracles.trees import randomised, relative_error, same_bits, token_ids

POLICIES = ["none", "selective", "full", "offload", 0.0, 0.2, 0.5, 0.8, 1.0]

# One family for every branch of a layer: plain, biases, windows, q/k norms, layers without RoPE,
# norms behind attention and MLP, Gemma's norms around both with GeGLU and caps, multipliers, fused
# projections with RoPE of a part of each head.
SHAPES = [
    *("llama2", "llama_bias", "qwen2_window", "qwen3", "smollm3"),
    *("olmo3", "gemma2", "granite", "phi4_mini"),
]


def batch_of(segments: bool = False, seed: int = 0) -> dict[str, Tensor]:
    ids = token_ids(2, 12, seed=seed, vocab_size=96)
    labels = torch.where(torch.arange(12) < 3, -100, ids)
    batch = {"input_ids": ids, "labels": labels}
    return batch | (
        {"segment_ids": (torch.arange(12) > 7).long().expand(2, 12)} if segments else {}
    )


def value_and_grads(model: Model, seed: int | None = 5, **how: Any) -> tuple[Tensor, Any]:
    batch = batch_of(**how)
    return value_and_grad(FL.loss)(model.adapter, model.base, model.spec, batch, seed=seed)


@pytest.fixture(scope="session")
def trained(pair):
    """trained(family): the checkpoint with LoRA everywhere, dropout 0.1, both matrices random."""
    return lambda family: adapted(pair(family).model, r=4, lora_dropout=0.1)


# ── the value ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("family", SHAPES)
def test_value_and_gradient_equal_torch_funcs(family, segments, seed, trained):
    model, batch = trained(family), batch_of(segments)
    ours = value_and_grads(model, seed, segments=segments)
    grads, value = torch.func.grad_and_value(FL.loss)(
        model.adapter, model.base, model.spec, batch, seed=seed
    )
    torch.testing.assert_close(ours[0], value)
    assert tree_flatten(ours[1])[1] == tree_flatten(model.adapter)[1]
    assert relative_error(ours[1], grads) <= 1e-4


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("family", SHAPES)
def test_recompute_policies_give_the_same_bits(family, segments, trained):
    model = trained(family)
    expected = value_and_grads(model.with_spec(recompute="none"), segments=segments)
    assert all(g.any() for g in tree_leaves(expected[1]))
    for policy in POLICIES:
        actual = value_and_grads(model.with_spec(recompute=policy), segments=segments)
        assert same_bits(actual, expected), policy


VARIANTS = ["lora_bias", "use_dora"]


@pytest.fixture
def variant(pair):
    """variant(argument): llama_bias with that kind of adapter everywhere, dropout 0.1."""
    base = pair("llama_bias").model
    return lambda argument: adapted(base, r=4, lora_dropout=0.1, **{argument: True})


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("argument", VARIANTS)
def test_dora_and_lora_bias_equal_torch_func_at_every_policy(argument, seed, variant):
    model, batch = variant(argument), batch_of()
    ours = value_and_grads(model.with_spec(recompute="none"), seed)
    grads, value = torch.func.grad_and_value(FL.loss)(
        model.adapter, model.base, model.spec, batch, seed=seed
    )
    torch.testing.assert_close(ours[0], value)
    assert all(g.any() for g in tree_leaves(ours[1]))
    assert relative_error(ours[1], grads) <= 1e-4
    for policy in POLICIES:
        assert same_bits(value_and_grads(model.with_spec(recompute=policy), seed), ours), policy


@pytest.mark.parametrize("policy", ["none", "full", "offload"])
def test_a_step_leaves_no_tensors_to_the_collector(policy, trained, monkeypatch):
    """Else the memory of a step would depend on when Python collects."""
    if policy == "offload":  # the stash as on a GPU
        monkeypatch.setattr(decoder, "_stash", lambda _, x: HostStash(x.device))
        monkeypatch.setattr(host_offload, "_MIN_BYTES", 0)
    model = trained("llama2").with_spec(recompute=policy)
    tensors = lambda: sum(type(x) is Tensor for x in gc.get_objects())
    value_and_grads(model)
    gc.collect()
    gc.disable()
    try:
        before = tensors()
        for _ in range(3):
            value_and_grads(model)
        assert tensors() == before
    finally:
        gc.enable()


def test_any_function_of_logits_and_logprobs_is_differentiated(trained):
    """A preference loss, for example, weights the log-probabilities."""
    model, batch = trained("llama2"), batch_of()
    weights = torch.rand(2, 12, generator=torch.Generator().manual_seed(1))

    def preference(adapter):
        inputs = batch["input_ids"], batch["labels"]
        logp = FL.token_logprobs(adapter, model.base, model.spec, *inputs)
        logits = FL.forward(adapter, model.base, model.spec, inputs[0])
        return (weights * logp).sum().sigmoid() + logits.square().mean()

    grads, value = torch.func.grad_and_value(preference)(model.adapter)
    ours = value_and_grad(preference)(model.adapter)
    torch.testing.assert_close(ours[0], value)
    assert relative_error(ours[1], grads) <= 1e-4


def test_float64_gradients_are_near_float32s(trained):
    model = trained("qwen3")
    wide = lambda tree: tree_map(lambda x: x.double(), tree)
    exact = value_and_grad(FL.loss)(
        wide(model.adapter), wide(model.base), model.spec, batch_of(), seed=5
    )
    assert {g.dtype for g in tree_leaves(exact[1])} == {torch.float64}
    assert relative_error(wide(value_and_grads(model)[1]), exact[1]) <= 1e-4


def test_over_a_bfloat16_base_gradients_are_float32_and_err_as_plain_torchs(pair):
    model = adapted(pair("llama2", torch.bfloat16).model, r=4)
    base32 = tree_map(lambda x: x.float(), model.base)
    errors = torch.zeros(2)
    for seed in range(8):  # single batches differ by a factor of two either way
        args = model.spec, batch_of(seed=seed)
        _, exact = value_and_grad(FL.loss)(model.adapter, base32, *args)
        value, fused = value_and_grad(FL.loss)(model.adapter, model.base, *args)
        plain = torch.func.grad(FL.loss)(model.adapter, model.base, *args)
        errors += torch.tensor([norm_error(fused, exact), norm_error(plain, exact)])
    assert {x.dtype for x in [value, *tree_leaves(fused)]} == {torch.float32}
    assert errors[0] <= 1.5 * errors[1]


def norm_error(actual: Any, expected: Any) -> float:
    """Relative error of a whole tree, by Frobenius norm."""
    flat = lambda tree: torch.cat([x.flatten() for x in tree_leaves(tree)])
    return ((flat(actual) - flat(expected)).norm() / flat(expected).norm()).item()


# ── the contract ──────────────────────────────────────────────────────────────────────────


def test_an_unused_leaf_gets_zeros(trained):
    model = trained("llama2")
    tree = {"adapter": model.adapter, "unused": torch.ones(3, dtype=torch.float64)}
    fn = lambda tree: FL.loss(tree["adapter"], model.base, model.spec, batch_of())
    _, grads = value_and_grad(fn)(tree)
    assert torch.equal(grads["unused"], torch.zeros(3, dtype=torch.float64))
    assert all(g.any() for g in tree_leaves(grads["adapter"]))


def test_a_value_without_history_gives_zeros_only():
    value, grads = value_and_grad(lambda tree: torch.tensor(2.0))({"x": torch.ones(2)})
    assert value.item() == 2.0 and torch.equal(grads["x"], torch.zeros(2))


@pytest.mark.parametrize("required", [False, True])
def test_the_callers_tensors_are_untouched(required, trained):
    model = trained("llama2")
    adapter = tree_map(lambda x: x.clone().requires_grad_(required), model.adapter)
    before = [(x, x.clone(), x._version) for x in tree_leaves(adapter)]
    value, grads = value_and_grad(FL.loss)(adapter, model.base, model.spec, batch_of())
    for x, copy, version in before:
        assert x.requires_grad == required and x.grad is None and x._version == version
        assert torch.equal(x, copy)
    assert not any(x.requires_grad for x in [value, *tree_leaves(grads), *tree_leaves(model.base)])


def test_it_differentiates_under_no_grad(trained):
    model = trained("llama2")
    expected = value_and_grads(model)
    with torch.no_grad():
        assert same_bits(value_and_grads(model), expected)
        assert not torch.is_grad_enabled()


@pytest.mark.parametrize("leaf", [torch.ones(2, dtype=torch.int64), 1.0, "x"])
def test_a_leaf_that_is_not_a_float_tensor_is_refused_before_the_function_runs(leaf):
    def never(tree):
        raise AssertionError("called")

    with pytest.raises(ValueError, match=r"floating-point tensor(.|\n)*leaf 1 is"):
        value_and_grad(never)({"a": torch.ones(2), "b": leaf})


def test_every_wrong_leaf_is_named():
    with pytest.raises(ValueError, match=r"leaf 0(.|\n)*leaf 2"):
        value_and_grad(lambda tree: tree["b"].sum())(
            {"a": 1.0, "b": torch.ones(2), "c": torch.ones(2, dtype=torch.int64)}
        )


def test_an_empty_tree_is_refused():
    with pytest.raises(ValueError, match="without tensors"):
        value_and_grad(lambda tree: torch.tensor(1.0))({})


@pytest.mark.parametrize(
    "fn", [lambda x: x, lambda x: x[:1], lambda x: 1.0], ids=["[2]", "[1]", "1.0"]
)
def test_a_value_that_is_not_a_scalar_tensor_is_refused(fn):
    with pytest.raises(ValueError, match="scalar"):
        value_and_grad(fn)(torch.ones(2))


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
def test_a_second_derivative_through_the_fused_loss_is_refused_not_wrong(policy, pair):
    """The fused cross-entropy has a first derivative only; torch.func gives the second.

    The last layer's MLP alone is adapted: no attention, whose kernel would refuse for its own sake.
    """
    mlp = dict(target_modules=["gate_proj", "up_proj", "down_proj"], layers_to_transform=[1])
    model = adapted(pair("llama2").model, r=4, **mlp).with_spec(recompute=policy).for_training()
    leaves = tree_leaves(model.adapter)
    with pytest.raises(RuntimeError, match=r"second|once|twice"):
        grads = torch.autograd.grad(model.loss(batch_of()), leaves, create_graph=True)
        torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)


# ── inside a transform ────────────────────────────────────────────────────────────────────


def with_pair_turned(fn):
    def wrapped(*args):
        grads, value = torch.func.grad_and_value(fn)(*args)
        return value, grads

    return wrapped


def under_dual_level(fn, tree, direction):
    with forward_ad.dual_level():
        dual = tree_map(forward_ad.make_dual, tree, direction)
        return tree_map(lambda x: tuple(forward_ad.unpack_dual(x)), fn(dual))


TRANSFORMS = {
    "vmap": lambda fn, tree, d: torch.vmap(fn)(tree_map(lambda x, y: torch.stack((x, y)), tree, d)),
    "jvp": lambda fn, tree, d: torch.func.jvp(fn, (tree,), (d,)),
    "jacrev": lambda fn, tree, d: torch.func.jacrev(lambda t: fn(t)[0])(tree),
    "grad": lambda fn, tree, d: torch.func.grad(lambda t: sum(map(torch.sum, tree_leaves(fn(t)))))(
        tree
    ),
    "forward_ad": under_dual_level,
}


@pytest.mark.parametrize("cuda_graph", [False, True])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_inside_a_transform_it_is_grad_and_value_with_its_pair_turned(name, cuda_graph, tiny):
    ids = token_ids(2, 7)
    batch = {"input_ids": ids, "labels": ids}
    loss = lambda adapter: FL.loss(adapter, tiny.base, tiny.spec, batch, seed=3)
    run = lambda fn: TRANSFORMS[name](fn, tiny.adapter, randomised(tiny.adapter, 4))
    ours = run(value_and_grad(loss, cuda_graph=cuda_graph))
    assert relative_error(ours, run(with_pair_turned(loss))) <= 1e-10


def test_inside_a_transform_an_unused_leaf_gets_zeros():
    fn = value_and_grad(lambda tree: tree["x"].sum())
    _, grads = torch.vmap(fn)({"x": torch.ones(3, 2), "unused": torch.ones(3, 4)})
    assert torch.equal(grads["unused"], torch.zeros(3, 4))


@pytest.mark.parametrize("value", [lambda x: x, lambda x: 1.0])
def test_inside_a_transform_a_value_that_is_not_a_scalar_tensor_is_refused(value):
    with pytest.raises(ValueError, match="scalar"):
        torch.vmap(value_and_grad(value))(torch.ones(3, 2))


# ── compiled ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.compile
@pytest.mark.parametrize("policy", POLICIES)
def test_compiled_regions_give_the_eager_gradient(policy, trained, region_backend):
    region_backend("aot_eager")
    model = trained("llama2").with_spec(recompute=policy)
    value, grads = value_and_grads(model)
    again = value_and_grads(model.with_spec(compile=True))
    torch.testing.assert_close(again[0], value)
    assert relative_error(again[1], grads) <= 1e-6


@pytest.mark.compile
@pytest.mark.parametrize("family", [x for x in SHAPES[1:] if x != "olmo3"])  # gemma2 has its norms
def test_compiled_regions_give_the_eager_gradient_of_packed_rows(family, trained, region_backend):
    region_backend("aot_eager")
    model = trained(family)
    value, grads = value_and_grads(model, segments=True)
    again = value_and_grads(model.with_spec(compile=True), segments=True)
    torch.testing.assert_close(again[0], value)
    assert relative_error(again[1], grads) <= 1e-6


@pytest.mark.compile
def test_inductor_gives_the_eager_gradient(pair, fresh_dynamo):
    model = adapted(pair("llama2").model, r=4, target_modules=["q_proj", "down_proj"])
    value, grads = value_and_grads(model)
    again = value_and_grads(model.with_spec(compile=True))
    torch.testing.assert_close(again[0], value)
    assert relative_error(again[1], grads) <= 1e-5


@pytest.mark.compile
@pytest.mark.parametrize("policy", ["selective", 0.45], ids=str)
def test_a_second_process_compiles_nothing(policy, pair, fresh_dynamo):
    """Every graph is found in the cache on disk, with any recomputation. At 0.45 both layers
    recompute their MLP completely and the rest in part."""
    model = adapted(pair("llama2").model, r=4, target_modules=["q_proj", "down_proj"])
    model = model.with_spec(recompute=policy, compile=True)
    if policy != "selective":
        assert {*layer_levels(model.spec.config, policy)} == {"mlp"}
    first = value_and_grads(model)
    torch._dynamo.reset()
    compiled_regions.cache_clear()
    counters.clear()
    assert same_bits(value_and_grads(model), first)
    found = counters["aot_autograd"]
    assert found["autograd_cache_hit"] == compiled_regions.cache_info().currsize
    assert not found["autograd_cache_miss"] and not found["autograd_cache_bypass"]


@pytest.mark.compile
@pytest.mark.parametrize("argument", VARIANTS)
def test_compiled_regions_give_the_eager_gradient_of_variants(argument, variant, region_backend):
    region_backend("aot_eager")
    model = variant(argument)
    expected = value_and_grads(model)
    again = value_and_grads(model.with_spec(compile=True))
    assert relative_error(again, expected) <= 1e-5


@pytest.mark.compile
def test_a_users_own_compile_of_the_loss_gives_the_eager_gradient(trained, fresh_dynamo):
    model, batch = trained("llama2"), batch_of()
    loss = lambda adapter: FL.loss(adapter, model.base, model.spec, batch, seed=5)
    value, grads = value_and_grad(loss)(model.adapter)
    again = value_and_grad(torch.compile(loss, backend="aot_eager"))(model.adapter)
    torch.testing.assert_close(again[0], value)
    assert relative_error(again[1], grads) <= 1e-6
