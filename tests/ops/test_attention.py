"""attention: SDPA's kernels against the reference, and the reference against a loop in float64."""

import math

import pytest
import torch
from torch import Tensor

from fastlora.ops.attention.attention import attention, attention_reference

# (b, query heads, key heads, t, s, hd); t == s unless masked
SHAPES = [(2, 4, 2, 7, 7, 12), (1, 1, 1, 1, 1, 2), (2, 6, 1, 13, 13, 8), (1, 4, 4, 5, 5, 16)]


def drawn(shape, dtype=torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    b, h, kv, t, s, hd = shape
    gen = torch.Generator().manual_seed(0)
    new = lambda *n: torch.randn(*n, generator=gen, dtype=torch.float64).to(dtype)
    return new(b, h, t, hd), new(b, kv, s, hd), new(b, kv, s, hd), new(b, h, t, hd)


def random_mask(shape) -> Tensor:
    b, _, _, t, s, _ = shape
    mask = torch.rand(b, 1, t, s, generator=torch.Generator().manual_seed(1)) < 0.5
    return mask | (torch.arange(s) == torch.arange(t)[:, None] + s - t)


def one_by_one(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The definition: a loop over batch, heads and queries."""
    out, groups = torch.zeros_like(q), q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                seen = mask[b % mask.shape[0], 0, i]
                keys, values = k[b, h // groups][seen], v[b, h // groups][seen]
                weights = (keys @ q[b, h, i] / math.sqrt(q.shape[-1])).softmax(0)
                out[b, h, i] = weights @ values
    return out


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 4, 2, 1, 9, 12), (2, 4, 2, 3, 9, 12)])
def test_reference_equals_a_loop_over_queries(shape, masked):
    q, k, v, _ = drawn(shape, torch.float64)
    t, s = shape[3:5]
    mask = random_mask(shape) if masked else torch.ones(1, 1, t, s, dtype=torch.bool).tril(s - t)
    ours = attention_reference(q, k, v, mask if masked else None)
    torch.testing.assert_close(ours, one_by_one(q, k, v, mask))


def value_and_grads(fn, q, k, v, dy, mask):
    args = [x.detach().requires_grad_() for x in (q, k, v)]
    y = fn(*args, mask)
    return [y.detach(), *torch.autograd.grad(y, args, dy)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_fused_path_errs_no_more_than_the_reference(shape, dtype, masked):
    args = drawn(shape, dtype)
    mask = random_mask(shape) if masked else None
    exact = value_and_grads(attention_reference, *(x.double() for x in args), mask)
    plain = value_and_grads(attention_reference, *args, mask)
    fused = value_and_grads(attention, *args, mask)
    for f, p, e in zip(fused, plain, exact, strict=True):
        norm = lambda x, e=e: (x.double() - e).norm().item()
        assert f.dtype == dtype
        assert norm(f) <= 1.5 * norm(p) + 4 * torch.finfo(dtype).eps * e.norm().item() + 1e-30


@pytest.mark.parametrize("masked", [False, True])
def test_torch_func_runs_the_reference_with_every_derivative(masked):
    shape = (1, 2, 1, 3, 3, 4)
    q, k, v, dy = drawn(shape, torch.float64)
    mask = random_mask(shape) if masked else None
    loss = lambda q, k, v: (attention(q, k, v, mask) * dy).sum()
    grads = torch.func.grad(loss, argnums=(0, 1, 2))(q, k, v)
    expected = value_and_grads(attention_reference, q, k, v, dy, mask)[1:]
    torch.testing.assert_close(list(grads), expected)
    fn = lambda *x: attention_reference(*x, mask)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradgradcheck(fn, leaves)
    assert torch.autograd.gradcheck(fn, leaves, check_forward_ad=True)


def test_vmap_equals_a_loop():
    q, k, v, _ = drawn((3, 4, 2, 5, 5, 8))
    mask = random_mask((3, 4, 2, 5, 5, 8))
    one = lambda q, k, v, m: attention(q[None], k[None], v[None], m[None])[0]
    torch.testing.assert_close(torch.vmap(one)(q, k, v, mask), attention(q, k, v, mask))


@pytest.mark.compile
@pytest.mark.parametrize("masked", [False, True])
def test_compiled_gradient_equals_eager(masked, fresh_dynamo):
    shape = SHAPES[0]
    args, mask = drawn(shape), random_mask(shape) if masked else None
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        value_and_grads(compiled, *args, mask), value_and_grads(attention, *args, mask)
    )


def test_deterministic_attention_has_the_same_value():
    q, k, v, _ = drawn(SHAPES[0])
    torch.testing.assert_close(
        attention(q, k, v, None, deterministic=True), attention(q, k, v, None)
    )
