"""qat_linear against torchao's layer on the merged weight: values, gradients, saved tensors."""

import pytest
import torch

from fastlora.adapters.edits.merging import merged_weight
from fastlora.models.params import DoRA, LoRA
from fastlora.ops.linear.qat import qat_linear, qat_linear_reference
from fastlora.ops.quant.fake_quantize import SCHEMES
from oracles.torchao_side import prepared_linear
from oracles.trees import relative_error, same_bits

SCALING = 1.5
NAMES = ("x", "weight", "bias", "a", "b", "magnitude")


def drawn(dtype=torch.float32, dora=False, d_in=128, d_out=40, r=4) -> list[torch.Tensor | None]:
    """x, weight and bias in dtype; a, b, magnitude in float32."""
    gen = torch.Generator().manual_seed(0)
    new = lambda *n: torch.randn(*n, generator=gen)
    x, weight, bias, a, b = (
        new(2, 5, d_in),
        new(d_out, d_in),
        new(d_out),
        new(r, d_in),
        new(d_out, r),
    )
    magnitude = new(d_out).abs() + 5 if dora else None
    return [x.to(dtype), weight.to(dtype), bias.to(dtype), 0.3 * a, 0.3 * b, magnitude]


def value_and_grads(fn, args, scheme, trained=("x", "a", "b", "magnitude")) -> list[torch.Tensor]:
    args = [
        t.detach().requires_grad_(n in trained) if t is not None else None
        for n, t in zip(NAMES, args, strict=True)
    ]
    leaves = [t for t in args if t is not None and t.requires_grad]
    y = fn(*args, SCALING, scheme)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def torchao_linear(x, weight, bias, a, b, magnitude, scaling, scheme):
    """torchao's FakeQuantizedLinear on W + s B A, with autograd through torchao's quantisers."""
    linear = prepared_linear(weight.detach(), bias.detach(), scheme)
    del linear.weight
    total = torch.addmm(weight.float(), b, a, alpha=scaling)
    if magnitude is not None:
        total = total * (magnitude / total.detach().norm(dim=1))[:, None]
    linear.weight = total.to(weight.dtype)
    return linear(x)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_value_equals_torchaos_layer_on_the_merged_weight(scheme, dtype, dora):
    x, weight, bias, a, b, magnitude = args = drawn(dtype, dora)
    lora = LoRA(a, b) if magnitude is None else DoRA(a, b, magnitude)
    expected = prepared_linear(merged_weight(weight, lora, SCALING), bias, scheme)(x)
    assert same_bits(qat_linear(*args, SCALING, scheme), expected)
    assert same_bits(qat_linear_reference(*args, SCALING, scheme), expected)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_equal_torchaos(scheme, dora, straight_float8):
    args = drawn(dora=dora)
    expected = value_and_grads(torchao_linear, args, scheme)
    for fn in (qat_linear, qat_linear_reference):
        assert relative_error(value_and_grads(fn, args, scheme), expected) < 5e-6


@pytest.mark.parametrize("scheme", SCHEMES)
def test_bfloat16_gradients_are_close_to_the_references(scheme):
    args = drawn(torch.bfloat16)
    ours = value_and_grads(qat_linear, args, scheme)
    assert relative_error(ours, value_and_grads(qat_linear_reference, args, scheme)) < 0.02
    assert [t.dtype for t in ours] == [torch.bfloat16] * 2 + [torch.float32] * 2


@pytest.mark.parametrize("scheme", SCHEMES)
def test_chunks_of_rows_change_no_value(scheme, monkeypatch):
    args = drawn(dora=True)
    at_once = value_and_grads(qat_linear, args, scheme)
    monkeypatch.setattr("fastlora.ops.quant.fake_quantize._CHUNK_ELEMENTS", 7 * 128)
    assert relative_error(value_and_grads(qat_linear, args, scheme), at_once) < 1e-5


def test_trained_bias_without_an_adapter_equals_the_reference():
    args = [*drawn()[:3], None, None, None]
    ours = value_and_grads(qat_linear, args, "int8", trained=("x", "bias"))
    expected = value_and_grads(qat_linear_reference, args, "int8", trained=("x", "bias"))
    assert relative_error(ours, expected) < 1e-6


def test_weight_that_requires_a_gradient_gets_one():
    args = drawn()
    every = ("x", "weight", "a", "b")
    expected = value_and_grads(qat_linear_reference, args, "int4", every)
    assert same_bits(value_and_grads(qat_linear, args, "int4", every), expected)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_new_tensor_is_saved_for_the_backward_pass(scheme):
    x, weight, bias, a, b, _ = drawn(d_in=256, d_out=512)
    leaves, kept = [t.requires_grad_() for t in (x, a, b)], []
    keep = lambda t: kept.append(t) or t
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        qat_linear(leaves[0], weight, bias, leaves[1], leaves[2], None, SCALING, scheme)
    given = {t.untyped_storage().data_ptr() for t in (x, weight, a, b)}
    assert all(t.untyped_storage().data_ptr() in given for t in kept)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_torch_func_equals_autograd(scheme):
    x, weight, bias, a, b, _ = drawn()
    fn = lambda a, b: qat_linear(x, weight, bias, a, b, None, SCALING, scheme).square().sum()
    ours = torch.func.grad(fn, (0, 1))(a, b)
    leaves = [a.clone().requires_grad_(), b.clone().requires_grad_()]
    assert relative_error(ours, torch.autograd.grad(fn(*leaves), leaves)) < 5e-6
    _, dot = torch.func.jvp(fn, (a, b), (b.t() @ weight, b))
    expected = (ours[0] * (b.t() @ weight)).sum() + (ours[1] * b).sum()
    torch.testing.assert_close(dot, expected, rtol=1e-3, atol=1e-3)
    each = torch.func.vmap(torch.func.grad(fn, (0, 1)), (0, None))(torch.stack((a, 2 * a)), b)
    # A batched product rounds differently. In int8-int4 a group's largest value is at the clipping
    # limit of 7.5 steps, so one ulp decides whether it gets a gradient.
    allowed = 0.05 if scheme == "int8-int4" else 5e-6
    assert relative_error([t[0] for t in each], ours) < allowed


@pytest.mark.compile
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_compiled_results_equal_eager_to_the_bit(scheme, dtype, fresh_dynamo):
    args = drawn(dtype, dora=True)
    compiled = torch.compile(qat_linear, fullgraph=True)
    eager = value_and_grads(qat_linear, args, scheme)
    assert same_bits(value_and_grads(compiled, args, scheme), eager)


def test_second_derivative_raises():
    x, *rest = drawn()
    y = qat_linear(x.requires_grad_(), *rest, SCALING, "int8")
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
