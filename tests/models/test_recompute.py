"""Recompute levels: what each computes again, read from backward graphs; memory budgets."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastlora.models.config_json import config_from_json
from fastlora.models.layer import decoder_layer
from fastlora.models.levels import LEVELS, kept_elements, layer_levels, mlp_chunks, offload_levels
from oracles.layers import Layer, graphs, saved_elements
from oracles.pairs import adapted

# (columns in, columns out) of llama_head_dim's projections: all kinds differ.
NAMES = {
    (32, 48): "q",
    (32, 24): "k or v",
    (48, 32): "o",
    (32, 56): "gate or up",
    (56, 32): "down",
}

ATTENTION = ("scaled_dot_product", "bmm", "softmax")


@pytest.fixture(params=[False, True], ids=["", "dropout"])
def layer(pair, request) -> Layer:
    """With and without dropout. Without it q, k, v, and gate, up, each share one x A' product."""
    model = adapted(pair("llama_head_dim").model, r=4, lora_dropout=0.1)
    return Layer(model, drop=request.param)


def again(graph: fx.Graph) -> Counter[str]:
    """The projections whose base product is in a backward graph, which means: is recomputed."""
    op = torch.ops.fastlora.lora_linear.default
    nodes = [node for node in graph.nodes if node.target is op]
    width = lambda node: node.meta["val"].shape[-1]
    return Counter(NAMES[width(node.args[0]), width(node)] for node in nodes)


def count(graph: fx.Graph, *kinds: str) -> int:
    """The number of ops whose name contains one of `kinds`, without backward ops."""
    calls = [node for node in graph.nodes if node.op == "call_function"]
    # Recomputed attention is wrapped, with its op as an argument: run_with_rng_state(_, op, ...).
    names = [
        " ".join(str(x) for x in (n.target, *n.args) if not isinstance(x, fx.Node)) for n in calls
    ]
    return sum(any(k in n for k in kinds) and "backward" not in n for n in names)


QKVO = {"q": 1, "k or v": 2, "o": 1}

AGAIN: dict[str, dict[str, int]] = {
    "none": {},
    "selective": {},
    "mlp": {"gate or up": 2},
    "attention": QKVO | {"gate or up": 2},
    "full": QKVO | {"gate or up": 2},
}


@pytest.mark.compile
@pytest.mark.parametrize("level", LEVELS)
def test_the_backward_graph_recomputes_exactly_the_levels_products(level, layer, fresh_dynamo):
    _, graph = graphs(layer, level)
    assert again(graph) == AGAIN[level]  # and never down
    assert count(graph, *ATTENTION) == (level == "full")


@pytest.mark.compile
@pytest.mark.parametrize("level", LEVELS[1:])
def test_the_forward_graph_keeps_what_the_level_says(level, layer, pair, fresh_dynamo):
    """Kept are `kept_elements` without x, an argument here, and per token at most seven low-rank
    terms of r = 4 and one log-sum-exp for each of 4 heads."""
    config = pair("llama_head_dim").model.spec.config
    forward, _ = graphs(layer, level)
    per_token = saved_elements(forward) / layer.x[..., 0].numel()
    more = per_token - (kept_elements(config, level) - config.hidden_size)
    assert 0 <= more < 7 * 4 + 4 + 1


@pytest.mark.compile
@pytest.mark.parametrize(("level", "extra"), [("mlp", 0), ("selective", 32)])
def test_norms_behind_attention_and_mlp_keep_their_inputs(level, extra, pair, fresh_dynamo):
    """Behind attention it is o, which is kept anyway; behind the MLP the product of down."""
    model = adapted(pair("olmo2").model, r=4)
    layer = Layer(model, drop=False)
    forward, _ = graphs(layer, level)
    config = model.spec.config
    more = saved_elements(forward) / layer.x[..., 0].numel()
    more -= kept_elements(config, level) - config.hidden_size
    assert 0 <= more < 7 * 4 + 4 + 4 + 1  # and one number for each of four norms
    before = replace(config, norms="before")
    assert kept_elements(config, level) - kept_elements(before, level) == extra


@pytest.mark.compile
@pytest.mark.parametrize("level", ["selective", "mlp", "attention", "full"])
def test_unadapted_projections_are_recomputed_like_the_others(level, pair, fresh_dynamo):
    """If only q_proj is adapted, the others are plain products. down is still never recomputed."""
    layer = Layer(adapted(pair("llama_head_dim").model, r=4, target_modules=["q_proj"]))
    products = ("aten.mm", "aten.addmm")
    more = count(graphs(layer, level)[1], *products)
    torch._dynamo.reset()
    more -= count(graphs(layer, "none")[1], *products)
    # q_proj is a custom op; under dropout without kernels its x A' is a plain product.
    x_a = 1 if level in ("attention", "full") else 0
    plain = sum(AGAIN[level].values()) - AGAIN[level].get("q", 0)
    assert more == plain + x_a


@pytest.mark.compile
@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("level", LEVELS)
def test_narrow_products_are_never_recomputed_nor_swiglu_for_them(level, drop, pair, fresh_dynamo):
    """Under dropout the gradient of down's A needs SwiGLU's result itself."""
    model = adapted(pair("llama_head_dim").model, r=4, lora_dropout=0.1)
    layer = Layer(model, drop=drop)
    layer.spec = replace(layer.spec, fused=True)
    _, graph = graphs(layer, level)
    assert count(graph, "times_a", "masked_x_a") == 0
    assert count(graph, "fastlora.lora_swiglu") == (drop and level != "none")


def most_wide_elements(graph: fx.Graph, width: int) -> int:
    """The largest number of elements, in tensors of the MLP's width, that exist at once."""
    nodes, alive, most = [*graph.nodes], 0, 0
    last = {x: node for node in nodes for x in node.all_input_nodes}
    size = lambda node: (
        v.numel()
        if node.op == "call_function"
        and isinstance(v := node.meta.get("val"), Tensor)
        and v.dim() == 2
        and v.shape[1] == width
        and node.target is not torch.ops.aten.view.default
        else 0
    )
    for node in nodes:
        alive += size(node)
        most = max(most, alive)
        alive -= sum(size(x) for x in node.all_input_nodes if last[x] is node)
    return most


@pytest.mark.compile
@pytest.mark.parametrize("level", ["mlp", "attention", "full"])
def test_chunks_of_the_mlp_are_alive_one_at_a_time(level, pair, fresh_dynamo):
    layer = Layer(adapted(pair("llama_head_dim").model, r=4), t=32, drop=False)
    whole = most_wide_elements(graphs(layer, level)[1], 56)
    torch._dynamo.reset()
    assert most_wide_elements(graphs(layer, level, 4)[1], 56) < whole / 3  # and dA


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.compile)])
@pytest.mark.parametrize(("level", "chunks"), [("mlp", 2), ("attention", 3), ("full", 7)])
def test_chunks_change_no_value(level, chunks, compile, pair, fresh_dynamo):
    """20 tokens in uneven pieces, some of which contain tokens of both rows."""
    layer = Layer(adapted(pair("llama_head_dim").model, r=4), drop=False)
    run = torch.compile(decoder_layer, fullgraph=True, backend="aot_eager") if compile else None
    results = []
    for n in (1, chunks):
        value = layer.run(level, run or decoder_layer, n)
        results.append([value, *torch.autograd.grad(value, tree_leaves(layer.adapter))])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(
            other, one, rtol=1e-5, atol=1e-5 * float(one.detach().abs().max())
        )


@pytest.mark.parametrize(
    ("level", "tokens", "chunks"),
    [
        ("full", 1, 1),
        ("full", 16384, 1),
        ("full", 16385, 2),
        ("attention", 32768, 2),
        ("mlp", 32769, 4),
        ("full", 2**17, 8),
        ("selective", 2**17, 1),
        ("none", 2**17, 1),
    ],
)
def test_long_sequences_run_the_mlp_in_chunks(level, tokens, chunks, pair):
    config = pair("llama2").model.spec.config
    assert mlp_chunks(config, 0, level, tokens, whole=False) == chunks
    assert mlp_chunks(config, 0, level, tokens, whole=True) == 1
    sparse = pair("mixtral").model.spec.config
    assert mlp_chunks(sparse, 0, level, tokens, whole=False) == 1


# ── the same laws for eager code, counted while it runs ───────────────────────────────────────────


class Calls(TorchDispatchMode):
    """Counts base products and calls of attention by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        name = str(func)
        if func is torch.ops.fastlora.lora_linear.default:
            self.seen[NAMES[args[0].shape[-1], out.shape[-1]]] += 1
        elif any(k in name for k in ATTENTION) and "backward" not in name:
            self.seen["attention"] += 1
        return out


@pytest.mark.parametrize("level", LEVELS)
def test_an_eager_backward_pass_recomputes_the_levels_products(level, layer):
    value, calls = layer.run(level), Calls()
    with calls:
        layer.backward(value)
    expected = Counter(AGAIN[level]) + Counter(attention=int(level == "full"))
    assert calls.seen - Counter(down=1) == expected  # eager recomputation ends with down's call


# ── how much is kept ──────────────────────────────────────────────────────────────────────


CONFIGS = ["llama1", "llama2", "llama_head_dim", "tinyllama", "mistral", "qwen3", "smollm3"]


@pytest.mark.parametrize("family", CONFIGS)
def test_every_level_keeps_less_than_the_one_before(family, pair):
    config = pair(family).model.spec.config
    sizes = [kept_elements(config, level) for level in LEVELS]
    assert sizes == sorted(set(sizes), reverse=True) and sizes[-1] == config.hidden_size


@pytest.mark.parametrize("family", CONFIGS)
def test_budgets_are_kept_and_larger_ones_keep_no_less(family, pair):
    config = pair(family).model.spec.config
    n, whole = config.num_hidden_layers, kept_elements(config, "none")
    keeps = lambda levels: sum(kept_elements(config, level) for level in levels)
    before = 0
    for step in range(101):
        budget = step / 100
        levels = layer_levels(config, budget)
        assert len(levels) == n
        if keeps(("full",) * n) <= budget * n * whole:
            assert keeps(levels) <= budget * n * whole * (1 + 1e-12)
        else:
            assert levels == ("full",) * n
        assert keeps(levels) >= before
        before = keeps(levels)
        # Leaner layers first, and neighbours on the ladder only.
        places = [LEVELS.index(level) for level in levels]
        assert places == sorted(places, reverse=True) and places[0] - places[-1] <= 1
    assert layer_levels(config, 1.0) == ("none",) * n and layer_levels(config, 0.0) == ("full",) * n


def test_a_budget_is_used_up_to_one_step(pair):
    """No layer could keep one level more within the budget."""
    config = pair("smollm3").model.spec.config
    n, whole = config.num_hidden_layers, kept_elements(config, "none")
    for step in range(100):
        budget = step / 100 * n * whole
        levels = list(layer_levels(config, step / 100))
        lean = levels.count(levels[0])
        richer = LEVELS[LEVELS.index(levels[0]) - 1] if levels[0] != "none" else "none"
        levels[lean - 1] = richer
        keeps = sum(kept_elements(config, level) for level in levels)
        assert keeps > budget or richer == levels[0]


@pytest.mark.parametrize("policy", ["none", "selective", "full", "offload"])
def test_a_name_is_one_level_for_all_layers(policy, pair):
    config = pair("smollm3").model.spec.config
    assert layer_levels(config, policy) == ("full" if policy == "offload" else policy,) * 4


def test_offload_sends_attention_for_as_many_layers_as_the_transfer_has_time_for(pair):
    of_8b = dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, head_dim=128)
    heads = dict(num_attention_heads=32, num_key_value_heads=8)
    large = config_from_json(dict(model_type="llama", vocab_size=128256, **of_8b, **heads))
    levels = offload_levels(large, 8192, 2)
    assert {*levels} == {"mlp", "full"} and 22 <= levels.count("mlp") <= 28
    gaps = [i for i, level in enumerate(levels) if level == "full"]
    assert max(b - a for a, b in pairwise(gaps)) - min(b - a for a, b in pairwise(gaps)) <= 1
    # Twice the bytes an element: half as many; and a long batch would fill the host.
    assert offload_levels(large, 8192, 4).count("mlp") < levels.count("mlp")
    assert 0 < offload_levels(large, 32768, 2).count("mlp") < 16
    assert offload_levels(large, 2**20, 2) == ("full",) * 32
    # A narrow layer is computed before its activations could be sent.
    assert offload_levels(pair("smollm3").model.spec.config, 8192, 2) == ("full",) * 4
