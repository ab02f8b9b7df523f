"""row_norms: against the norms of W + s B A, computed in float64."""

import pytest
import torch

from fastlora.ops.linear.dora import row_norms

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNEL_DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]


def tensors(d_out: int, d_in: int, r: int, dtype: torch.dtype = torch.float32):
    gen = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=gen).to(dtype) for s in ((d_out, d_in), (r, d_in), (d_out, r))]


def exact(weight, a, b, scaling):
    return (weight.double() + scaling * b.double() @ a.double()).norm(dim=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 48, 4), (5, 100, 3), (1, 1, 1)])
def test_norms_err_no_more_than_the_sum_in_float32(shape, dtype):
    weight, a, b = tensors(*shape, dtype)
    found = row_norms(weight, a, b, 1.5)
    plain = (weight.float() + 1.5 * b.float() @ a.float()).norm(dim=-1)
    wanted = exact(weight, a, b, 1.5)
    assert found.dtype == torch.float32
    allowed = (plain - wanted).abs() + 8 * torch.finfo(torch.float32).eps * wanted
    assert ((found - wanted).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(64, 48, 4), (5, 300, 3), (1, 1, 1), (33, 512, 40)])
def test_kernel_errs_no_more_than_the_sum_in_float32(shape, dtype):
    kernel = pytest.importorskip("fastlora.ops.linear.dora_kernel")
    weight, a, b = (x.to(DEVICE) for x in tensors(*shape, dtype))
    assert kernel.kernel_supports(weight, a, b)
    assert not kernel.kernel_supports(weight.double(), a, b)
    found = kernel.row_norms_fused(weight, a, b, 1.5)
    plain = (weight.float() + 1.5 * b.float() @ a.float()).norm(dim=-1)
    wanted = exact(weight, a, b, 1.5)
    assert found.dtype == torch.float32
    allowed = (plain - wanted).abs() + 16 * torch.finfo(torch.float32).eps * wanted
    assert ((found - wanted).abs() <= allowed).all()


def test_norms_carry_no_gradient():
    weight, a, b = (x.requires_grad_() for x in tensors(6, 5, 2))
    assert not row_norms(weight, a, b, 2.0).requires_grad


def test_vmap_over_adapters_equals_a_loop():
    weight, a, b = tensors(6, 5, 2)
    stacked = torch.vmap(row_norms, in_dims=(None, 0, 0, None))(
        weight, torch.stack([a, 2 * a]), torch.stack([b, b]), 0.5
    )
    alone = torch.stack([row_norms(weight, a, b, 0.5), row_norms(weight, 2 * a, b, 0.5)])
    torch.testing.assert_close(stacked, alone)


@pytest.mark.compile
def test_compiled_norms_equal_eager():
    args = (*tensors(6, 5, 2), 0.5)
    compiled = torch.compile(row_norms, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), row_norms(*args))
