"""fake_quantize against torchao's fake quantisers, bit for bit, and both of its derivatives."""

import pytest
import torch

from fastlora.ops.quant.fake_quantize import (
    SCHEMES,
    Quantiser,
    fake_quantize,
    fake_quantize_backward,
    fake_quantize_rows,
)
from oracles.torchao_side import prepared_linear
from oracles.trees import relative_error, same_bits

QUANTISERS = {
    "int4": SCHEMES["int4"].weight,
    "int8": SCHEMES["int8"].weight,
    "fp8-int4": SCHEMES["fp8-int4"].weight,
    "fp8": SCHEMES["fp8-fp8"].weight,
    "int8-int4": SCHEMES["int8-int4"].weight,
    "int8 rows": SCHEMES["int8-int4"].activation,
}
DTYPES = [torch.float32, torch.bfloat16]


def matrix(rows: int, d: int, dtype: torch.dtype, kind: str = "normal") -> torch.Tensor:
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(rows, d, generator=gen)
    match kind:
        case "huge":
            x = x * 1e30
        case "small":
            x = x * 1e-9
        case "one sided":
            x = x.abs() + 3
        case "steps":  # on and between quantisation steps, including the first and the last step
            x = (torch.arange(rows * d) % 31 - 15.0).view(rows, d) / 2
        case "outliers":
            x[:, ::37] *= 1e4
    return x.to(dtype)


def theirs(scheme: str, x: torch.Tensor, part: str = "weight") -> torch.Tensor:
    linear = prepared_linear(torch.ones(1, x.shape[-1], dtype=x.dtype), None, scheme)
    return getattr(linear, f"{part}_fake_quantizer")(x)


KINDS = ["normal", "huge", "small", "one sided", "steps", "outliers"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_equal_torchaos_to_the_bit(scheme, dtype, kind):
    for rows in (1, 5, 48):
        w = matrix(rows, 384, dtype, kind)
        ours = fake_quantize(w, SCHEMES[scheme].weight)
        assert ours.dtype == dtype and same_bits(ours, theirs(scheme, w))
        assert not torch.equal(ours, w) or kind == "steps"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", ["fp8-int4", "fp8-fp8", "int8-int4"])
def test_inputs_equal_torchaos_to_the_bit(scheme, dtype, kind):
    x = matrix(15, 128, dtype, kind).view(3, 5, 128)
    ours = fake_quantize(x, SCHEMES[scheme].activation)
    assert ours.dtype == dtype and same_bits(ours, theirs(scheme, x, "activation"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [7, 33, 1000])
@pytest.mark.parametrize("scheme", ["int8", "fp8-fp8"])
def test_rows_of_any_width_equal_torchaos(scheme, width, dtype):
    w = matrix(3, width, dtype)
    assert same_bits(fake_quantize(w, SCHEMES[scheme].weight), theirs(scheme, w))


@pytest.mark.parametrize("name", QUANTISERS)
def test_zeros_stay_zeros_and_have_finite_gradients(name):
    """torchao's float8 divides a row of zeros by a zero scale and gives NaN."""
    x = torch.zeros(2, 128, requires_grad=True)
    y = fake_quantize(x, QUANTISERS[name])
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert not y.any() and dx.isfinite().all()
    assert fake_quantize_backward(x.detach(), torch.ones_like(y), QUANTISERS[name]).isfinite().all()
    if name == "fp8":
        assert theirs("fp8-fp8", x).isnan().all()


@pytest.mark.parametrize("kind", ["normal", "one sided", "outliers"])
@pytest.mark.parametrize(
    ("part", "scheme"),
    [("weight", s) for s in SCHEMES]
    + [("activation", s) for s in SCHEMES if SCHEMES[s].activation],
)
def test_gradients_equal_torchaos(part, scheme, kind, straight_float8):
    quantiser = getattr(SCHEMES[scheme], part)
    x = matrix(6, 128, torch.float32, kind).requires_grad_()
    dy = torch.randn(6, 128, generator=torch.Generator().manual_seed(1))
    (expected,) = torch.autograd.grad(theirs(scheme, x, part), x, dy)
    (plain,) = torch.autograd.grad(fake_quantize(x, quantiser), x, dy)
    assert relative_error(plain, expected) < 1e-6
    assert relative_error(fake_quantize_backward(x.detach(), dy, quantiser), expected) < 3e-6


def test_torchaos_float8_loses_small_gradients():
    """The reason for `straight_float8`: torchao 0.18.0 casts gradients to float8 unscaled."""
    x = matrix(4, 32, torch.float32).requires_grad_()
    dy = torch.full((4, 32), 1e-4)
    (theirs_dx,) = torch.autograd.grad(theirs("fp8-fp8", x), x, dy)
    (ours,) = torch.autograd.grad(fake_quantize(x, QUANTISERS["fp8"]), x, dy)
    assert (theirs_dx == 0).double().mean() > 0.9  # a row's largest element also gets dscale
    assert (ours == dy).double().mean() > 0.9


@pytest.mark.parametrize("name", QUANTISERS)
def test_torch_func_gives_the_same_derivative(name):
    """vjp, jvp (the straight-through tangent, which must be the adjoint of vjp) and vmap."""
    quantiser, x = QUANTISERS[name], matrix(3, 128, torch.float32)
    dy, tangent = matrix(6, 128, torch.float32).split(3)
    y, vjp = torch.func.vjp(lambda x: fake_quantize(x, quantiser), x)
    assert same_bits(y, fake_quantize(x, quantiser))
    assert relative_error(vjp(dy)[0], fake_quantize_backward(x, dy, quantiser)) < 3e-6
    _, dot = torch.func.jvp(lambda x: fake_quantize(x, quantiser), (x,), (tangent,))
    torch.testing.assert_close((dot * dy).sum(), (tangent * vjp(dy)[0]).sum(), rtol=1e-4, atol=1e-4)
    batched = torch.func.vmap(lambda x: fake_quantize(x, quantiser))(x[:, None])
    assert same_bits(batched[:, 0], y)


@pytest.mark.compile
@pytest.mark.parametrize("name", QUANTISERS)
def test_compiled_rounding_equals_eager_almost_everywhere(name, fresh_dynamo):
    """In float32, Inductor's results differ only if 1 ulp decides the quantisation step."""
    quantiser, x = QUANTISERS[name], matrix(16, 128, torch.float32).requires_grad_()
    compiled = torch.compile(fake_quantize, fullgraph=True)
    y, expected = compiled(x, quantiser), fake_quantize(x, quantiser)
    steps = ((y - expected).abs() > 1e-5 * x.abs().max()).double().mean()
    assert steps < 0.002
    (dx,) = torch.autograd.grad(y.sum(), x)
    (dexpected,) = torch.autograd.grad(expected.sum(), x)
    assert ((dx - dexpected).abs() < 1e-3).double().mean() > 0.98


def test_quantising_in_chunks_of_rows_changes_no_bit(monkeypatch):
    w, quantiser = matrix(10, 128, torch.float32), Quantiser("fp8_int4_groups", 4, 128)
    monkeypatch.setattr("fastlora.ops.quant.fake_quantize._CHUNK_ELEMENTS", 3 * 128)
    assert same_bits(fake_quantize_rows(w, quantiser), fake_quantize(w, quantiser))
