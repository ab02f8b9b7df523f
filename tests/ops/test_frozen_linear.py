"""Products with quantised matrices equal those with the dequantised matrix and do not keep it."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora.ops.linear.frozen import frozen_linear, frozen_linear_reference
from fastlora.ops.linear.lora import lora_linear, lora_linear_reference
from fastlora.ops.quant.bitsandbytes import quantize_4bit
from fastlora.ops.quant.dequantize import dequantize
from fastlora.ops.quant.weights import Weight8bit, parts

SCALING = 1.5


def drawn(kind: str, dtype=torch.float32, d_in=12, d_out=20, r=4):
    """(x, x_a, weight, the dequantised weight, bias, b, dy)."""
    gen = torch.Generator().manual_seed(0)
    new = lambda *n: torch.randn(*n, generator=gen).to(dtype)
    narrow = torch.float32 if dtype == torch.float64 else dtype  # bitsandbytes has no float64
    dense = new(d_out, d_in).to(narrow)
    weight = {
        "nf4": lambda: quantize_4bit(dense),
        "fp4": lambda: quantize_4bit(dense, quant_type="fp4", nested=False),
        "int8": lambda: Weight8bit(
            (30 * dense).clamp(-127, 127).to(torch.int8), dense[:, 0].float()
        ),
    }[kind]()
    plain = dequantize(weight, dtype)
    x, x_a, dy = new(2, 5, d_in), new(2, 5, r), new(2, 5, d_out)
    return x, x_a, weight, plain, new(d_out), new(d_out, r), dy


def value_and_grads(fn, leaves: list[Tensor], dy: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in leaves]
    y = fn(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


KINDS = ["nf4", "fp4", "int8"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_products_equal_those_of_the_dequantised_matrix_to_the_bit(kind, dtype, bias):
    x, x_a, weight, plain, vector, b, dy = drawn(kind, dtype)
    vector = vector if bias else None
    ours = value_and_grads(lambda x: frozen_linear(x, weight, vector), [x], dy)
    theirs = value_and_grads(lambda x: frozen_linear(x, plain, vector), [x], dy)
    assert all(map(torch.equal, ours, theirs))
    adapted = lambda w: lambda x, x_a, b: lora_linear(x, x_a, w, vector, b, SCALING)
    ours, theirs = (value_and_grads(adapted(w), [x, x_a, b], dy) for w in (weight, plain))
    assert all(map(torch.equal, ours, theirs))


def test_trained_bias_gets_its_gradient():
    x, x_a, weight, plain, bias, b, dy = drawn("nf4")
    for fn in (
        lambda w: lambda v: frozen_linear(x, w, v),
        lambda w: lambda v: lora_linear(x, x_a, w, v, b, SCALING),
    ):
        ours, theirs = (value_and_grads(fn(w), [bias], dy) for w in (weight, plain))
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_no_dequantised_matrix_is_saved_for_the_backward_pass(kind):
    x, x_a, weight, plain, bias, b, _ = drawn(kind)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        frozen_linear(x.requires_grad_(), weight, bias)
        lora_linear(x, x_a, weight, bias, b.requires_grad_(), SCALING)
        own = {p.data_ptr() for p in parts(weight)}
        assert saved and not [
            t for t in saved if t.shape[-2:] == plain.shape and t.data_ptr() not in own
        ]
        saved.clear()  # the check above can fail: the reference does save the matrix
        frozen_linear_reference(x, weight, bias)
        assert [t for t in saved if sorted(t.shape) == sorted(plain.shape)]


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_of_both_orders_equal_finite_differences(kind):
    x, x_a, weight, _, bias, b, _ = drawn(kind, torch.float64, d_in=4, d_out=5, r=2)
    leaves = [
        t[:1].detach().requires_grad_() if t is not b else b.requires_grad_() for t in (x, x_a, b)
    ]
    fn = lambda x, x_a, b: lora_linear(x, x_a, weight, bias, b, SCALING) + frozen_linear(x, weight)
    assert torch.autograd.gradcheck(fn, leaves) and torch.autograd.gradgradcheck(fn, leaves)


def test_torch_func_equals_the_dequantised_matrix():
    x, x_a, weight, plain, bias, b, dy = drawn("nf4")
    loss = lambda w: lambda x, b: (lora_linear(x, x_a, w, bias, b, SCALING) * dy).sum()
    grads = lambda w: torch.func.grad(loss(w), argnums=(0, 1))(x, b)
    torch.testing.assert_close(grads(weight), grads(plain))
    stack = torch.stack([b, -b])
    mapped = lambda w: torch.vmap(torch.func.grad(loss(w), argnums=1), in_dims=(None, 0))(x, stack)
    torch.testing.assert_close(mapped(weight), mapped(plain))
    tangent = lambda w: torch.func.jvp(lambda x: frozen_linear(x, w, bias), (x,), (x,))
    torch.testing.assert_close(tangent(weight), tangent(plain))


def test_reference_is_torchs_linear_layer():
    x, x_a, weight, plain, bias, b, _ = drawn("nf4")
    torch.testing.assert_close(frozen_linear_reference(x, weight, bias), F.linear(x, plain, bias))
    torch.testing.assert_close(
        lora_linear_reference(x, x_a, weight, bias, b, SCALING),
        F.linear(x, plain, bias) + SCALING * F.linear(x_a, b),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_custom_ops_pass_opcheck(kind):
    x, _, weight, _, bias, _, dy = drawn(kind)
    check = lambda op, *args: torch.library.opcheck(
        op.default, args, test_utils=("test_schema", "test_faketensor")
    )
    ops = torch.ops.fastlora
    check(ops.quantized_linear, x[0], parts(weight), bias)
    check(ops.quantized_mm, dy[0], parts(weight))
    check(ops.dequantize, parts(weight), torch.bfloat16)


@pytest.mark.compile
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_gradient_equals_eager(kind, fresh_dynamo):
    x, x_a, weight, _, bias, b, dy = drawn(kind)

    def both(x, x_a, b):
        return lora_linear(x, x_a, weight, bias, b, SCALING) + frozen_linear(x, weight, bias)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    ours, eager = (value_and_grads(f, [x, x_a, b], dy) for f in (compiled, both))
    torch.testing.assert_close(ours, eager)


@pytest.mark.compile
def test_compiling_a_transform_gives_its_gradient(fresh_dynamo):
    x, x_a, weight, plain, bias, b, dy = drawn("nf4")
    loss = lambda w: lambda b: (lora_linear(x, x_a, w, bias, b, SCALING) * dy).square().sum()
    grad = torch.compile(torch.func.grad(loss(weight)), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(grad(b), torch.func.grad(loss(plain))(b))


@pytest.mark.compile
@pytest.mark.parametrize("kind", KINDS)
def test_ops_compile_if_nothing_requires_a_gradient(kind, fresh_dynamo):
    """For each number of weight parts: dynamo compares the number of arguments in this case."""
    x, x_a, weight, _, bias, b, _ = drawn(kind)

    def fn(x):
        return lora_linear(x, x_a, weight, bias, b, SCALING) + frozen_linear(x, weight, bias)

    torch.testing.assert_close(torch.compile(fn, fullgraph=True, backend="aot_eager")(x), fn(x))
