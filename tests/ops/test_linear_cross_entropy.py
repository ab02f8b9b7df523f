"""linear_logprobs equals F.cross_entropy, without all logits in memory."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastlora.ops.loss import linear_cross_entropy
from fastlora.ops.loss.linear_cross_entropy import (
    linear_logprobs,
    linear_logprobs_reference,
    rows_per_chunk,
)

# (rows, hidden, vocabulary)
SHAPES = [(12, 16, 24), (7, 5, 33), (1, 1, 2), (130, 8, 11)]


def drawn(shape, dtype=torch.float32):
    """h, weight, labels of which a third is ignored, and the output's gradient."""
    n, d, v = shape
    gen = torch.Generator().manual_seed(0)
    new = lambda *s: torch.randn(*s, generator=gen, dtype=torch.float64)
    labels = torch.randint(v, (n,), generator=gen)
    labels[::3] = -100
    wide = torch.promote_types(dtype, torch.float32)
    return new(n, d).to(dtype), new(v, d).to(dtype), labels, new(n).to(wide)


def value_and_dh(fn, h, weight, labels, dy):
    h = h.detach().requires_grad_()
    y = fn(h, weight, labels)
    return [y.detach(), *torch.autograd.grad(y, h, dy)]


def theirs(h, weight, labels):
    """F.cross_entropy of all logits, in at least float32."""
    logits = (h @ weight.t()).to(torch.promote_types(h.dtype, torch.float32))
    return -F.cross_entropy(logits, labels, reduction="none", ignore_index=-100)


@pytest.fixture(params=[None, 64, 1], ids=["one chunk", "chunks", "row by row"])
def chunks(request, monkeypatch):
    """Sets the number of logits per chunk; None keeps the default."""
    if request.param:
        monkeypatch.setattr(linear_cross_entropy, "_CHUNK_ELEMENTS", request.param)


@pytest.mark.parametrize("fn", [linear_logprobs, linear_logprobs_reference])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_err_no_more_than_torchs(shape, dtype, fn, chunks):
    h, weight, labels, dy = drawn(shape, dtype)
    exact = value_and_dh(theirs, h.double(), weight.double(), labels, dy.double())
    plain = value_and_dh(theirs, h, weight, labels, dy)
    fused = value_and_dh(fn, h, weight, labels, dy)
    for f, p, e in zip(fused, plain, exact, strict=True):
        error = lambda t, e=e: (t.double() - e).norm().item()
        assert f.dtype == p.dtype
        assert error(f) <= 1.5 * error(p) + 8 * torch.finfo(dtype).eps * e.norm().item()
    assert not fused[0][labels == -100].any() and not fused[1][labels == -100].any()


@pytest.mark.parametrize("shape", SHAPES)
def test_chunking_changes_no_value_and_equal_calls_give_equal_bits(shape, monkeypatch):
    """In float64, because the rounding of a product may depend on its number of rows."""
    args = drawn(shape, torch.float64)
    once = value_and_dh(linear_logprobs, *args)
    monkeypatch.setattr(linear_cross_entropy, "_CHUNK_ELEMENTS", 64)
    torch.testing.assert_close(value_and_dh(linear_logprobs, *args), once, rtol=1e-13, atol=1e-14)
    again = value_and_dh(linear_logprobs, *args)
    assert all(
        torch.equal(a, b) for a, b in zip(again, value_and_dh(linear_logprobs, *args), strict=True)
    )


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any op returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        self.numel = max(
            self.numel,
            *(
                x.numel()
                for x in (out if isinstance(out, tuple) else (out,))
                if isinstance(x, Tensor)
            ),
            0,
        )
        return out


def test_no_tensor_is_larger_than_a_chunk_of_logits(monkeypatch):
    monkeypatch.setattr(linear_cross_entropy, "_CHUNK_ELEMENTS", 1024)
    h, weight, labels, dy = drawn((128, 4, 100))
    with Largest() as seen:
        value_and_dh(linear_logprobs, h, weight, labels, dy)
    assert seen.numel <= 1024 < 128 * 100


@pytest.mark.parametrize("vocab_size", [1, 11, 32_000, 128_256, 2**27, 2**28])
def test_chunks_are_the_largest_power_of_two_within_the_limit(vocab_size):
    rows = rows_per_chunk(vocab_size)
    assert rows & (rows - 1) == 0
    assert rows * vocab_size <= 2**27 < 2 * rows * vocab_size or rows == 1


def test_gradients_equal_finite_differences(chunks):
    h, weight, labels, _ = drawn((5, 3, 7), torch.float64)
    assert torch.autograd.gradcheck(
        lambda h: linear_logprobs(h, weight, labels), (h.requires_grad_(),)
    )
    fn = lambda h, w: linear_logprobs_reference(h, w, labels)
    leaves = (h, weight.requires_grad_())
    assert torch.autograd.gradcheck(fn, leaves) and torch.autograd.gradgradcheck(fn, leaves)


@pytest.mark.parametrize("tracked", [False, True], ids=["constant", "tracked"])
def test_second_derivative_raises(tracked):
    """Without the error, the path around the op, through (h * w)**2, would give a wrong result."""
    h, weight, labels, dy = drawn(SHAPES[0], torch.float64)
    w = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    dy.requires_grad_(tracked)
    with pytest.raises(RuntimeError, match=r"second|once|twice"):
        value = (linear_logprobs((h * w).square(), weight, labels) * dy).sum()
        (g,) = torch.autograd.grad(value, w, create_graph=True)
        torch.autograd.grad(g, w)


def test_weight_that_requires_a_gradient_gets_one():
    h, weight, labels, dy = drawn(SHAPES[0], torch.float64)
    (g,) = torch.autograd.grad(linear_logprobs(h, weight.requires_grad_(), labels), weight, dy)
    (e,) = torch.autograd.grad(theirs(h, weight, labels), weight, dy)
    torch.testing.assert_close(g, e)


def test_huge_logits_give_finite_results():
    h, weight, labels, dy = drawn(SHAPES[0])
    for y in value_and_dh(linear_logprobs, 1e4 * h, 1e2 * weight, labels, dy):
        assert y.isfinite().all()


def test_no_gradient_is_computed_if_none_is_required(monkeypatch):
    h, weight, labels, _ = drawn(SHAPES[0])
    never = lambda *args: pytest.fail("computed a gradient")
    expected = linear_logprobs(h, weight, labels)
    value = linear_logprobs(h, weight, labels, linear_cross_entropy.chunk_logprobs, never)
    assert torch.equal(value, expected)


def test_torch_func_equals_autograd_and_vmap_equals_a_loop(chunks):
    h, weight, labels, dy = drawn(SHAPES[0])
    dh = torch.func.grad(lambda h: (linear_logprobs(h, weight, labels) * dy).sum())(h)
    torch.testing.assert_close(dh, value_and_dh(theirs, h, weight, labels, dy)[1])
    rows = torch.vmap(lambda h, y: linear_logprobs(h[None], weight, y[None])[0])(h, labels)
    torch.testing.assert_close(rows, theirs(h, weight, labels))


@pytest.mark.compile
def test_compiled_gradient_equals_eager(fresh_dynamo, chunks):
    args = drawn(SHAPES[0])
    compiled = torch.compile(linear_logprobs, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(value_and_dh(compiled, *args), value_and_dh(linear_logprobs, *args))
