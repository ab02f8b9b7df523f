"""grouped_linear and grouped_lora_linear against a loop; first and second derivatives."""

import pytest
import torch
from torch import Tensor

from fastlora.ops.linear.experts import (
    grouped_linear,
    grouped_linear_reference,
    grouped_lora_linear,
    grouped_lora_linear_reference,
)

# (rows of each group, d_in, d_out, r). With the first, a middle or the last group empty, one group,
# one row.
SHAPES = [([3, 0, 4, 1], 12, 20, 4), ([0, 5, 0], 9, 7, 1), ([6], 8, 8, 16), ([0, 0, 1], 1, 1, 1)]
SCALING = 1.5


def drawn(shape, dtype=torch.float32) -> list[Tensor]:
    """x, weight, a, b, offsets and the output's gradient."""
    sizes, d_in, d_out, r = shape
    gen = torch.Generator().manual_seed(0)
    new = lambda *n: torch.randn(*n, generator=gen, dtype=torch.float64).to(dtype)
    e, m = len(sizes), sum(sizes)
    offsets = torch.tensor(sizes).cumsum(0).to(torch.int32)
    return [
        new(m, d_in),
        new(e, d_out, d_in),
        new(e, r, d_in),
        new(e, d_out, r),
        offsets,
        new(m, d_out),
    ]


def value_and_grads(fn, x, weight, a, b, offsets, dy) -> list[Tensor]:
    """y and the gradients of x, a and b."""
    x, a, b = (t.detach().requires_grad_() for t in (x, a, b))
    y = fn(x, weight, a, b, offsets, SCALING)
    return [y.detach(), *torch.autograd.grad(y, (x, a, b), dy)]


@pytest.mark.parametrize("shape", SHAPES)
def test_reference_equals_a_loop_over_groups(shape):
    x, weight, a, b, offsets, _ = drawn(shape, torch.float64)
    starts = [0, *offsets.tolist()[:-1]]
    merged = weight + SCALING * b @ a
    rows = lambda w: torch.cat(
        [x[s:e] @ w[g].t() for g, (s, e) in enumerate(zip(starts, offsets.tolist(), strict=True))]
    )
    torch.testing.assert_close(grouped_linear_reference(x, weight, offsets), rows(weight))
    ours = grouped_lora_linear_reference(x, weight, a, b, offsets, SCALING)
    torch.testing.assert_close(ours, rows(merged))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_op_errs_no_more_than_the_reference(shape, dtype):
    args = drawn(shape, dtype)
    double = [t.double() if t.is_floating_point() else t for t in args]
    exact = value_and_grads(grouped_lora_linear_reference, *double)
    plain = value_and_grads(grouped_lora_linear_reference, *args)
    fused = value_and_grads(grouped_lora_linear, *args)
    for f, p, e in zip(fused, plain, exact, strict=True):
        error = lambda t, e=e: (t.double() - e).norm().item()
        assert f.dtype == dtype and f.shape == p.shape
        assert error(f) <= 1.2 * error(p) + 4 * torch.finfo(dtype).eps * e.norm().item()


def test_gradient_of_an_empty_group_is_zero():
    args = drawn(SHAPES[0])
    _, _, da, db = value_and_grads(grouped_lora_linear, *args)
    assert da[0].any() and not da[1].any() and not db[1].any()


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_derivatives_of_both_orders_equal_finite_differences(shape):
    x, weight, a, b, offsets, _ = drawn(shape, torch.float64)
    fn = lambda x, a, b: grouped_lora_linear(x, weight, a, b, offsets, SCALING)
    leaves = [t.requires_grad_() for t in (x, a, b)]
    assert torch.autograd.gradcheck(fn, leaves)
    assert torch.autograd.gradgradcheck(fn, leaves)
    plain = lambda x: grouped_linear(x, weight, offsets)
    assert torch.autograd.gradcheck(plain, x) and torch.autograd.gradgradcheck(plain, x)


def test_weight_that_requires_a_gradient_gets_one():
    x, weight, a, b, offsets, dy = drawn(SHAPES[0], torch.float64)
    weight.requires_grad_()
    for y in (
        grouped_linear(x, weight, offsets),
        grouped_lora_linear(x, weight, a, b, offsets, SCALING),
    ):
        (g,) = torch.autograd.grad(y, weight, dy)
        assert g[0].any() and not g[1].any()


def test_strided_input_equals_contiguous_input():
    x, weight, a, b, offsets, _ = drawn(SHAPES[0])
    strided = grouped_lora_linear(x.t().contiguous().t(), weight, a, b, offsets, SCALING)
    torch.testing.assert_close(strided, grouped_lora_linear(x, weight, a, b, offsets, SCALING))


def test_torch_func_equals_autograd_and_vmap_maps_offsets():
    x, weight, a, b, offsets, dy = drawn(SHAPES[0])
    loss = lambda x, a, b: (grouped_lora_linear(x, weight, a, b, offsets, SCALING) * dy).sum()
    grads = torch.func.grad(loss, argnums=(0, 1, 2))(x, a, b)
    expected = value_and_grads(grouped_lora_linear, x, weight, a, b, offsets, dy)[1:]
    torch.testing.assert_close(list(grads), expected)
    other = torch.tensor([1, 1, 7, 8], dtype=torch.int32)
    together = torch.func.vmap(lambda offsets: grouped_linear(x, weight, offsets))(
        torch.stack((offsets, other))
    )
    torch.testing.assert_close(together[0], grouped_linear(x, weight, offsets))
    torch.testing.assert_close(together[1], grouped_linear(x, weight, other))


@pytest.mark.compile
def test_compiled_gradient_equals_eager(fresh_dynamo):
    args = drawn(SHAPES[0])
    compiled = torch.compile(grouped_lora_linear, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        value_and_grads(compiled, *args), value_and_grads(grouped_lora_linear, *args)
    )


def test_custom_ops_pass_opcheck():
    x, weight, a, b, offsets, dy = drawn(SHAPES[0])
    x_a = grouped_linear(x, a, offsets)
    for args in ((None, None, 0.0), (x_a, b, SCALING)):
        torch.library.opcheck(
            torch.ops.fastlora.grouped_linear.default,
            (x, weight, offsets, *args),
            test_utils=("test_schema", "test_faketensor"),
        )
    torch.library.opcheck(
        torch.ops.fastlora.grouped_outer.default,
        (dy, x, offsets),
        test_utils=("test_schema", "test_faketensor"),
    )
