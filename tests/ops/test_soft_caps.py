"""Soft caps and own scales of scores, and soft caps of logits, in every kernel.

Values and gradients err no more than plain torch, relative to float64.

Without a GPU the kernels run in Triton's interpreter, in fp32 and fp16. bf16 needs a GPU.
"""

import pytest
import torch
from torch import Tensor

from fastlora.ops.attention.attention import attention, attention_reference
from fastlora.ops.attention.flash import flash_attention, make_spans
from fastlora.ops.decode.attention import decode_attention, decode_attention_reference
from fastlora.ops.loss.linear_cross_entropy import (
    chunk_value_and_grad,
    chunk_value_and_grad_kernel,
    linear_logprobs,
    linear_logprobs_reference,
)
from fastlora.ops.soft_cap import soft_cap
from oracles.decode_attention import copied
from oracles.decode_attention import drawn as decode_inputs

pytest.importorskip("triton", reason="the kernels' tests need triton: requirements-test.txt has it")

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]

SCALE, CAP = 0.3, 2.0  # most scores of 16 standard normal products are far above the cap


def drawn(*shapes: tuple[int, ...]) -> list[Tensor]:
    gen = torch.Generator().manual_seed(0)
    return [torch.randn(*s, generator=gen, dtype=torch.float64).to(DEVICE) for s in shapes]


def value_and_grads(fn, leaves: list[Tensor], dy: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in leaves]
    y = fn(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def assert_errs_no_more(fused, plain, exact, dtype: torch.dtype) -> None:
    for found, other, truth in zip(fused, plain, exact, strict=True):
        error = lambda x, truth=truth: (x.double() - truth).norm().item()
        assert found.dtype == other.dtype and found.shape == other.shape
        assert error(found) <= error(other) + 8 * torch.finfo(dtype).eps * truth.norm().item()


@pytest.mark.parametrize(
    ("windowed", "scale", "cap"), [(False, None, CAP), (True, SCALE, CAP), (False, SCALE, None)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_flash_attention(dtype, windowed, scale, cap):
    b, h, kv, t, hd = 1, 4, 2, 150, 16
    q, k, v, dy = drawn((b, t, h, hd), (b, t, kv, hd), (b, t, kv, hd), (b, t, h, hd))
    wide = [x.transpose(1, 2) for x in (q, k, v, dy)]
    i = torch.arange(t, device=DEVICE)
    first = (i - 19).clamp(min=0) if windowed else torch.zeros_like(i)
    spans = make_spans(first.expand(b, t)) if windowed else None
    mask = ((i <= i[:, None]) & (i >= first[:, None]))[None, None]
    by_torch = lambda q, k, v: attention_reference(q, k, v, mask, scale, cap)
    by_kernel = lambda q, k, v: flash_attention(q, k, v, None, spans, None, scale, cap)
    *qkv, dy = (x.to(dtype) for x in wide)
    exact = value_and_grads(by_torch, wide[:3], wide[3])
    fused = value_and_grads(by_kernel, qkv, dy)
    assert_errs_no_more(fused, value_and_grads(by_torch, qkv, dy), exact, dtype)


def test_heads_of_256_as_in_gemma():
    q, k, v, dy = (
        x.float().transpose(1, 2) for x in drawn(*[(1, 70, n, 256) for n in (2, 1, 1, 2)])
    )
    by_torch = lambda q, k, v: attention_reference(q, k, v, None, SCALE, CAP)
    by_kernel = lambda q, k, v: flash_attention(q, k, v, None, None, None, SCALE, CAP)
    wide = value_and_grads(by_torch, [x.double() for x in (q, k, v)], dy.double())
    plain = value_and_grads(by_torch, [q, k, v], dy)
    assert_errs_no_more(value_and_grads(by_kernel, [q, k, v], dy), plain, wide, torch.float32)


def test_huge_scores_give_finite_results():
    q, k, v, dy = (x.float().transpose(1, 2) for x in drawn(*[(1, 40, 2, 16)] * 4))
    by_kernel = lambda q, k, v: flash_attention(q, k, v, None, None, None, None, CAP)
    by_torch = lambda q, k, v: attention_reference(q, k, v, None, None, CAP)
    for factor in (0.0, 1e9, -1e9):
        found = value_and_grads(by_kernel, [q * factor, k, v], dy)
        assert all(x.isfinite().all() for x in found)
        torch.testing.assert_close(found[0], by_torch(q * factor, k, v), rtol=1e-4, atol=1e-4)


def test_attention_without_kernels_scales_as_the_reference():
    q, k, v = drawn((2, 4, 9, 16), (2, 2, 9, 16), (2, 2, 9, 16))
    for cap in (None, CAP):
        found = attention(q, k, v, None, scale=SCALE, cap=cap)
        torch.testing.assert_close(found, attention_reference(q, k, v, None, SCALE, cap))


@pytest.mark.parametrize("scale", [None, SCALE])
@pytest.mark.parametrize("heads", [(8, 2, 64), (2, 1, 256)], ids=str)
def test_decode_attention(heads, scale):
    given = decode_inputs(heads, torch.float32)
    wide = [x if x is None or not x.is_floating_point() else x.nan_to_num() for x in given]
    exact = decode_attention_reference(*copied(wide, torch.float64), 70, scale, CAP)
    found = decode_attention(*copied(given), 70, scale, CAP, kernels="triton")
    assert (found - exact).abs().max() <= 1e-5 * max(1, exact.abs().max())
    uncapped = decode_attention_reference(*copied(wide, torch.float64), 70, scale)
    assert (uncapped - exact).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(5, 7, 33), (4, 8, 40001)], ids=str)
def test_log_probabilities_of_capped_logits(shape, dtype):
    n, d, v = shape
    h, weight = drawn((n, d), (v, d))
    labels = torch.tensor([v - 1, -100, 0, 3, 5][:n], device=DEVICE)
    wide = h.clone().requires_grad_()
    logp = soft_cap(wide @ weight.t(), CAP).log_softmax(-1).gather(1, labels.clamp(min=0)[:, None])
    logp = torch.where(labels == -100, 0, logp[:, 0])
    exact = logp.detach(), torch.autograd.grad(logp.sum(), wide)[0]
    arguments = h.to(dtype), weight.to(dtype), labels, CAP
    plain, fused = chunk_value_and_grad(*arguments), chunk_value_and_grad_kernel(*arguments)
    # In float64 `exact` has rounding errors too.
    assert_errs_no_more(plain, plain, exact, torch.float64 if dtype == torch.float64 else dtype)
    for f, p, e in zip(fused, plain, exact, strict=True):
        error = lambda x, e=e: (x.double() - e).norm().item()
        ulps = 64 if dtype == torch.float64 else 8
        assert error(f) <= error(p) + ulps * torch.finfo(p.dtype).eps * e.norm().item()


def test_capped_loss_has_the_gradient_of_its_reference():
    h, weight = drawn((9, 7), (33, 7))
    labels = torch.arange(9, device=DEVICE) * 3
    labels[2] = -100
    run = lambda fn: value_and_grads(
        lambda h: fn(h, weight, labels, cap=CAP).square(), [h], h.new_ones(9)
    )
    torch.testing.assert_close(run(linear_logprobs), run(linear_logprobs_reference))
