"""Mixtures of experts: routing, the block, its gradients at every policy, torch.func, compiled.

Logits, padding, packing, generation and files of these families are with the dense ones' tests;
adapters against PEFT's are in tests/formats/test_peft_parity.py.
"""

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fastlora import functional as FL
from fastlora import value_and_grad
from fastlora.model import Model
from fastlora.models.experts import chosen_experts, collect, expert_mlp, make_routes, spread
from fastlora.models.levels import LEVELS, kept_elements, layer_levels
from oracles.layers import Layer, graphs, saved_elements
from oracles.pairs import adapted
from oracles.trees import relative_error, same_bits, token_ids

MIXTURES = ["mixtral", "qwen3_moe", "qwen3_moe_mixed"]
POLICIES = ["none", "selective", 0.4, 0.15, "full", "offload"]

EVERYTHING = dict(
    target_modules=["q_proj", "v_proj", "o_proj"],
    target_parameters=["gate.weight", "experts.gate_up_proj", "experts.down_proj"],
)


@pytest.fixture
def trained(pair):
    """trained(family): LoRA on attention, router and experts."""
    return lambda family: adapted(pair(family).model, r=4, **EVERYTHING)


def batch_of(segments: bool = False, seed: int = 0) -> dict[str, Tensor]:
    ids = token_ids(2, 12, vocab_size=96, seed=seed)
    labels = torch.where(torch.arange(12) < 3, -100, ids)
    batch = {"input_ids": ids, "labels": labels}
    if segments:
        batch["segment_ids"] = (torch.arange(12) > 4).long().expand(2, 12)
    return batch


def value_and_grads(model: Model, segments: bool = False) -> Any:
    return value_and_grad(FL.loss)(model.adapter, model.base, model.spec, batch_of(segments))


# ── routing ───────────────────────────────────────────────────────────────────────────────


def test_weights_are_a_softmax_over_all_experts():
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    weights, indices = chosen_experts(logits, 3, False)
    torch.testing.assert_close(weights, logits.softmax(-1).gather(1, indices))
    assert (weights.diff() <= 0).all() and weights.sum(-1).max() < 1
    shared, same = chosen_experts(logits, 3, True)
    torch.testing.assert_close(shared, weights / weights.sum(-1, keepdim=True))
    assert torch.equal(same, indices)
    assert chosen_experts(logits.bfloat16(), 3, True)[0].dtype == torch.float32


def test_routes_sort_the_tokens_copies_by_expert():
    indices = torch.tensor([[3, 1], [1, 0], [3, 0]])
    routes = make_routes(indices, 5)
    assert routes.offsets.tolist() == [2, 4, 4, 6, 6] and routes.offsets.dtype == torch.int32
    assert (routes.order // 2).tolist() == [1, 2, 0, 1, 0, 2]  # in the tokens' order
    assert torch.equal(routes.order[routes.place], torch.arange(6))
    x = torch.randn(3, 4)
    torch.testing.assert_close(collect(spread(x, routes), routes, 3), 2 * x)


def test_spread_and_collect_are_each_others_transpose():
    routes = make_routes(torch.tensor([[3, 1], [1, 0], [3, 0]]), 5)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    y = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    for fn, leaf in ((lambda x: spread(x, routes), x), (lambda y: collect(y, routes, 3), y)):
        assert torch.autograd.gradcheck(fn, leaf) and torch.autograd.gradgradcheck(fn, leaf)


@pytest.mark.parametrize("renormalise", [False, True])
def test_the_block_is_transformers_sum_over_experts(renormalise):
    gen = torch.Generator().manual_seed(0)
    new = lambda *n: torch.randn(*n, generator=gen, dtype=torch.float64)
    x, logits = new(2, 5, 8), new(2, 5, 4)
    experts = {"gate_up_proj": new(4, 12, 8), "down_proj": new(4, 8, 6)}
    ours = expert_mlp(x, logits, experts, {}, {}, 2, renormalise)
    top, chosen = logits.softmax(-1).topk(2, dim=-1)
    top = top / top.sum(-1, keepdim=True) if renormalise else top
    expected = torch.zeros_like(x)
    for e in range(4):
        gate, up = F.linear(x, experts["gate_up_proj"][e]).chunk(2, -1)
        weight = (top * (chosen == e)).sum(-1, keepdim=True)
        expected += weight * F.linear(F.silu(gate) * up, experts["down_proj"][e])
    torch.testing.assert_close(ours, expected)


# ── gradients ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("family", MIXTURES)
def test_every_policy_gives_torch_funcs_gradient_with_the_same_bits(family, segments, trained):
    model, batch = trained(family), batch_of(segments)
    ours = value_and_grads(model.with_spec(recompute="none"), segments)
    grads, value = torch.func.grad_and_value(FL.loss)(model.adapter, model.base, model.spec, batch)
    torch.testing.assert_close(ours[0], value)
    assert all(g.any() for g in tree_leaves(ours[1]))
    assert relative_error(ours[1], grads) <= 1e-4
    for policy in POLICIES:
        again = value_and_grads(model.with_spec(recompute=policy), segments)
        assert same_bits(again, ours), policy


def test_attention_beside_experts_is_trained_with_dropout(pair):
    """Dropout is refused only with target_parameters. Every policy recomputes the same masks."""
    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = adapted(pair("mixtral").model, r=4, lora_dropout=0.2, target_modules=names)
    args = model.adapter, model.base, model.spec, batch_of()
    _, ours = value_and_grad(FL.loss)(*args, seed=5)
    assert relative_error(ours, torch.func.grad(FL.loss)(*args, seed=5)) <= 1e-4
    for policy in POLICIES:
        spec = model.with_spec(recompute=policy).spec
        again = value_and_grad(FL.loss)(model.adapter, model.base, spec, batch_of(), seed=5)
        assert same_bits(again[1], ours), policy


def test_gradients_equal_finite_differences(trained):
    """In float64, along a random direction of each leaf of the adapter."""
    model = trained("qwen3_moe")
    wide = lambda tree: tree_map(lambda x: x.double(), tree)
    adapter, base, batch = wide(model.adapter), wide(model.base), batch_of()
    _, grads = value_and_grad(FL.loss)(adapter, base, model.spec, batch)
    gen, leaves = torch.Generator().manual_seed(0), tree_leaves(adapter)
    for i, (leaf, g) in enumerate(zip(leaves, tree_leaves(grads), strict=True)):
        direction = torch.randn(leaf.shape, generator=gen, dtype=torch.float64)
        kept, values = leaf.clone(), []
        for step in (1e-6, -1e-6):
            leaf.copy_(kept + step * direction)
            values.append(FL.loss(adapter, base, model.spec, batch))
        leaf.copy_(kept)
        slope = (values[0] - values[1]) / 2e-6
        torch.testing.assert_close((g * direction).sum(), slope, rtol=1e-5, atol=1e-8, msg=str(i))


def test_over_a_bfloat16_base_gradients_are_float32(pair):
    model = adapted(pair("mixtral", torch.bfloat16).model, r=4, **EVERYTHING)
    value, grads = value_and_grads(model)
    assert {x.dtype for x in [value, *tree_leaves(grads)]} == {torch.float32}
    assert all(g.any() for g in tree_leaves(grads))


def test_base_training_differentiates_the_experts(pair):
    model, batch = pair("mixtral").model, batch_of()
    base = tree_map(lambda x: x.detach().requires_grad_(), model.base)
    loss = FL.loss(None, base, model.spec, batch)
    grads = torch.autograd.grad(loss, tree_leaves(base))
    expected = torch.func.grad(lambda b: FL.loss(None, b, model.spec, batch))(model.base)
    assert relative_error(list(grads), tree_leaves(expected)) <= 1e-4


# ── torch.func ────────────────────────────────────────────────────────────────────────────


def test_per_example_gradients_are_each_examples(trained):
    model, batch = trained("qwen3_moe_mixed"), batch_of()
    loss = lambda adapter, ids, labels: FL.loss(
        adapter, model.base, model.spec, {"input_ids": ids[None], "labels": labels[None]}
    )
    together = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(
        model.adapter, batch["input_ids"], batch["labels"]
    )
    for i in range(2):
        alone = torch.func.grad(loss)(model.adapter, batch["input_ids"][i], batch["labels"][i])
        assert relative_error(tree_map(lambda g, i=i: g[i], together), alone) <= 1e-4


def test_a_stack_of_adapters_is_each_adapter(pair):
    models = [adapted(pair("mixtral").model, seed=s, r=4, **EVERYTHING) for s in (0, 1)]
    stack = tree_map(lambda *x: torch.stack(x), *(m.adapter for m in models))
    ids, one = token_ids(2, 9, vocab_size=96), models[0]
    logits = torch.func.vmap(lambda a: FL.forward(a, one.base, one.spec, ids))(stack)
    for found, model in zip(logits, models, strict=True):
        torch.testing.assert_close(found, model(ids), rtol=0, atol=3e-5)


def test_jvp_and_hessian_vector_products_agree(trained):
    model = trained("qwen3_moe")
    wide = lambda tree: tree_map(lambda x: x.double(), tree)
    adapter, base, batch = wide(model.adapter), wide(model.base), batch_of()
    loss = lambda a: FL.loss(a, base, model.spec, batch)
    gen = torch.Generator().manual_seed(0)
    along = tree_map(lambda x: torch.randn(x.shape, generator=gen, dtype=x.dtype), adapter)
    dot = lambda a, b: sum((x * y).sum() for x, y in zip(*map(tree_leaves, (a, b)), strict=True))
    grad = torch.func.grad(loss)
    _, slope = torch.func.jvp(loss, (adapter,), (along,))
    torch.testing.assert_close(slope, dot(grad(adapter), along), rtol=1e-9, atol=1e-12)
    _, forward_over_reverse = torch.func.jvp(grad, (adapter,), (along,))
    reverse_over_reverse = torch.func.grad(lambda a: dot(grad(a), along))(adapter)
    assert relative_error(forward_over_reverse, reverse_over_reverse) <= 1e-8


# ── recomputation ─────────────────────────────────────────────────────────────────────────


class Grouped(TorchDispatchMode):
    """Counts grouped products over the base's weights and choices of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if func is torch.ops.fastlora.grouped_linear.default and args[3] is not None:
            self.seen["gate_up" if args[1].shape[1] == 48 else "down"] += 1
        elif func is torch.ops.aten.topk.default:
            self.seen["topk"] += 1
        return out


@pytest.mark.parametrize(("policy", "again"), [("none", 0), ("selective", 0), ("full", 2)])
def test_policies_recompute_the_expected_grouped_products(policy, again, trained):
    model = trained("qwen3_moe").with_spec(recompute=policy).for_training()
    adapter = tree_map(lambda x: x.detach().requires_grad_(), model.adapter)
    value = FL.loss(adapter, model.base, model.spec, batch_of())
    with Grouped() as calls:
        torch.autograd.grad(value, tree_leaves(adapter))
    assert calls.seen["gate_up"] == again
    assert calls.seen["topk"] == 0  # the choice of experts is kept at every level


@pytest.mark.compile
@pytest.mark.parametrize("level", LEVELS)
def test_compiled_graphs_keep_and_recompute_as_the_level_says(level, trained, pair, fresh_dynamo):
    """Kept are `kept_elements` without x, and per token at most eleven low-rank terms of r = 4 (two
    of them for k = 2 copies), a log-sum-exp for each of 4 heads, and logits, softmax and weights of
    4 experts.
    """
    config = pair("qwen3_moe").model.spec.config
    layer = Layer(trained("qwen3_moe"))
    forward, backward = graphs(layer, level)
    views = [n for n in forward.nodes if n.op == "call_function" and "transpose" in str(n.target)]
    views = [n for n in views if n.meta["val"].dim() == 3]  # of experts' weights: no memory
    kept = saved_elements(forward) - sum(n.meta["val"].numel() for n in views if saved(forward, n))
    more = kept / layer.x[..., 0].numel() - (kept_elements(config, level) - config.hidden_size)
    assert level == "none" or 0 <= more < (7 + 2 * 2) * 4 + 4 + 3 * 4
    run = Counter(node.target for node in backward.nodes)
    grouped = run[torch.ops.fastlora.grouped_linear.default]
    # dx and two halves of the low-rank path for each of the two; again: low, gate_up, down's low.
    assert grouped == 6 + (3 if level in ("mlp", "attention", "full") else 0)
    assert run[torch.ops.aten.topk.default] == 0


def saved(graph: Any, node: Any) -> bool:
    (output,) = (n for n in graph.nodes if n.op == "output")
    return node in output.args[0]


@pytest.mark.parametrize("family", MIXTURES)
def test_a_memory_budget_counts_sparse_and_dense_layers(family, pair):
    config = pair(family).model.spec.config
    n = config.num_hidden_layers
    for layer in range(n):
        sizes = [kept_elements(config, level, layer) for level in LEVELS]
        assert sizes == sorted(set(sizes), reverse=True)
    keeps = lambda levels: sum(kept_elements(config, x, i) for i, x in enumerate(levels))
    whole, before = keeps(["none"] * n), 0
    for step in range(101):
        levels = layer_levels(config, step / 100)
        assert keeps(levels) <= step / 100 * whole + 1e-9 or levels == ("full",) * n
        assert keeps(levels) >= before
        before = keeps(levels)
        places = [LEVELS.index(level) for level in levels]
        assert places == sorted(places, reverse=True) and places[0] - places[-1] <= 1
    assert layer_levels(config, 1.0) == ("none",) * n


# ── compiled ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.compile
@pytest.mark.parametrize("policy", ["none", "selective", 0.15, "full"])
def test_compiled_regions_give_the_eager_gradient(policy, trained, region_backend):
    region_backend("aot_eager")
    model = trained("qwen3_moe_mixed").with_spec(recompute=policy)
    value, grads = value_and_grads(model, segments=True)
    again = value_and_grads(model.with_spec(compile=True), segments=True)
    torch.testing.assert_close(again[0], value)
    assert relative_error(again[1], grads) <= 1e-6


@pytest.mark.compile
def test_inductor_gives_the_eager_gradient(pair, fresh_dynamo):
    settings: Any = dict(target_modules=[], target_parameters=["down_proj", "gate_up_proj"])
    model = adapted(pair("mixtral").model, r=4, **settings)
    value, grads = value_and_grads(model)
    again = value_and_grads(model.with_spec(compile=True))
    torch.testing.assert_close(again[0], value)
    assert relative_error(again[1], grads) <= 1e-5


@pytest.mark.compile
def test_new_lengths_recompile_at_most_once(trained, region_backend):
    made: list[Any] = []

    def keep(module, _):
        made.append(module)
        return module.forward

    region_backend(keep)
    model, counts = trained("mixtral").with_spec(compile=True), []
    for t in (8, 11, 14, 17):
        ids = token_ids(2, t, vocab_size=96)
        batch = {"input_ids": ids, "labels": ids}
        value, _ = value_and_grad(FL.loss)(model.adapter, model.base, model.spec, batch)
        eager = FL.loss(model.adapter, model.base, model.with_spec(compile=False).spec, batch)
        torch.testing.assert_close(value, eager)
        counts.append(len(made))
    assert counts[1] <= 2 * counts[0] and counts[-1] == counts[1]


# ── generation ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", MIXTURES)
def test_the_kv_cache_gives_the_logits_of_a_full_forward_pass(family, trained):
    model = trained(family)
    ids = model.generate(token_ids(2, 4, vocab_size=96), max_new_tokens=8, eos_token_id=())
    assert torch.equal(model(ids[:, :-1])[:, 3:].argmax(-1), ids[:, 4:])
