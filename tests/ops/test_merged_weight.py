"""adapted_weight: against the formula in float64, with one rounding, DoRA norms and gradients."""

import pytest
import torch

from fastlora.ops.linear.merged_weight import adapted_weight

SCALING = 0.7


def tensors(dtype=torch.float64):
    gen = torch.Generator().manual_seed(0)
    shapes = ((5, 12), (3, 12), (5, 3))
    weight, a, b = (torch.randn(s, generator=gen, dtype=torch.float64) for s in shapes)
    magnitude = torch.rand(5, generator=gen, dtype=torch.float64) + 0.5
    return weight.to(dtype), a, b, magnitude


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_sum_is_rounded_once_to_the_weights_dtype(dtype):
    weight, a, b, _ = tensors(dtype)
    exact = weight.double() + SCALING * b @ a
    merged = adapted_weight(weight, a, b, None, SCALING)
    assert merged.dtype == dtype
    torch.testing.assert_close(merged, exact.to(dtype), rtol=0, atol=1e-14)
    narrow = adapted_weight(weight, a.float(), b.float(), None, SCALING)
    torch.testing.assert_close(narrow.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_dora_rows_have_the_magnitudes_norms_and_the_sums_directions():
    weight, a, b, magnitude = tensors()
    merged = adapted_weight(weight, a, b, magnitude, SCALING)
    torch.testing.assert_close(merged.norm(dim=-1), magnitude)
    along = torch.cosine_similarity(merged, weight + SCALING * b @ a)
    torch.testing.assert_close(along, torch.ones(5, dtype=torch.float64))


def test_gradient_treats_doras_norm_as_a_constant():
    weight, a, b, magnitude = tensors()
    leaves = [x.requires_grad_() for x in (a, b, magnitude)]
    norm = (weight + SCALING * b @ a).norm(dim=-1).detach()
    by_hand = (magnitude / norm)[:, None] * (weight + SCALING * b @ a)
    dy = torch.randn(5, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = torch.autograd.grad(by_hand, leaves, dy)
    got = torch.autograd.grad(adapted_weight(weight, a, b, magnitude, SCALING), leaves, dy)
    torch.testing.assert_close(got, wanted)
