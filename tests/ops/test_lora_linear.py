"""lora_linear against its reference: values, first and second derivatives, torch.func, compiled."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora.ops.linear.lora import lora_linear, lora_linear_reference

# (leading dimensions, d_in, d_out, r)
SHAPES = [((2, 5), 12, 20, 4), ((7,), 33, 9, 1), ((1, 1), 1, 1, 1), ((2, 3, 4), 8, 8, 16)]
SCALING = 1.5


def drawn(shape, dtype=torch.float32, bias=True) -> list[Tensor | None]:
    """x, x_a, weight, bias, b and the output's gradient."""
    lead, d_in, d_out, r = shape
    gen = torch.Generator().manual_seed(0)
    new = lambda *n: torch.randn(*n, generator=gen, dtype=torch.float64).to(dtype)
    b = new(d_out) if bias else None
    return [new(*lead, d_in), new(*lead, r), new(d_out, d_in), b, new(d_out, r), new(*lead, d_out)]


def value_and_grads(fn, x, x_a, weight, bias, b, dy) -> list[Tensor]:
    """y and the gradients of x, x_a and b."""
    x, x_a, b = (t.detach().requires_grad_() for t in (x, x_a, b))
    y = fn(x, x_a, weight, bias, b, SCALING)
    return [y.detach(), *torch.autograd.grad(y, (x, x_a, b), dy)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_op_errs_no_more_than_the_reference(shape, dtype, bias):
    args = drawn(shape, dtype, bias)
    exact = value_and_grads(
        lora_linear_reference, *(None if t is None else t.double() for t in args)
    )
    plain, fused = (value_and_grads(f, *args) for f in (lora_linear_reference, lora_linear))
    for f, p, e in zip(fused, plain, exact, strict=True):
        error = lambda t, e=e: (t.double() - e).norm().item()
        assert f.dtype == dtype and f.shape == p.shape
        assert error(f) <= 1.2 * error(p) + 4 * torch.finfo(dtype).eps * e.norm().item()


def test_op_equals_a_linear_layer_with_the_merged_weight():
    x, _, weight, bias, b, _ = drawn(SHAPES[0], torch.float64)
    a = torch.randn(4, 12, dtype=torch.float64)
    merged = F.linear(x, weight + SCALING * b @ a, bias)
    ours = lora_linear(x, F.linear(x, a), weight, bias, b, SCALING)
    torch.testing.assert_close(ours, merged)


def test_derivatives_of_both_orders_equal_finite_differences():
    x, x_a, weight, bias, b, _ = drawn(((2, 3), 4, 5, 2), torch.float64)
    fn = lambda x, x_a, b: lora_linear(x, x_a, weight, bias, b, SCALING)
    leaves = [t.requires_grad_() for t in (x, x_a, b)]
    assert torch.autograd.gradcheck(fn, leaves)
    assert torch.autograd.gradgradcheck(fn, leaves)


def test_weight_or_bias_that_requires_a_gradient_gets_one():
    x, x_a, weight, bias, b, dy = drawn(SHAPES[0], torch.float64)
    for leaf in (weight, bias):
        leaf.requires_grad_()
        y = lora_linear(x, x_a, weight, bias, b, SCALING)
        (g,) = torch.autograd.grad(y, leaf, dy)
        assert g.any()
        leaf.requires_grad_(False)


@pytest.mark.parametrize("needed", ["x", "x_a", "b"])
def test_single_required_gradient_is_right(needed):
    x, x_a, weight, bias, b, dy = drawn(SHAPES[0])
    given = {"x": x, "x_a": x_a, "b": b}
    leaf = given[needed] = given[needed].requires_grad_()
    y = lora_linear(given["x"], given["x_a"], weight, bias, given["b"], SCALING)
    expected = value_and_grads(lora_linear_reference, x, x_a, weight, bias, b, dy)
    (g,) = torch.autograd.grad(y, leaf, dy)
    torch.testing.assert_close(g, expected[1 + list(given).index(needed)])


def test_inputs_are_not_written_to():
    args = drawn(SHAPES[0])
    before = [t.clone() for t in args]
    value_and_grads(lora_linear, *args)
    assert all(torch.equal(t, c) for t, c in zip(args, before, strict=True))


def test_strided_input_equals_contiguous_input():
    x, x_a, weight, bias, b, _ = drawn(SHAPES[0])
    turned = lambda t: t.transpose(0, 1).contiguous().transpose(0, 1)
    strided = lora_linear(turned(x), turned(x_a), weight, bias, b, SCALING)
    torch.testing.assert_close(strided, lora_linear(x, x_a, weight, bias, b, SCALING))


def test_torch_func_equals_the_reference():
    x, x_a, weight, bias, b, dy = drawn(SHAPES[0])
    loss = lambda x, x_a, b: (lora_linear(x, x_a, weight, bias, b, SCALING) * dy).sum()
    grads = torch.func.grad(loss, argnums=(0, 1, 2))(x, x_a, b)
    expected = value_and_grads(lora_linear_reference, x, x_a, weight, bias, b, dy)[1:]
    torch.testing.assert_close(list(grads), expected)
    tangent = torch.func.jvp(lambda b: lora_linear(x, x_a, weight, bias, b, SCALING), (b,), (b,))[1]
    torch.testing.assert_close(tangent, SCALING * x_a @ b.t())


@pytest.mark.compile
@pytest.mark.parametrize("bias", [True, False])
def test_compiled_gradient_equals_eager(bias, fresh_dynamo):
    args = drawn(SHAPES[0], bias=bias)
    compiled = torch.compile(lora_linear, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        value_and_grads(compiled, *args), value_and_grads(lora_linear, *args)
    )


@pytest.mark.compile
def test_compiling_a_transform_gives_its_gradient(fresh_dynamo):
    """torch.compile(torch.func.grad(f)) drops the backward of an autograd.Function (torch 2.13)."""
    x, x_a, weight, bias, b, dy = drawn(SHAPES[0])
    loss = lambda x_a: (lora_linear(x, x_a, weight, bias, b, SCALING) * dy).sum()
    compiled = torch.compile(
        lambda x_a: torch.func.grad(loss)(x_a), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(x_a), SCALING * dy @ b)


def test_custom_op_passes_opcheck():
    x, x_a, weight, bias, b, _ = drawn(((6,), 12, 20, 4))
    for given in (bias, None):
        torch.library.opcheck(
            torch.ops.fastlora.lora_linear.default,
            (x, x_a, [weight], given, b, SCALING),
            test_utils=("test_schema", "test_faketensor"),
        )
