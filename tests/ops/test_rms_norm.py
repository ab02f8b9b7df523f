"""rms_norm against transformers' module and float64."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from fastlora.ops.rms_norm import rms_norm

EPS = 1e-5
SHAPES = [(2, 3, 64), (5, 100), (1, 1), (2, 1, 4, 12)]


def drawn(shape, dtype=torch.float32):
    gen = torch.Generator().manual_seed(0)
    x, weight, dy = (
        torch.randn(s, generator=gen, dtype=torch.float64) for s in (shape, shape[-1:], shape)
    )
    return x.to(dtype), (1 + 0.1 * weight).to(dtype), dy.to(dtype)


def value_and_dx(norm, x, weight, dy):
    x = x.detach().requires_grad_()
    y = norm(x, weight, EPS)
    return y.detach(), *torch.autograd.grad(y, x, dy)


def theirs(x, weight, eps):
    module = LlamaRMSNorm(x.shape[-1], eps)
    module.weight = torch.nn.Parameter(weight, requires_grad=False)
    return module(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_equal_transformers_to_the_bit(shape, dtype):
    for ours, expected in zip(
        value_and_dx(rms_norm, *drawn(shape, dtype)),
        value_and_dx(theirs, *drawn(shape, dtype)),
        strict=True,
    ):
        assert ours.dtype == dtype and torch.equal(ours, expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_is_close_to_float64(shape):
    for ours, exact in zip(
        value_and_dx(rms_norm, *drawn(shape)),
        value_and_dx(rms_norm, *drawn(shape, torch.float64)),
        strict=True,
    ):
        assert exact.dtype == torch.float64
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)


def test_float64_gradients_equal_finite_differences():
    x, weight, _ = drawn((3, 8), torch.float64)
    fn = lambda x, w: rms_norm(x, w, EPS)
    args = x.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(fn, args) and torch.autograd.gradgradcheck(fn, args)


@pytest.mark.compile
def test_compiled_gradient_equals_eager(fresh_dynamo):
    args = drawn((2, 3, 64))
    compiled = torch.compile(rms_norm, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(value_and_dx(compiled, *args), value_and_dx(rms_norm, *args))


def test_torch_func_equals_autograd():
    x, weight, dy = drawn((5, 100))
    dx = torch.func.grad(lambda x: (rms_norm(x, weight, EPS) * dy).sum())(x)
    torch.testing.assert_close(dx, value_and_dx(rms_norm, x, weight, dy)[1])
