"""The cross-entropy's Triton kernel errs no more than plain torch, relative to float64.

Without a GPU the kernel runs in Triton's interpreter, in fp32, fp16 and fp64. bf16 needs a GPU.
"""

import pytest
import torch

from fastlora.ops.dispatch import use_kernel
from fastlora.ops.loss.linear_cross_entropy import (
    chunk_value_and_grad,
    chunk_value_and_grad_kernel,
    linear_logprobs,
)
from oracles.pairs import adapted

pytest.importorskip("triton", reason="the kernel's tests need triton: requirements-test.txt has it")

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = [torch.float32, torch.float16, torch.float64, *([torch.bfloat16] if CUDA else [])]
# (rows, hidden size, vocabulary size): less than a block, one block, several and an incomplete one,
# and blocks of 32,768
SHAPES = [(5, 7, 33), (1, 1, 1), (3, 4, 16384), (4, 8, 40001), (2, 4, 70001)]


def drawn(shape, dtype):
    n, d, v = shape
    gen = torch.Generator().manual_seed(0)
    new = lambda *s: torch.randn(*s, generator=gen, dtype=torch.float64).to(DEVICE, dtype)
    labels = torch.randint(v, (n,), generator=gen)
    labels[1::3] = -100
    labels[-1] = v - 1
    return new(n, d), new(v, d), labels.to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_errs_no_more_than_plain_torch(shape, dtype):
    h, weight, labels = drawn(shape, dtype)
    exact = chunk_value_and_grad(h.double(), weight.double(), labels)
    plain = chunk_value_and_grad(h, weight, labels)
    fused = chunk_value_and_grad_kernel(h, weight, labels)
    # In float64, `exact` is itself plain torch, so its own rounding errors count too.
    ulps = 64 if dtype == torch.float64 else 4
    for f, p, e in zip(fused, plain, exact, strict=True):
        error = lambda t, e=e: (t.double() - e).norm().item()
        assert f.dtype == p.dtype and f.shape == p.shape
        assert error(f) <= error(p) + ulps * torch.finfo(p.dtype).eps * e.norm().item()
    ignored = labels == -100
    assert not fused[0][ignored].any() and not fused[1][ignored].any()


@pytest.mark.parametrize("flip", [False, True], ids=["last", "first"])
def test_largest_logit_may_be_in_any_block(flip):
    # In fp64, because in fp32 the last bit of lse, 27.6, changes the gradient by 4e-5.
    weight = torch.linspace(-20, 20, 40001, device=DEVICE, dtype=torch.float64)[:, None]
    weight = weight.flip(0) if flip else weight
    h, labels = weight.new_ones(2, 1), torch.tensor([0, 40000], device=DEVICE)
    logp, dh = chunk_value_and_grad_kernel(h, weight, labels)
    wanted = chunk_value_and_grad(h, weight, labels)
    torch.testing.assert_close((logp, dh), wanted)


def test_huge_logits_give_finite_results():
    h, weight, labels = drawn((5, 7, 33), torch.float32)
    logp, dh = chunk_value_and_grad_kernel(1e4 * h, 1e2 * weight, labels)
    assert logp.isfinite().all() and dh.isfinite().all()


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_ignored_rows_are_zero_also_if_their_logits_are_not_finite(bad):
    h, weight, labels = drawn((5, 7, 33), torch.float32)
    wanted = chunk_value_and_grad_kernel(h, weight, labels)
    h[labels == -100] = bad
    assert all(map(torch.equal, chunk_value_and_grad_kernel(h, weight, labels), wanted))


def test_a_label_outside_the_vocabulary_gives_nan_and_writes_no_other_row():
    from fastlora.ops.loss.softmax_kernel import logprobs_and_dlogits_

    logits, labels = torch.randn(6, 33, device=DEVICE), torch.tensor([2, -1, 33, 0], device=DEVICE)
    given, rows = logits.clone(), [0, 3]
    logp, _ = logprobs_and_dlogits_(given[1:5], labels, -100)
    wanted, dlogits = logprobs_and_dlogits_(logits[1:5][rows], labels[rows], -100)
    assert torch.equal(logp[rows], wanted) and logp[1:3].isnan().all()
    assert torch.equal(given[1:5][rows], dlogits) and torch.equal(given[::5], logits[::5])


def test_kernel_gradient_is_right_for_any_function_of_the_log_probabilities():
    h, weight, labels = drawn((9, 7, 33), torch.float64)
    run = lambda *regions: torch.autograd.grad(
        linear_logprobs(h.requires_grad_(), weight, labels, *regions).square().sum(), h
    )[0]
    torch.testing.assert_close(run(lambda *a: None, chunk_value_and_grad_kernel), run())


def test_auto_needs_a_gpu_and_triton_needs_a_gpu_or_the_interpreter(monkeypatch):
    x = torch.ones(2, device=DEVICE)
    assert use_kernel(x, "auto") == CUDA
    assert use_kernel(x, "triton") and not use_kernel(x, "torch")
    assert not torch.func.vmap(lambda x: x * use_kernel(x, "triton"))(x).any()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"CUDA(.|\n)*TRITON_INTERPRET=1"):
        use_kernel(torch.ones(2), "triton")


def test_model_with_triton_kernels_runs_the_kernel_with_equal_results(pair, monkeypatch):
    """with_spec(kernels="triton") gives the same loss and gradients as kernels="torch"."""
    import fastlora
    from fastlora import functional as FL
    from fastlora.ops.loss import softmax_kernel

    model = adapted(pair("llama2").model, r=4).to(DEVICE)
    ids = torch.arange(12, device=DEVICE).view(2, 6)
    calls = []
    kernel = softmax_kernel.logprobs_and_dlogits_
    counted = lambda *a: calls.append(1) or kernel(*a)
    monkeypatch.setattr(softmax_kernel, "logprobs_and_dlogits_", counted)

    def run(kernels):
        spec = model.with_spec(kernels=kernels).spec
        batch = {"input_ids": ids, "labels": ids}
        return fastlora.value_and_grad(FL.loss)(model.adapter, model.base, spec, batch)

    wanted = run("torch")
    assert not calls
    torch.testing.assert_close(run("triton"), wanted)
    assert calls
