"""cast gives the values and gradients of .to() on each matrix."""

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from fastlora.models.params import ExpertLoRA, LoRA
from fastlora.ops.cast import cast, cast_layers


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(shape[0]), dtype=dtype)


LAYER = {
    "q_proj": LoRA(normal(3, 5), normal(4, 3)),
    "up_proj": LoRA(normal(1, 7), normal(6, 1)),
    "experts.down_proj": ExpertLoRA(normal(2, 3, 4), normal(2, 5, 3)),
}


def one_by_one(layer, dtype):
    return tree_map(lambda x: x.to(dtype), layer)


def value_and_grads(layer, how, dtype):
    layer = tree_map(lambda x: x.detach().requires_grad_(), layer)
    out = how(layer, dtype)
    value = sum((x.double() * torch.arange(x.numel()).view_as(x)).sum() for x in tree_leaves(out))
    return out, torch.autograd.grad(value, tree_leaves(layer))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.float16])
def test_cast_equals_to_on_each_tensor(dtype):
    ours, theirs = (value_and_grads(LAYER, how, dtype) for how in (cast, one_by_one))
    assert type(ours[0]["q_proj"]) is LoRA and list(ours[0]) == list(LAYER)
    for mine, expected in zip(tree_leaves(ours), tree_leaves(theirs), strict=True):
        assert mine.dtype == expected.dtype and torch.equal(mine, expected)
    assert {g.dtype for g in ours[1]} == {torch.float32}


def test_cast_without_change_returns_its_argument():
    empty = {}
    assert cast(LAYER, torch.float32) is LAYER and cast(empty, torch.bfloat16) is empty


def test_each_gradient_has_its_tensors_dtype():
    layer = {"q_proj": LoRA(normal(2, 3), normal(4, 2, dtype=torch.float64))}
    out, (a, b) = value_and_grads(layer, cast, torch.bfloat16)
    assert {x.dtype for x in tree_leaves(out)} == {torch.bfloat16}
    assert (a.dtype, b.dtype) == (torch.float32, torch.float64)


def test_unused_tensor_gets_a_zero_gradient():
    layer = tree_map(lambda x: x.clone().requires_grad_(), LAYER)
    value = cast(layer, torch.float64)["q_proj"].a.sum()
    a, *rest = torch.autograd.grad(
        value, tree_leaves(layer), allow_unused=True, materialize_grads=True
    )
    assert a.all() and not any(g.any() for g in rest)


def test_second_derivative_is_right():
    x = normal(2, 3, dtype=torch.float64).requires_grad_()
    cubed = cast({"q_proj": LoRA(x, x)}, torch.float32)["q_proj"].a.pow(3).sum()
    (g,) = torch.autograd.grad(cubed, x, create_graph=True)
    (h,) = torch.autograd.grad(g.sum(), x)
    torch.testing.assert_close(h, 6 * x.detach())


def test_torch_func_equals_autograd_and_vmap_casts_stacks():
    fn = lambda layer: sum(
        x.double().square().sum() for x in tree_leaves(cast(layer, torch.bfloat16))
    )
    leaves = tree_map(lambda x: x.clone().requires_grad_(), LAYER)
    expected = torch.autograd.grad(fn(leaves), tree_leaves(leaves))
    for g, e in zip(tree_leaves(torch.func.grad(fn)(LAYER)), expected, strict=True):
        assert torch.equal(g, e)
    stacked = tree_map(lambda x: torch.stack((x, 2 * x)), LAYER)
    out = torch.vmap(lambda layer: cast(layer, torch.bfloat16))(stacked)
    assert torch.equal(out["q_proj"].b, stacked["q_proj"].b.bfloat16())


@pytest.mark.compile
def test_compiled_gradient_equals_eager(fresh_dynamo):
    run = torch.compile(cast, fullgraph=True, backend="aot_eager")
    ours, expected = (value_and_grads(LAYER, how, torch.bfloat16) for how in (run, cast))
    torch.testing.assert_close(tree_leaves(ours), tree_leaves(expected), rtol=0, atol=0)


def test_layers_together_equal_each_layer():
    layers = [LAYER, {}, {"q_proj": LoRA(normal(2, 3), normal(4, 2))}]
    each = lambda layers, dtype: [cast(layer, dtype) for layer in layers]
    ours, theirs = (value_and_grads(layers, how, torch.float64) for how in (cast_layers, each))
    assert [list(x) for x in ours[0]] == [list(x) for x in layers]
    for mine, expected in zip(tree_leaves(ours), tree_leaves(theirs), strict=True):
        assert mine.dtype == expected.dtype and torch.equal(mine, expected)
    assert cast_layers(layers, torch.float32) is layers
