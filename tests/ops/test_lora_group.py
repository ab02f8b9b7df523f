"""lora_linears against its reference: several layers of one input, with and without LoRA."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastlora.ops.linear.lora_group import (
    Branch,
    joint_lora_linears,
    lora_linears,
    lora_linears_reference,
)
from fastlora.ops.quant.bitsandbytes import quantize_4bit
from fastlora.ops.quant.dequantize import dequantize

# The rank of each layer; 0 means no LoRA. Layers with an even rank have a bias.
LAYOUTS = [(4, 4, 4), (4, 0, 2), (0, 0), (3,), (0, 1, 0, 5)]
D_IN, WIDTHS = 12, (20, 8, 16, 9)


def drawn(layout, dtype=torch.float32, quantised=False):
    """x, every A, the branches, and the gradients of the outputs: of x_a and of each y."""
    gen = torch.Generator().manual_seed(0)
    new = lambda *n: torch.randn(*n, generator=gen, dtype=torch.float64).to(dtype)
    branches = []
    for r, width in zip(layout, WIDTHS, strict=False):
        weight = quantize_4bit(new(width, D_IN)) if quantised else new(width, D_IN)
        bias = None if r % 2 else new(width)
        branches.append(Branch(weight, bias, new(width, r) if r else None, 1.5))
    matrices = [new(r, D_IN) for r in layout if r]
    dys = [new(2, 5, width) for _, width in zip(layout, WIDTHS, strict=False)]
    dx_a = new(2, 5, sum(layout)) if any(layout) else None
    return new(2, 5, D_IN), matrices, branches, [dx_a, *dys]


def as_(dtype, x, matrices, branches, grads):
    to = lambda t: t.to(dtype) if isinstance(t, Tensor) else t
    return to(x), [*map(to, matrices)], [Branch(*map(to, b)) for b in branches], [*map(to, grads)]


def trained(x, matrices, branches) -> list[Tensor]:
    """The tensors that get gradients: x, every A, B and bias."""
    return [x, *matrices, *(t for b in branches for t in (b.bias, b.b) if t is not None)]


def value_and_grads(fn, x, matrices, branches, grads, wanted=lambda i: True) -> list[Tensor]:
    leaf = lambda t: None if t is None else t.detach().clone().requires_grad_()
    x, matrices = leaf(x), [leaf(m) for m in matrices]
    branches = [b._replace(bias=leaf(b.bias), b=leaf(b.b)) for b in branches]
    x_a, ys = fn(x, matrices, branches)
    out = [(y, g) for i, (y, g) in enumerate(zip([x_a, *ys], grads, strict=True)) if wanted(i)]
    out = [(y, g) for y, g in out if y is not None]
    found = torch.autograd.grad(
        [y for y, _ in out],
        trained(x, matrices, branches),
        [g for _, g in out],
        allow_unused=True,
        materialize_grads=True,
    )
    return [*(y.detach() for y in [x_a, *ys] if y is not None), *found]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_op_errs_no_more_than_the_reference(layout, dtype):
    args = drawn(layout, dtype)
    exact = value_and_grads(lora_linears_reference, *as_(torch.float64, *args))
    plain, fused = (value_and_grads(fn, *args) for fn in (lora_linears_reference, lora_linears))
    for f, p, e in zip(fused, plain, exact, strict=True):
        error = lambda t, e=e: (t.double() - e).norm().item()
        assert f.dtype == dtype and f.shape == p.shape
        assert error(f) <= 1.3 * error(p) + 4 * torch.finfo(dtype).eps * e.norm().item()


@pytest.mark.parametrize("unused", [0, 1, 2, 3])
@pytest.mark.parametrize("layout", [(4, 4, 4), (4, 0, 2), (0, 0, 0)])
def test_unused_outputs_contribute_no_gradient(layout, unused):
    args = drawn(layout)
    only = partial(value_and_grads, wanted=lambda i: i != unused)
    torch.testing.assert_close(only(lora_linears, *args), only(lora_linears_reference, *args))
    alone = partial(value_and_grads, wanted=lambda i: i == max(1, unused))
    torch.testing.assert_close(alone(lora_linears, *args), alone(lora_linears_reference, *args))


@pytest.mark.parametrize("layout", [(4, 4, 4), (4, 0, 2), (0, 0)])
def test_quantised_weight_equals_its_dequantised_matrix_to_the_bit(layout):
    x, matrices, branches, grads = drawn(layout, quantised=True)
    dense = [b._replace(weight=dequantize(b.weight, torch.float32)) for b in branches]
    ours = value_and_grads(lora_linears, x, matrices, branches, grads)
    assert all(map(torch.equal, ours, value_and_grads(lora_linears, x, matrices, dense, grads)))


def test_no_dequantised_matrix_is_saved_for_the_backward_pass():
    x, matrices, branches, _ = drawn((4, 0, 2), quantised=True)
    sizes, leaves = [], trained(x, matrices, branches)
    for leaf in leaves:
        leaf.requires_grad_()
    pack = lambda t: sizes.append(tuple(t.shape)) or t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        lora_linears(x, matrices, branches)
    assert sizes and not {(width, D_IN) for width in WIDTHS} & {*sizes}


def test_x_is_not_saved_without_an_adapter():
    x, _, branches, _ = drawn((0, 0))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lora_linears(x.requires_grad_(), [], branches)
    assert kept and all(t.data_ptr() != x.data_ptr() for t in kept)


def test_derivatives_of_both_orders_equal_finite_differences():
    x, matrices, branches, _ = drawn((2, 0, 1), torch.float64)
    leaves = [x, *matrices, *(b.b for b in branches if b.b is not None)]

    def fn(x, a_0, a_1, b_0, b_1):
        of = [b._replace(b=new) for b, new in zip(branches, (b_0, None, b_1), strict=True)]
        x_a, ys = lora_linears(x, [a_0, a_1], of)
        return x_a, *ys

    leaves = [leaf.requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(fn, leaves) and torch.autograd.gradgradcheck(fn, leaves)


class Watch(TorchDispatchMode):
    """Records each op that runs, with its positional arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def test_gradient_of_x_is_one_op():
    x, matrices, branches, (_, *dys) = drawn((4, 0, 2))
    _, ys = lora_linears(x.requires_grad_(), matrices, branches)
    with Watch() as watch:
        torch.autograd.grad(ys, x, dys)
    calls = [func for func, _ in watch.calls]
    assert calls.count(torch.ops.fastlora.sum_of_products.default) == 1
    assert torch.ops.aten.add.Tensor not in calls


def test_torch_func_and_trained_weights_equal_the_reference():
    x, matrices, branches, (dx_a, *dys) = drawn((4, 0, 2))

    def loss(x):
        x_a, ys = lora_linears(x, matrices, branches)
        return (x_a * dx_a).sum() + sum((y * g).sum() for y, g in zip(ys, dys, strict=True))

    expected = value_and_grads(lora_linears_reference, x, matrices, branches, [dx_a, *dys])[4]
    torch.testing.assert_close(torch.func.grad(loss)(x), expected)
    each = torch.func.vmap(
        torch.func.grad(lambda x: lora_linears(x, matrices, branches)[1][1].sum())
    )
    assert each(x).shape == x.shape
    branches[1].weight.requires_grad_()
    (g,) = torch.autograd.grad(loss(x), branches[1].weight)
    torch.testing.assert_close(g, dys[1].flatten(0, 1).t() @ x.flatten(0, 1))


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.compile)])
@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("layout", [(4, 4, 4), (0, 3), (0, 0)])
def test_joint_gradient_equals_separate_gradients(layout, quantised, compile, fresh_dynamo):
    x, matrices, branches, (_, *dys) = drawn(layout, quantised=quantised)
    fused_weight = None if quantised else torch.cat([b.weight for b in branches])

    def joint(x, matrices, branches):
        ys, placeholder = joint_lora_linears(x, matrices, branches, None, fused_weight)
        assert placeholder.shape == (2, 5, sum(y.shape[-1] for y in ys))
        assert not any(y.requires_grad for y in ys) and placeholder.requires_grad
        return placeholder, ys

    fn = torch.compile(joint, fullgraph=True, backend="aot_eager") if compile else joint
    one, all_, ys = [torch.cat(dys, -1)], [None, *dys], len(dys)
    separate = value_and_grads(lora_linears, x, matrices, branches, all_, lambda i: i > 0)
    first = lambda i: i == 0
    found = value_and_grads(fn, x, matrices, branches, one + [None] * ys, first)
    torch.testing.assert_close(found[1:], separate[len(matrices) > 0 :])


def test_frozen_layers_without_gradients_equal_torchs():
    x, _, branches, _ = drawn((0, 0))
    with torch.no_grad():
        x_a, ys = lora_linears(x, [], branches)
    assert x_a is None
    for y, b in zip(ys, branches, strict=True):
        assert torch.equal(y, F.linear(x, b.weight, b.bias))


@pytest.mark.compile
@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("layout", [(4, 0, 2), (0, 0)])
def test_compiled_gradient_equals_eager(layout, quantised, fresh_dynamo):
    args = drawn(layout, quantised=quantised)
    compiled = torch.compile(lora_linears, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        value_and_grads(compiled, *args), value_and_grads(lora_linears, *args)
    )


@pytest.mark.compile
@pytest.mark.parametrize("layout", LAYOUTS)
def test_op_compiles_if_nothing_requires_a_gradient(layout, fresh_dynamo):
    """For each number of tensors: dynamo compares the number of arguments in this case."""
    args = drawn(layout)[:3]
    found = torch.compile(lora_linears, fullgraph=True, backend="aot_eager")(*args)
    torch.testing.assert_close(found, lora_linears(*args))
    with torch.no_grad():
        compiled = torch.compile(lora_linears, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*args), found)


def test_custom_op_passes_opcheck_and_writes_to_no_argument():
    _, (a,), branches, (dx_a, dy) = drawn((3,))
    args = ([dx_a.flatten(0, 1), dy.flatten(0, 1)], [a, branches[0].weight], [1, 1])
    torch.library.opcheck(
        torch.ops.fastlora.sum_of_products.default,
        args,
        test_utils=("test_schema", "test_faketensor"),
    )
    before = [t.clone() for t in args[0]]
    torch.ops.fastlora.sum_of_products(*args)
    assert all(map(torch.equal, before, args[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("unused", [None, 1, 2])
@pytest.mark.parametrize("layout", [(4, 4, 4), (4, 0, 2), (0, 0, 0)])
def test_fused_weights_make_one_product_of_the_gradient_of_x(layout, unused, dtype):
    """If an output is unused, each remaining weight has its own product."""
    x, matrices, branches, grads = drawn(layout, dtype)
    fused_weight = torch.cat([branch.weight for branch in branches])
    rows = fused_weight.split([branch.weight.shape[0] for branch in branches])
    branches = [b._replace(weight=row) for b, row in zip(branches, rows, strict=True)]
    only = partial(value_and_grads, wanted=lambda i: i != unused)
    with Watch() as watch:
        found = only(partial(lora_linears, fused_weight=fused_weight), x, matrices, branches, grads)
    args = (x, matrices, branches, grads)
    exact = only(lora_linears_reference, *as_(torch.float64, *args))
    plain = only(lora_linears_reference, *args)
    for f, p, e in zip(found, plain, exact, strict=True):
        error = lambda t, e=e: (t.double() - e).norm().item()
        assert error(f) <= 1.3 * error(p) + 4 * torch.finfo(dtype).eps * e.norm().item()
    terms = bool(sum(layout)) + (1 if unused is None else 2)
    op = torch.ops.fastlora.sum_of_products.default
    assert [len(args[0]) for func, args in watch.calls if func is op] == [terms]
