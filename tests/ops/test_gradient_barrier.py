"""gradient_barrier is the identity for values and all derivatives, eager and compiled."""

import pytest
import torch

from fastlora.ops.gradient_barrier import gradient_barrier


def with_barrier(x):
    return gradient_barrier(x * x).sin()


def without_barrier(x):
    return (x * x).sin()


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.compile)])
def test_value_and_gradient_equal_those_without_a_barrier(compiled):
    x = torch.linspace(-1, 1, 15, dtype=torch.float64).view(3, 5).requires_grad_()
    fn = torch.compile(with_barrier, fullgraph=True) if compiled else with_barrier
    y, expected = fn(x), without_barrier(x)
    torch.testing.assert_close(y, expected)
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, torch.autograd.grad(expected.sum(), x)[0])


def test_shared_gradient_is_not_changed():
    """settle_ declares that it writes, but does not. x.sum()'s gradient is one expanded element."""
    x = torch.ones(3, 5, requires_grad=True)
    dy = torch.ones(()).expand(3, 5)
    torch.ops.fastlora.settle_(dy)
    (dx,) = torch.autograd.grad(x, x, dy)
    assert dx.equal(torch.ones(3, 5))


def test_barrier_supports_transforms_and_second_derivatives():
    x = torch.linspace(-1, 1, 6, dtype=torch.float64).view(2, 3)
    hessian = lambda f: torch.func.hessian(lambda x: f(x).sum())(x)
    torch.testing.assert_close(hessian(with_barrier), hessian(without_barrier))
    leaf = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(with_barrier(leaf).sum(), leaf, create_graph=True)
    (ddx,) = torch.autograd.grad(dx.sum(), leaf)
    torch.testing.assert_close(ddx.flatten(), hessian(without_barrier).sum((0, 1)).flatten())
