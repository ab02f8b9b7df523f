"""The gradients by group equal the reference, and the sum over groups is autograd's."""

import pytest
import torch

from fastlora.ops.count_sketch import count_sketch
from fastlora.ops.dropout import fold
from fastlora.ops.linear.experts import grouped_lora_linear
from fastlora.ops.linear.group_gradients import (
    Sink,
    expert_linear,
    group_gradients_reference,
    with_group_gradients,
)
from fastlora.ops.linear.group_products import Groups

M, N = 12, 3
SORTED = torch.arange(M) // 4
MIXED = torch.tensor([2, 0, 1, 1, 0, 2, 2, 1, 0, 0, 1, 2])
UNEQUAL = torch.tensor([2, 0, 2, 2, 0, 2, 2, 2, 0, 0, 2, 2])  # group 1 has no rows


def draw(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def groups_of(group):
    order = group.argsort(stable=True)
    ends = (group[order][:, None] <= torch.arange(N)).sum(0).to(torch.int32)
    if group is SORTED:
        return Groups()
    return Groups(None if group is MIXED else ends, order)


@pytest.mark.parametrize("group", [SORTED, MIXED, UNEQUAL], ids=["sorted", "mixed", "unequal"])
@pytest.mark.parametrize("kind", ["each", "norms", "sketches"])
def test_sinks_get_what_they_are_for(kind, group):
    x, matrix, weights = draw(M, 5), draw(7, 5, seed=1), draw(7, 5, seed=2)
    slope, keys = draw(M, 7, seed=3), [fold(torch.tensor(i), 0) for i in (1, 2)]
    expected = 0.5 * group_gradients_reference(slope, x, group, N)
    sizes, ends = [4, 3], [slice(0, 4), slice(4, 7)]
    if kind == "each":
        sinks = [Sink(torch.zeros(N, size, 5, dtype=x.dtype, requires_grad=True)) for size in sizes]
        leaves, results = [sink.each for sink in sinks], [expected[:, rows] for rows in ends]
    elif kind == "norms":
        probe = torch.zeros(N, dtype=x.dtype, requires_grad=True)
        sinks, leaves = [Sink(None, probe)] * 2, [probe]
        results = [expected.square().sum((1, 2))]
    else:
        probe = torch.zeros(N, 6, dtype=x.dtype, requires_grad=True)
        factors = [None, weights[4:]]
        sinks = [Sink(None, probe, key, w) for key, w in zip(keys, factors, strict=True)]
        first = count_sketch(expected[:, :4].flatten(1), keys[0], 6)
        second = count_sketch((expected[:, 4:] * weights[4:]).flatten(1), keys[1], 6)
        leaves, results = [probe], [first + second]
    y = 0.5 * x @ matrix.t()
    out = with_group_gradients(y.requires_grad_(), x, sinks, sizes, groups_of(group), 0.5)
    assert torch.equal(out, y)
    dy, *mine = torch.autograd.grad((out * slope).sum(), [y, *leaves])
    assert torch.equal(dy, slope)
    for a, b in zip(mine, results, strict=True):
        torch.testing.assert_close(a, b)


def test_experts_gradients_by_group_add_up_to_the_ordinary_ones():
    e, r = 2, 3
    expert = torch.tensor([0] * 7 + [1] * 5)
    group = torch.tensor([0, 0, 1, 2, 2, 2, 2, 0, 1, 1, 1, 2])
    pair_ends = ((expert * N + group)[:, None] <= torch.arange(e * N)).sum(0).to(torch.int32)
    x, weight = draw(M, 5), draw(e, 4, 5, seed=1)
    a, b, slope = draw(e, r, 5, seed=2), draw(e, 4, r, seed=3), draw(M, 4, seed=4)
    offsets = pair_ends[N - 1 :: N].contiguous()

    def ordinary(a, b, rows):
        y = grouped_lora_linear(x, weight, a, b, offsets, 0.5)
        return (y * slope * rows[:, None]).sum()

    leaves = [torch.zeros(N, *m.shape, dtype=x.dtype, requires_grad=True) for m in (a, b)]
    inputs = x.clone().requires_grad_()
    sinks = (Sink(leaves[0]), Sink(leaves[1]))
    y = expert_linear(inputs, weight, a, b, offsets, 0.5, sinks, pair_ends)
    torch.testing.assert_close(y, grouped_lora_linear(x, weight, a, b, offsets, 0.5))
    dx, *mine = torch.autograd.grad((y * slope).sum(), [inputs, *leaves])
    for i in range(N):
        tracked = [m.clone().requires_grad_() for m in (a, b)]
        expected = torch.autograd.grad(ordinary(*tracked, (group == i).to(x.dtype)), tracked)
        torch.testing.assert_close([m[i] for m in mine], [*expected])
    other = x.clone().requires_grad_()
    theirs = grouped_lora_linear(other, weight, a, b, offsets, 0.5)
    torch.testing.assert_close(dx, torch.autograd.grad((theirs * slope).sum(), other)[0])
