"""A barrier is the identity, of any order of derivative, eager and compiled."""

import pytest
import torch

from fastlora.ops.gradient_barrier import gradient_barrier


def sharp(x):
    return gradient_barrier(x * x).sin()


def plain(x):
    return (x * x).sin()


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.compile)])
def test_value_and_gradient_are_those_without(compiled):
    x = torch.linspace(-1, 1, 15, dtype=torch.float64).view(3, 5).requires_grad_()
    fn = torch.compile(sharp, fullgraph=True) if compiled else sharp
    y, expected = fn(x), plain(x)
    torch.testing.assert_close(y, expected)
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, torch.autograd.grad(expected.sum(), x)[0])


def test_a_gradient_that_others_hold_is_not_changed():
    """settle_ only says that it writes; x.sum()'s gradient is one element, expanded."""
    x = torch.ones(3, 5, requires_grad=True)
    dy = torch.ones(()).expand(3, 5)
    torch.ops.fastlora.settle_(dy)
    (dx,) = torch.autograd.grad(x, x, dy)
    assert dx.equal(torch.ones(3, 5))


def test_it_stands_under_transforms_and_second_derivatives():
    x = torch.linspace(-1, 1, 6, dtype=torch.float64).view(2, 3)
    hessian = lambda f: torch.func.hessian(lambda x: f(x).sum())(x)
    torch.testing.assert_close(hessian(sharp), hessian(plain))
    leaf = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(sharp(leaf).sum(), leaf, create_graph=True)
    (ddx,) = torch.autograd.grad(dx.sum(), leaf)
    torch.testing.assert_close(ddx.flatten(), hessian(plain).sum((0, 1)).flatten())
