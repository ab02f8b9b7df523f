"""Hessian and Gauss-Newton products against finite differences and dense matrices in float64."""

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor
from torch.func import hessian, jacrev, vmap
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

import fastlora
from fastlora import functional as FL
from fastlora import research
from fastlora.adapters.edits.quantization import quantize
from fastlora.model import Model
from fastlora.ops.linear.dora import row_norms
from fastlora.ops.quant.weights import Quantized, parts
from fastlora.research.trees import inner
from oracles.batches import batch_of
from oracles.pairs import adapted
from oracles.trees import randomised, relative_error

BATCH = batch_of(2, 6)


def loss_of(model: Model, **changed: Any) -> Callable[[Any], Tensor]:
    spec = replace(model.spec, **changed)
    return lambda a: FL.loss(a, model.base, spec, BATCH, seed=3)


def logits_of(model: Model) -> Callable[[Any], Tensor]:
    return lambda a: FL.forward(a, model.base, model.spec, BATCH["input_ids"], seed=3)[:, :-1]


def first_b(fn: Callable, model: Model) -> tuple[Callable[[Any], Tensor], dict[str, Tensor]]:
    """fn as a function of {"b": B of the first layer's v_proj}: 8 x 2 numbers, small enough."""
    layers = model.adapter["layers"]

    def of_leaf(tree: dict[str, Tensor]) -> Tensor:
        first = layers[0] | {"v_proj": layers[0]["v_proj"]._replace(b=tree["b"])}
        return fn({"layers": (first, *layers[1:])})

    return of_leaf, {"b": layers[0]["v_proj"].b}


def dense(product: Callable, leaf: Tensor) -> Tensor:
    """The matrix of a product over {"b": leaf}."""
    basis = torch.eye(leaf.numel(), dtype=leaf.dtype).view(-1, *leaf.shape)
    return torch.stack([product({"b": e})["b"].flatten() for e in basis], 1)


def slope(fn: Callable[[Any], Any], tree: Any, direction: Any, step: float = 1e-4) -> Any:
    """Fourth-order central difference."""
    at = lambda k: fn(tree_map(lambda x, d: x + k * step * d, tree, direction))
    stencil = lambda a, b, c, d: (a - d + 8 * (c - b)) / (12 * step)
    return tree_map(stencil, at(-2), at(-1), at(1), at(2))


def models(pair, tiny: Model) -> dict[str, Model]:
    exact = lambda family: pair(family, torch.float64).model
    nf4 = quantize(pair("llama2").model)
    is_packed = lambda x: isinstance(x, Quantized)
    double = lambda x: x if is_packed(x) else x.double()
    wide = lambda tree: tree_map(double, tree, is_leaf=is_packed)
    return {
        "dropout": tiny,
        "DoRA": adapted(exact("llama2"), r=2, use_dora=True),
        "experts": adapted(exact("qwen3_moe_mixed"), r=2),
        "NF4": adapted(replace(nf4, base=wide(nf4.base)), r=2),
    }


@pytest.fixture
def fixed_norms(monkeypatch) -> Callable[[], None]:
    """fixed_norms(): from here on DoRA's norms are those of the first adapter that runs."""
    norms: dict[int, Tensor] = {}

    def fixed(weight: Any, *rest: Any) -> Tensor:
        key = parts(weight)[0].data_ptr()
        if key not in norms:
            norms[key] = row_norms(weight, *rest)
        return norms[key]

    return lambda: monkeypatch.setattr("fastlora.models.dora_products.row_norms", fixed)


@pytest.mark.parametrize("name", ["dropout", "DoRA", "experts", "NF4"])
def test_a_hessian_product_is_the_slope_of_the_gradient(name, pair, tiny, fixed_norms):
    model = models(pair, tiny)[name]
    loss, d = loss_of(model), randomised(model.adapter, 9)
    found, gradient = research.hvp(loss, model.adapter)(d), fastlora.value_and_grad(loss)
    fixed_norms()
    gradient(model.adapter)
    expected = slope(lambda a: gradient(a)[1], model.adapter, d)
    assert relative_error(found, expected) <= 1e-6


@pytest.mark.parametrize("name", ["dropout", "DoRA", "experts", "NF4"])
def test_a_gauss_newton_product_is_the_pulled_back_slope_of_the_logits(
    name, pair, tiny, fixed_norms
):
    model = models(pair, tiny)[name]
    logits, d = logits_of(model), randomised(model.adapter, 9)
    found = research.ggnvp(logits, model.adapter)(d)
    fixed_norms()
    logits(model.adapter)
    moved, p = slope(logits, model.adapter, d), logits(model.adapter).softmax(-1)
    u = p * (moved - (p * moved).sum(-1, keepdim=True)) / p[..., 0].numel()
    _, expected = fastlora.value_and_grad(lambda a: (logits(a) * u).sum())(model.adapter)
    assert relative_error(found, expected) <= 1e-6


@pytest.mark.parametrize("method", ["reverse", "linearize"])
def test_a_block_of_the_hessian_is_torch_s(method, shallow):
    of_leaf, leaf = first_b(loss_of(shallow), shallow)
    expected = hessian(of_leaf)(leaf)["b"]["b"].reshape(16, 16)
    before = list(warnings.filters)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        product = research.hvp(of_leaf, leaf, method=method)
    assert warnings.filters == before
    assert not [w for w in caught if issubclass(w.category, UserWarning)]
    found = dense(product, leaf["b"])
    assert relative_error(found, expected) <= 1e-9
    assert relative_error(found.T, found) <= 1e-10


def test_the_difference_method_is_near_the_hessian(tiny):
    d, loss = randomised(tiny.adapter, 9), loss_of(tiny)
    exact, near = (research.hvp(loss, tiny.adapter, method=m)(d) for m in ("reverse", "difference"))
    assert 0 < relative_error(near, exact) <= 1e-5
    zero = tree_map(torch.zeros_like, d)
    assert not any(x.any() for x in tree_leaves(
        research.hvp(loss, tiny.adapter, method="difference")(zero)))  # fmt: skip


def test_a_block_of_the_gauss_newton_matrix_is_the_dense_one(tiny):
    of_leaf, leaf = first_b(logits_of(tiny), tiny)
    weights = torch.rand(2, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    j = jacrev(of_leaf)(leaf)["b"].reshape(10, 24, 16)
    p = of_leaf(leaf).softmax(-1).reshape(10, 24)
    m = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    for given, w in (
        (None, torch.full((10,), 0.1, dtype=torch.float64)),
        (weights, weights.flatten()),
    ):
        expected = torch.einsum("nvi,nvw,nwj,n->ij", j, m, j, w)
        found = dense(research.ggnvp(of_leaf, leaf, weights=given), leaf["b"])
        assert relative_error(found, expected) <= 1e-9
        assert torch.linalg.eigvalsh(found).min() >= -1e-12


def test_products_are_symmetric_and_the_gauss_newton_matrix_is_positive(tiny):
    u, v = (randomised(tiny.adapter, seed, std=1.0) for seed in (1, 2))
    h, g = research.hvp(loss_of(tiny), tiny.adapter), research.ggnvp(logits_of(tiny), tiny.adapter)
    for product in (h, g):
        assert abs(inner(u, product(v)) - inner(v, product(u))) <= 1e-10
    assert inner(u, g(u)) > 0


def test_products_are_the_same_at_every_recompute_level_and_change_no_tensor(tiny):
    d = randomised(tiny.adapter, 9)
    found = [
        research.hvp(loss_of(tiny, recompute=level), tiny.adapter)(d)
        for level in ("none", "selective", "full")
    ]
    assert relative_error(found[1], found[0]) == relative_error(found[2], found[0]) == 0
    assert not any(x.requires_grad for x in tree_leaves((tiny.adapter, found)))


def test_products_of_many_vectors_run_under_vmap(tiny):
    many = tree_map(lambda x: torch.stack([x, -2 * x]), randomised(tiny.adapter, 9))
    one = tree_map(lambda x: x[1], many)
    for product in (
        research.hvp(loss_of(tiny), tiny.adapter),
        research.ggnvp(logits_of(tiny), tiny.adapter),
    ):
        found = tree_map(lambda x: x[1], vmap(product)(many))
        assert relative_error(found, product(one)) <= 1e-10


def flops(fn: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        fn()
    return counter.get_total_flops()


def test_a_hessian_product_costs_at_most_three_gradients(tiny):
    """The linearisation included; in floating-point operations of matrix products."""
    d, loss = randomised(tiny.adapter, 9), loss_of(tiny)
    gradient = flops(lambda: torch.func.grad(loss)(tiny.adapter))
    assert flops(lambda: research.hvp(loss, tiny.adapter)(d)) <= 3 * gradient
    h, g = research.hvp(loss, tiny.adapter), research.ggnvp(logits_of(tiny), tiny.adapter)
    assert flops(lambda: h(d)) <= 1.7 * gradient
    assert flops(lambda: g(d)) <= 1.2 * gradient


# ── SciPy ─────────────────────────────────────────────────────────────────────────────────


def test_eigsh_finds_the_top_eigenvalue_of_a_dense_block(tiny):
    of_leaf, leaf = first_b(loss_of(tiny), tiny)
    matrix = hessian(of_leaf)(leaf)["b"]["b"].reshape(16, 16)
    operator = research.as_linear_operator(research.hvp(of_leaf, leaf), leaf)
    values, vectors = eigsh(operator, k=1, which="LA", v0=np.ones(16))
    expected = torch.linalg.eigvalsh(matrix)[-1].item()
    assert math.isclose(values[0], expected, rel_tol=1e-9)
    direction = research.unravel(vectors[:, 0], leaf)
    assert relative_error(
        research.hvp(of_leaf, leaf)(direction), tree_map(lambda x: expected * x, direction)
    ) <= 1e-6  # fmt: skip


def test_an_operator_s_transpose_and_columns_are_products(tiny):
    adapter = tiny.adapter
    product = research.ggnvp(logits_of(tiny), adapter)
    operator = research.as_linear_operator(product, adapter)
    p = research.ravel(adapter).numel()
    assert isinstance(operator, LinearOperator)
    assert operator.shape == (p, p) and operator.dtype == np.float64
    x = np.random.default_rng(0).standard_normal((p, 2))
    expected = research.ravel(product(research.unravel(x[:, 1], adapter))).numpy()
    for found in (operator @ x[:, 1], (operator @ x)[:, 1], operator.T @ x[:, 1]):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)


def test_an_operator_over_16_bit_leaves_is_float32():
    adapter = {"a": torch.ones(2, 3, dtype=torch.bfloat16), "b": torch.ones(2)}
    operator = research.as_linear_operator(lambda v: tree_map(lambda x: 2 * x, v), adapter)
    assert operator.dtype == np.float32
    assert (operator @ np.arange(8.0) == 2 * np.arange(8.0)).all()


def test_a_vector_and_a_tree_are_turned_into_each_other(tiny):
    vector = research.ravel(tiny.adapter)
    tree = research.unravel(vector.numpy(), tiny.adapter)
    assert relative_error(tree, tiny.adapter) == 0
    assert relative_error(research.unravel(vector.flip(0).numpy()[::-1], tiny.adapter), tree) == 0


# ── errors ────────────────────────────────────────────────────────────────────────────────


def plain(name: str) -> Callable[..., Any]:
    """A function below the type hook that the tests may run with: its error would come first."""
    function = getattr(research, name)
    return getattr(function, "__wrapped__", function)


LEAF = {"b": torch.ones(2, 2)}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plain("hvp")(5, {}, method="fast"), "(?s)fn=5.*method='fast'.*without tensors"),
        (lambda: research.hvp(lambda a: a["b"].sum(), {"b": torch.ones(2).long()}), "leaf 0 is"),
        (lambda: research.hvp(lambda a: a["b"], LEAF), "returns a scalar"),
        (lambda: research.hvp(lambda a: a["b"].sum(), LEAF)({"c": 1}), "structure"),
        (
            lambda: research.hvp(lambda a: a["b"].sum(), LEAF)({"b": torch.ones(3)}),
            r"leaf 0 is a Tensor \[3\]",
        ),
        (lambda: plain("ggnvp")(None, LEAF), "logits_fn=None"),
        (
            lambda: research.ggnvp(lambda a: a["b"], LEAF, weights=torch.ones(3)),
            r"weights must be a tensor \[2\]",
        ),
        (lambda: plain("as_linear_operator")(LEAF, 5), "(?s)fn=.*leaf 0"),
        (
            lambda: research.as_linear_operator(lambda v: v["b"].sum(), LEAF) @ np.ones(4),
            "fn being hvp's result, needs a tree",
        ),
        (lambda: research.ravel({"b": 5}), "leaf 0 is 5"),
        (lambda: research.unravel(torch.ones(5), LEAF), r"vector \[4\].*got a Tensor \[5\]"),
        (lambda: research.unravel(1j * np.ones(4), LEAF), "real number.*complex128"),
        (lambda: research.unravel(None, LEAF), "got None"),
        (lambda: research.unravel("abc", LEAF), "got 'abc'"),
        (lambda: research.as_linear_operator(lambda v: v, LEAF) @ (1j * np.ones(4)), "complex128"),
        (lambda: plain("ggnvp")(lambda a: (a["b"], 1), LEAF), "ggnvp needs .* got a tuple of"),
        (lambda: plain("ggnvp")(lambda a: 3.0, LEAF), r"tensor \[..., v\], got 3.0"),
        (lambda: plain("ggnvp")(lambda a: a["b"].sum(), LEAF), r"got a Tensor \[\]"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_without_scipy_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "scipy.sparse.linalg", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install -e .\.\[research\]"):
        research.as_linear_operator(lambda v: v, LEAF)
