"""apply_rope against transformers and against the rotation of complex numbers."""

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from fastlora.ops.attention.rope import apply_rope


def drawn(b, n, t, hd, dtype=torch.float32):
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(b, n, t, hd, generator=gen, dtype=torch.float64).to(dtype)
    angles = 6 * torch.rand(b, t, hd // 2, generator=gen, dtype=torch.float64)
    angles = torch.cat((angles, angles), -1)
    return x, angles.cos().to(dtype), angles.sin().to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 4, 7, 12), (1, 1, 1, 2), (3, 2, 5, 64)])
def test_values_equal_transformers_to_the_bit(shape, dtype):
    x, cos, sin = drawn(*shape, dtype)
    ours = apply_rope(x, cos, sin)
    assert ours.dtype == dtype and torch.equal(ours, apply_rotary_pos_emb(x, x, cos, sin)[0])


def test_result_has_the_projections_memory_layout():
    x, cos, sin = drawn(2, 5, 4, 8)
    heads = x.transpose(1, 2).contiguous().transpose(1, 2)  # b t n hd in memory
    assert apply_rope(heads, cos, sin).stride() == heads.stride()


def test_pairs_half_a_head_apart_are_rotated():
    x, cos, sin = drawn(2, 3, 5, 8, torch.float64)
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.complex(cos, sin)[:, None, :, :4]
    torch.testing.assert_close(apply_rope(x, cos, sin), torch.cat((turned.real, turned.imag), -1))


def test_gradients_equal_finite_differences():
    x, cos, sin = drawn(1, 2, 3, 4, torch.float64)
    fn = lambda x: apply_rope(x, cos, sin)
    assert torch.autograd.gradcheck(fn, (x.requires_grad_(),))
    expected = torch.autograd.grad(fn(x).square().sum(), x)[0]
    assert torch.allclose(torch.func.grad(lambda x: fn(x).square().sum())(x.detach()), expected)


@pytest.mark.compile
def test_compiled_gradient_equals_eager(fresh_dynamo):
    x, cos, sin = drawn(2, 4, 7, 12)
    dx = lambda f: torch.autograd.grad(f(x.requires_grad_(), cos, sin).pow(3).sum(), x)[0]
    compiled = torch.compile(apply_rope, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(dx(compiled), dx(apply_rope))
