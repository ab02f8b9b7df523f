"""The Fisher diagonal, the Laplace posterior and SAM against loops, dense matrices and formulas."""

import math
from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import jacrev
from torch.utils._pytree import tree_leaves, tree_map

import fastlora
from fastlora import functional as FL
from fastlora import research
from fastlora.model import Model
from fastlora.research.trees import inner
from oracles.batches import batch_of
from oracles.trees import relative_error, same_bits

BATCHES = [batch_of(2, 6), batch_of(1, 6, seed=3)]


def row_losses(model: Model) -> Callable[[Any, Any], Tensor]:
    return lambda a, batch: FL.row_losses(a, model.base, model.spec, batch)[0]


def example_gradients(model: Model) -> list[Any]:
    """The gradient of every example, one by one."""
    rows = [
        {k: x[i : i + 1] for k, x in b.items()} for b in BATCHES for i in range(len(b["labels"]))
    ]
    gradient = fastlora.value_and_grad(lambda a, row: row_losses(model)(a, row).sum())
    return [gradient(model.adapter, row)[1] for row in rows]


@pytest.fixture(scope="module")
def posterior(shallow) -> research.Laplace:
    return research.laplace(row_losses(shallow), shallow.adapter, BATCHES)


def test_the_fisher_diagonal_is_the_mean_square_of_single_gradients(shallow):
    expected = tree_map(lambda *g: sum(x.square() for x in g) / len(g), *example_gradients(shallow))
    found = research.fisher_diagonal(row_losses(shallow), shallow.adapter, iter(BATCHES))
    assert relative_error(found, expected) <= 1e-10


def test_over_all_labels_it_is_the_gauss_newton_matrix_s_diagonal(shallow):
    """24 equal rows with the 24 labels: with sqrt(p) log p as losses, the sum of squares is the
    expectation of the squared gradient of -log p."""
    ids, adapter = torch.tensor([[3, 5]]), shallow.adapter
    logits = lambda a, ids: FL.forward(a, shallow.base, shallow.spec, ids)[:, 0]
    roots = logits(adapter, ids).softmax(-1).sqrt()[0]
    weighted = lambda a, ids: -roots * logits(a, ids).log_softmax(-1).diagonal()
    found = research.fisher_diagonal(weighted, adapter, [ids.expand(24, 2)])
    product = research.ggnvp(lambda a: logits(a, ids), adapter)
    at = lambda tree: tree["layers"][0]["v_proj"].b
    for i in range(3):
        unit = tree_map(torch.zeros_like, adapter)
        at(unit)[i, 1] = 1.0
        torch.testing.assert_close(24 * at(found)[i, 1], at(product(unit))[i, 1])


def test_the_posterior_s_variance_is_the_inverse_of_fisher_and_prior(shallow, posterior):
    sums = tree_map(lambda *g: sum(x.square() for x in g), *example_gradients(shallow))
    assert posterior.examples == 3
    given = posterior.with_prior(0.7)
    assert relative_error(given.variance(), tree_map(lambda f: 1 / (f + 0.7), sums)) <= 1e-10
    direct = research.laplace(row_losses(shallow), shallow.adapter, BATCHES, prior_precision=0.7)
    assert same_bits(direct.variance(), given.variance())


def test_the_evidence_is_that_of_a_gaussian_integral(posterior):
    """log of the integral of exp(-F e^2 / 2) N(a + e; 0, 1 / precision) de, number by number."""
    a, f = (research.ravel(x) for x in (posterior.mean, posterior.fisher))
    prior = posterior.prior_precision
    covariance = torch.diag(1 / (f + prior))
    expected = 0.5 * (a.numel() * math.log(prior) - prior * a @ a + torch.logdet(covariance))
    assert math.isclose(posterior.log_evidence(), expected.item(), rel_tol=1e-9)


def test_the_chosen_prior_has_the_largest_evidence(posterior):
    best = posterior.log_evidence()
    for factor in (0.5, 0.99, 1.01, 2.0):
        assert posterior.with_prior(factor * posterior.prior_precision).log_evidence() < best


def test_samples_have_the_posterior_s_mean_and_variance(posterior):
    away = tree_map(lambda x, m: (x - m).flatten(1).T, posterior.samples(400, 1), posterior.mean)
    drawn = research.ravel(away).view(-1, 400)
    variance = research.ravel(posterior.variance())
    z = drawn / variance.sqrt()[:, None]
    # Of p = 300 numbers and more: five standard errors of the means, and of the mean square.
    assert z.mean(1).abs().max() <= 5 / 20
    assert abs(z.square().mean() - 1) <= 5 * math.sqrt(2 / z.numel())


def test_a_sample_depends_on_its_number_and_seed_alone(posterior):
    nth = lambda tree, i: tree_map(lambda x: x[i], tree)
    many, others = posterior.samples(3, seed=5), posterior.samples(4, seed=6)
    assert same_bits(nth(many, 2), nth(posterior.samples(5, seed=5), 2))
    every = [nth(many, i) for i in range(3)] + [nth(others, i) for i in range(4)]
    assert not any(same_bits(x, y) for x, y in combinations(every, 2))


def test_samples_run_as_a_stack_in_one_pass(shallow, posterior):
    ids, samples = BATCHES[0]["input_ids"], posterior.samples(3, seed=0)
    run = lambda a, ids: FL.forward(a, shallow.base, shallow.spec, ids)
    found = run(samples, ids.repeat(3, 1)).view(3, *ids.shape, -1)
    for i in range(3):
        expected = run(tree_map(lambda x, i=i: x[i], samples), ids)
        assert relative_error(found[i], expected) <= 1e-10


def test_predictions_average_the_linearised_logits_of_samples(shallow, posterior):
    ids = BATCHES[0]["input_ids"]
    logits = lambda a: FL.forward(a, shallow.base, shallow.spec, ids)[:, -1, :5]
    j = jacrev(logits)(shallow.adapter)
    flat = torch.cat([x.flatten(2) for x in tree_leaves(j)], -1)  # [2, 5, p]
    drawn = tree_map(lambda x, m: x - m, posterior.samples(4, seed=9), posterior.mean)
    deviations = torch.cat([x.flatten(1) for x in tree_leaves(drawn)], -1)
    each = logits(shallow.adapter) + torch.einsum("mcp,np->nmc", flat, deviations)
    found = posterior.predict(logits, samples=4, seed=9)
    assert relative_error(found, each.softmax(-1).mean(0)) <= 1e-10
    torch.testing.assert_close(found.sum(-1), torch.ones(2, dtype=torch.float64))


def test_a_certain_posterior_predicts_as_the_adapter_does(shallow, posterior):
    ids = BATCHES[0]["input_ids"]
    logits = lambda a: FL.forward(a, shallow.base, shallow.spec, ids)[:, -1]
    found = posterior.with_prior(1e12).predict(logits, samples=2)
    assert relative_error(found, logits(shallow.adapter).softmax(-1)) <= 1e-4


def test_a_wide_posterior_is_less_confident():
    zeros = {"x": torch.zeros(5)}
    posterior = research.Laplace(mean=zeros, fisher=zeros, examples=1, prior_precision=0.25)
    logits = lambda a: torch.tensor([6.0, 0, 0, 0, 0]) + a["x"]
    found = posterior.predict(logits, samples=256)
    assert found.argmax() == 0
    assert 0.5 < found[0] < logits(zeros).softmax(-1)[0] - 0.02


# ── sharpness ─────────────────────────────────────────────────────────────────────────────


def test_sam_s_gradient_is_that_at_the_worst_point(shallow):
    loss = lambda a, seed: FL.loss(a, shallow.base, shallow.spec, BATCHES[0], seed=seed)
    plain = fastlora.value_and_grad(loss)
    value, gradient = plain(shallow.adapter, 3)
    norm = inner(gradient, gradient).sqrt()
    worst = tree_map(lambda x, g: x + 0.01 * g / norm, shallow.adapter, gradient)
    found_value, found = research.sam_value_and_grad(loss, rho=0.01)(shallow.adapter, 3)
    assert found_value == value
    assert plain(worst, 3)[0] > value
    assert relative_error(found, plain(worst, 3)[1]) <= 1e-10
    still = research.sam_value_and_grad(loss, rho=0)(shallow.adapter, 3)[1]
    assert same_bits(still, gradient)


@pytest.mark.parametrize("size", [1e-4, 400.0])  # whose squares float16 cannot hold
def test_sam_s_step_has_the_length_rho_in_float16(size):
    fn = lambda a: (size * a["x"] + (a["x"].float() - 1).square() / 2).sum()
    start = {"x": torch.ones(4, dtype=torch.float16)}
    _, gradient = research.sam_value_and_grad(fn, rho=0.5)(start)
    expected = torch.full((4,), size + 0.25, dtype=torch.float16)  # each number moves by 0.5 / 2
    torch.testing.assert_close(gradient["x"], expected, rtol=2e-3, atol=2e-3)


def test_sam_over_a_gradient_of_zero_stays_finite():
    value, gradient = research.sam_value_and_grad(lambda a: (0 * a["x"]).sum())(
        {"x": torch.ones(3)}
    )
    assert value == 0 and not gradient["x"].any()


# ── errors ────────────────────────────────────────────────────────────────────────────────


def plain_function(function: Any) -> Callable[..., Any]:
    """Below the type hook that the tests may run with: its error would come first."""
    return getattr(function, "__wrapped__", function)


ONES = {"b": torch.ones(2)}
SQUARES = lambda a, batch: a["b"] * batch


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (research.fisher_diagonal, (5, {}, "x"), "(?s)fn=5.*batches='x'.*without tensors"),
        (research.fisher_diagonal, (SQUARES, ONES, []), "no example"),
        (research.laplace, (5, {"b": 1}, {}), "(?s)fn=5.*batches=.*leaf 0"),
        (research.laplace, (SQUARES, ONES, iter(())), "no example"),
        (research.sam_value_and_grad, (5,), "fn=5"),
    ],
)
def test_wrong_arguments_are_refused(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        plain_function(function)(*arguments)


def test_gradients_of_zero_have_no_evidence(shallow):
    zero = lambda a, batch: 0 * row_losses(shallow)(a, batch)
    with pytest.raises(ValueError, match="pass prior_precision"):
        research.laplace(zero, shallow.adapter, BATCHES)


@pytest.mark.parametrize("wrong", [0, -1.0, "fisher", None, math.nan, True])
def test_wrong_priors_are_refused(wrong):
    laplace = plain_function(research.laplace)
    with pytest.raises(ValueError, match="prior_precision="):
        laplace(SQUARES, ONES, [1.0], prior_precision=wrong)


def test_wrong_arguments_of_methods_are_refused(posterior):
    for call, message in (
        (lambda: plain_function(research.Laplace.samples)(posterior, 0, -1), "(?s)n=0.*seed=-1"),
        (lambda: posterior.with_prior(-1.0), "prior_precision=-1"),
        (
            lambda: plain_function(research.Laplace.predict)(posterior, 5, samples=0, seed="a"),
            "(?s)logits_fn=5.*samples=0.*seed='a'",
        ),
        (lambda: posterior.predict(lambda a: (1, 2)), r"Laplace.predict needs .* got \(1, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match="rho=-1"):
        research.sam_value_and_grad(SQUARES, rho=-1.0)
