"""stacked_linears against its reference, and the reference against one adapter at a time."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora.ops.linear.group_products import Groups, group_of_rows, group_product
from fastlora.ops.linear.stacked_lora import (
    StackedBranch,
    stacked_linears,
    stacked_linears_reference,
)
from fastlora.ops.quant.bitsandbytes import quantize_4bit

N, D_IN = 3, 8
# The groups of 12 rows.
GROUPS = {
    "blocks": Groups(),
    "unequal, one empty": Groups(torch.tensor([5, 5, 12], dtype=torch.int32)),
    "in any order": Groups(
        torch.tensor([3, 8, 12], dtype=torch.int32),
        torch.randperm(12, generator=torch.Generator().manual_seed(0)),
    ),
}
LAYOUTS = [(3,), (2, 0, 5)]  # ranks; 0: not adapted. Odd ranks come with a bias.


def drawn(layout, dtype=torch.float64, quantised=False):
    """(x, branches)."""
    gen = torch.Generator().manual_seed(1)
    new = lambda *n: torch.randn(*n, generator=gen, dtype=torch.float64).to(dtype)
    branches = []
    for r, width in zip(layout, (10, 7, 6), strict=False):
        weight = quantize_4bit(new(width, D_IN)) if quantised else new(width, D_IN)
        factors = (new(N, r, D_IN), new(N, width, r)) if r else (None, None)
        branches.append(StackedBranch(weight, new(width) if r % 2 else None, *factors))
    return new(3, 4, D_IN), branches


def tracked(x, branches):
    """The same as leaves, and the list of these leaves."""
    leaves = [x.clone().requires_grad_()]

    def leaf(t):
        if t is None:
            return None
        leaves.append(t.clone().requires_grad_())
        return leaves[-1]

    new = [StackedBranch(b.weight, *map(leaf, b[1:])) for b in branches]
    return leaves[0], new, leaves


def values_and_grads(fn, x, branches, groups, masked=False) -> list[Tensor]:
    x, branches, leaves = tracked(x, branches)
    masks = [x * 0.5**i for i in range(len(branches))] if masked else None
    ys = fn(x, branches, groups, masks)
    grads = torch.autograd.grad(torch.stack([y.pow(3).sum() for y in ys]).sum(), leaves)
    return [*(y.detach() for y in ys), *grads]


@pytest.mark.parametrize("case", GROUPS)
def test_the_reference_is_each_rows_own_adapter(case):
    x, branches = drawn((2, 0, 5))
    owner = group_of_rows(GROUPS[case], N, 12, x.device)
    assert owner.shape == (12,) and owner.unique().numel() >= 2
    for y, (w, bias, a, b) in zip(
        stacked_linears_reference(x, branches, GROUPS[case]), branches, strict=True
    ):
        expected = F.linear(x, w, bias).flatten(0, 1)
        if a is not None:
            low = torch.einsum("mk,mrk->mr", x.flatten(0, 1), a[owner])
            expected = expected + torch.einsum("mr,mor->mo", low, b[owner])
        torch.testing.assert_close(y.flatten(0, 1), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", GROUPS)
def test_the_op_gives_the_references_values_and_gradients(case, layout, masked):
    x, branches = drawn(layout)
    mine, theirs = (
        values_and_grads(fn, x, branches, GROUPS[case], masked)
        for fn in (stacked_linears, stacked_linears_reference)
    )
    for a, e in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("case", GROUPS)
def test_a_quantised_weight_gives_the_references_gradients(case):
    x, branches = drawn((2, 0, 5), torch.float32, quantised=True)
    mine, theirs = (
        values_and_grads(fn, x, branches, GROUPS[case])
        for fn in (stacked_linears, stacked_linears_reference)
    )
    for a, e in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4 * float(e.abs().max()))


def test_the_fused_weight_gives_the_same_gradient():
    x, branches = drawn((2, 0, 5))
    fused = torch.cat([b.weight for b in branches])
    run = lambda x, branches, groups, masked: stacked_linears(x, branches, groups, masked, fused)
    plain = values_and_grads(stacked_linears, x, branches, Groups())
    for a, e in zip(values_and_grads(run, x, branches, Groups()), plain, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", GROUPS)
def test_second_derivatives_are_right(case, masked):
    """create_graph=True: the backward pass is differentiable too."""
    _, branches, leaves = tracked(*drawn((2, 0, 5)))

    def run(*tensors: Tensor) -> Tensor:
        rest = iter(tensors[1:])
        new = [
            StackedBranch(b.weight, *(None if t is None else next(rest) for t in b[1:]))
            for b in branches
        ]
        masks = [tensors[0] * 0.5] * len(new) if masked else None
        ys = stacked_linears(tensors[0], new, GROUPS[case], masks)
        return torch.stack([y.pow(3).sum() for y in ys]).sum()

    assert torch.autograd.gradgradcheck(run, tuple(leaves), fast_mode=True)


def test_a_trained_weight_gets_its_gradient_from_the_reference():
    x, branches = drawn((3,))
    weight = branches[0].weight.requires_grad_()
    (y,) = stacked_linears(x, [branches[0]._replace(weight=weight)], Groups())
    assert torch.autograd.grad(y.sum(), weight)[0].any()


@pytest.mark.parametrize("case", GROUPS)
def test_group_product_is_each_rows_product(case):
    x, branches = drawn((3,))
    a = branches[0].a
    assert a is not None
    owner = group_of_rows(GROUPS[case], N, 12, x.device)
    expected = torch.einsum("mk,mrk->mr", x.flatten(0, 1), a[owner])
    torch.testing.assert_close(group_product(x, a, GROUPS[case]), expected)
