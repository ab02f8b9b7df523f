"""rms_norm against transformers' module and float64."""

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from fastlora.ops.decode.norm import norm_rows
from fastlora.ops.rms_norm import rms_norm

EPS = 1e-5
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
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


MODULES = {"narrow": LlamaRMSNorm, "wide": Olmo2RMSNorm, "one_plus": Gemma2RMSNorm}


def theirs(x, weight, eps, kind="narrow"):
    module = MODULES[kind](x.shape[-1], eps)
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


@pytest.mark.parametrize("kind", ["wide", "one_plus"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_kinds_equal_transformers(dtype, kind):
    ours = lambda *given: rms_norm(*given, kind)
    found = value_and_dx(ours, *drawn((5, 100), dtype))
    expected = value_and_dx(lambda *given: theirs(*given, kind), *drawn((5, 100), dtype))
    assert torch.equal(found[0], expected[0]) and found[0].dtype == dtype
    torch.testing.assert_close(found[1], expected[1])


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kernel_of_rows_errs_no_more_than_plain_torch(dtype, kind):
    pytest.importorskip("triton", reason="the kernel's test needs triton")
    x, weight, residual = (y.to(DEVICE) for y in drawn((5, 100), dtype))
    for added in (None, residual):
        wide = None if added is None else added.double()
        exact = norm_rows(x.double(), weight.double(), EPS, kind, wide)
        plain, fused = (
            norm_rows(x, weight, EPS, kind, added, kernels=k) for k in ("torch", "triton")
        )
        error = lambda y, exact=exact: (y.double() - exact).norm().item()
        assert fused.dtype == dtype
        assert error(fused) <= error(plain) + torch.finfo(dtype).eps * exact.norm().item()


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
