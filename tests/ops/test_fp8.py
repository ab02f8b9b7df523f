"""Rows in e4m3 and products with a matrix in e4m3, beside formulas in float64 with the same
rounding. On the CPU the rounded values are multiplied in the dtype of x; tests/gpu has the GPU's
fp8 products."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastlora.ops.linear.frozen import frozen_linear, frozen_linear_reference
from fastlora.ops.linear.group_products import Groups
from fastlora.ops.linear.lora import lora_linear, lora_linear_reference
from fastlora.ops.linear.lora_group import Branch, joint_lora_linears, lora_linears
from fastlora.ops.linear.stacked_lora import StackedBranch, stacked_linears
from fastlora.ops.quant import e4m3
from fastlora.ops.quant.dequantize import dequantize
from fastlora.ops.quant.e4m3 import (
    quantize_matrix,
    quantize_rows,
    quantize_rows_reference,
    rounded_rows,
    rounds_to,
    row_scales,
)
from fastlora.ops.quant.weights import E4M3, WeightFP8, from_parts, parts
from oracles.trees import relative_error

GEN = torch.Generator()
SCALING = 1.5


def new(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=GEN, dtype=torch.float64).to(dtype)


@pytest.fixture(autouse=True)
def seeded():
    GEN.manual_seed(0)


def rounded(x: Tensor) -> Tensor:
    """The rows of x rounded to e4m3, from e4m3's definition, in float64."""
    x = x.double()
    amax = x.abs().amax(-1, keepdim=True)
    scale = torch.where(amax > 0, torch.exp2(torch.ceil(torch.log2(amax / 448))), 1.0)
    y = x / scale
    exponent = torch.frexp(y)[1].clamp(min=-5) - 1  # of the power of two below |y|
    step = torch.exp2((exponent - 3).double())
    return torch.round(y / step) * step * scale  # torch.round takes ties to even, as e4m3 does


ROWS = {
    "normal": lambda: new(7, 33),
    "far apart": lambda: new(7, 33) * torch.logspace(-20, 20, 7, dtype=torch.float64)[:, None],
    "outliers": lambda: torch.cat([new(7, 32), 1e4 * new(7, 1)], 1),
    "zeros": lambda: torch.zeros(7, 33, dtype=torch.float64),
    "ends of binades": lambda: (448 * 2.0 ** torch.arange(-3, 4))[:, None].double().expand(7, 33),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ROWS)
def test_rows_are_rounded_to_the_nearest_numbers_of_e4m3(kind, dtype):
    x = ROWS[kind]().to(dtype)
    values, scale = quantize_rows([x])
    assert torch.equal(values.double() * scale.double()[:, None], rounded(x))
    assert torch.equal(scale, torch.exp2(torch.log2(scale).round()))
    assert torch.equal(rounded_rows(x).double(), rounded(x))
    assert torch.equal(rounded_rows(rounded_rows(x)), rounded_rows(x))


@pytest.mark.parametrize("largest", [1.0, 63_487.0, 63_489.0, 65_504.0])
def test_float16_is_rounded_in_float32(largest):
    """From 63,488 on e4m3 rounds to 65,536, which float16 does not hold."""
    x = new(5, 32, dtype=torch.float32)
    x = (x / x.abs().amax(1, keepdim=True) * largest).half()
    matrix = quantize_matrix(new(16, 32, dtype=torch.float32) / 512)
    bias = new(16, dtype=torch.float16)
    expected = (rounded(x) @ dequantize(matrix, torch.float64).t()).half() + bias
    found, gradients = torch.func.vjp(lambda x: frozen_linear(x, matrix, bias), x)
    assert torch.isfinite(expected).all() and relative_error(found, expected) < 2e-3
    assert relative_error(frozen_linear(x, matrix, bias), found) < 2e-3
    (dx,) = gradients(torch.ones_like(found))
    assert relative_error(dx, dequantize(matrix, torch.float64).sum(0).expand(5, 32)) < 2e-3


def test_largest_values_use_the_upper_half_of_the_range():
    amax = torch.cat([new(1000, dtype=torch.float32).abs(), torch.tensor([448.0, 448.00003, 1.0])])
    top = amax / row_scales(amax)
    assert bool((top <= 448).all() and (top > 224).all())
    assert row_scales(amax)[-3:].tolist() == [1.0, 2.0, 2.0**-8]


def test_rows_that_are_not_finite_stay_so():
    for bad in (torch.inf, torch.nan):
        x = torch.ones(2, 4)
        x[0, 1] = bad
        values, scale = quantize_rows([x])
        assert scale[0].isnan() and (values[1].float() * scale[1]).equal(x[1])


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_kernels_scale_of_a_row_that_is_not_finite_is_nan(bad):
    from fastlora.ops.quant import e4m3_kernel

    x = torch.ones(3, 40)
    x[0, 33] = bad
    _, scale = e4m3_kernel.quantize_rows([x], None, torch.float32, (16, 4))
    assert scale[0].isnan() and scale[1:].equal(row_scales(torch.ones(2)))


def test_several_tensors_are_quantised_as_one_with_factors_of_the_columns():
    x, factors = new(5, 24, dtype=torch.float32), torch.exp2(torch.arange(24) % 5 - 9.0)
    widths = [4, 12, 8]
    values, scale = quantize_rows(x.split(widths, 1), factors.split(widths))
    wanted = quantize_rows_reference([x * factors])
    assert torch.equal(values.view(torch.uint8), wanted[0].view(torch.uint8))
    assert torch.equal(scale, wanted[1])
    assert torch.equal(values.double() * scale.double()[:, None], rounded(x * factors))


@pytest.mark.parametrize(("capability", "runs"), [((8, 0), False), ((8, 9), True), ((9, 0), True)])
def test_kernel_runs_on_gpus_that_have_e4m3(capability, runs, monkeypatch):
    """Triton compiles no kernel that writes e4m3 for an A100 (sm_80). The reference runs there."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    e4m3.multiplies_e4m3.cache_clear()
    with FakeTensorMode():
        x = torch.empty(2, 8, device="cuda:0", dtype=torch.bfloat16)
    assert e4m3._kernel_supports(x) == runs
    assert not e4m3._kernel_supports(torch.zeros(2, 8))
    e4m3.multiplies_e4m3.cache_clear()


# ── kernels, in Triton's interpreter ──────────────────────────────────────────────────────
# Its conversion to e4m3 is wrong where rounding carries into the exponent (triton 3.9), so the
# kernel writes the scaled values in float32, and the test rounds them.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["normal", "outliers", "zeros", "ends of binades"])
def test_kernel_gives_the_references_bits(kind, dtype):
    from fastlora.ops.quant import e4m3_kernel

    x = (ROWS[kind]() / 8).to(dtype)
    factors = torch.exp2(torch.arange(57) % 5 - 2.0)
    pieces = [x, x.flip(1).repeat(1, 2)[:, 1:25]]  # rows of the second are apart
    cut = factors.split([33, 24])
    for ys, by in (([x], None), ([x], cut[:1]), (pieces, cut), ([x.t()[:7]], None)):
        scaled, scale = e4m3_kernel.quantize_rows(ys, by, torch.float32, (16, 4))
        values, wanted = quantize_rows_reference(ys, by)
        assert torch.equal(scale, wanted)
        assert torch.equal(scaled.to(E4M3).float(), values.float())


def test_kernel_transposes_every_byte():
    from fastlora.ops.quant import e4m3_kernel

    matrices = [torch.randint(0, 256, (n, 50), dtype=torch.uint8, generator=GEN) for n in (37, 20)]
    out, ones = e4m3_kernel.side_by_side(matrices, (16, 32, 4))
    assert torch.equal(out, torch.cat(matrices).t()) and torch.equal(ones, torch.ones(50))


# ── matrices ──────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dequantised_matrix_is_exact_in_every_wider_dtype(dtype, monkeypatch):
    monkeypatch.setattr("fastlora.ops.quant.e4m3._CHUNK", 60)  # several pieces
    matrix = new(20, 24, dtype=torch.float32) * torch.logspace(-9, 3, 20)[:, None]
    weight = quantize_matrix(matrix)
    assert torch.equal(dequantize(weight, dtype).double(), rounded(matrix))
    assert weight.values.nbytes == matrix.numel() and weight.scale.dtype == torch.float32
    back = from_parts(parts(weight))
    assert isinstance(back, WeightFP8) and torch.equal(back.values, weight.values)


def test_a_weight_is_recognised_by_its_matrix_in_any_dtype_and_by_no_other():
    matrix = new(40, 64, dtype=torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        assert rounds_to(matrix, quantize_matrix(matrix.to(dtype)))
    weight = quantize_matrix(matrix)
    assert not rounds_to(matrix * 1.01, weight) and not rounds_to(matrix.flip(0), weight)
    assert not rounds_to(matrix.clone().fill_(torch.nan), weight)


# ── products ──────────────────────────────────────────────────────────────────────────────
LAYOUTS = [(3, 3, 3), (3, 0, 2), (0, 0), (4,)]  # ranks of layers of one input; 0: no LoRA
D_IN, WIDTHS = 24, (20, 8, 36)


def drawn(layout, dtype=torch.float64):
    """(x [m, d_in], every A, the branches, the gradients of the ys)."""
    make, branches = lambda *n: new(*n, dtype=dtype), []
    for r, n in zip(layout, WIDTHS, strict=False):
        bias, b = make(n) if r % 2 else None, make(n, r) if r else None
        branches.append(Branch(quantize_matrix(make(n, D_IN)), bias, b, SCALING))
    matrices = [make(r, D_IN) for r in layout if r]
    return make(6, D_IN), matrices, branches, [make(6, n) for n in WIDTHS[: len(layout)]]


def formula(x, matrices, branches, dys):
    """(ys, dx, dA, dB, dbias): forward Q(x) W' + ..., and for dx one row of all dys times the
    scales of W's rows, rounded together."""
    x, dys = x.double(), [dy.double() for dy in dys]
    q, stacked, scaled, dx = rounded(x), [], [], torch.zeros_like(x)
    ys, das, dbs, dbiases, rest = [], [], [], [], [m.double() for m in matrices]
    for branch, dy in zip(branches, dys, strict=True):
        w, s = dequantize(branch.weight, torch.float64), branch.weight.scale.double()
        y = q @ w.t() + (0 if branch.bias is None else branch.bias.double())
        if branch.b is not None:
            a, b = rest.pop(0), branch.b.double()
            y = y + branch.scaling * (x @ a.t()) @ b.t()
            dx = dx + branch.scaling * dy @ b @ a
            das.append(branch.scaling * (dy @ b).t() @ x)
            dbs.append(branch.scaling * dy.t() @ (x @ a.t()))
        if branch.bias is not None:
            dbiases.append(dy.sum(0))
        ys.append(y)
        stacked.append(w / s[:, None])
        scaled.append(dy * s)
    dx = dx + rounded(torch.cat(scaled, 1)) @ torch.cat(stacked)
    return [*ys, dx, *das, *dbs, *dbiases]


def by_op(fn, x, matrices, branches, dys):
    leaf = lambda t: None if t is None else t.detach().clone().requires_grad_()
    x, matrices = leaf(x), [leaf(m) for m in matrices]
    branches = [b._replace(bias=leaf(b.bias), b=leaf(b.b)) for b in branches]
    ys = fn(x, matrices, branches)
    of_branches = [*(b.b for b in branches), *(b.bias for b in branches)]
    leaves = [x, *matrices, *(t for t in of_branches if t is not None)]
    return [*(y.detach() for y in ys), *torch.autograd.grad(ys, leaves, dys)]


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.detach().double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_products_and_gradients_are_the_formulas(layout):
    args = drawn(layout)
    found = by_op(lambda x, m, b: lora_linears(x, m, b)[1], *args)
    for ours, exact in zip(found, formula(*args), strict=True):
        assert relative(ours, exact) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_products_err_no_more_than_in_float32_arithmetic(layout, dtype):
    """Beyond the rounding to e4m3: a few roundings to the dtype of x."""
    args = drawn(layout, dtype)
    found = by_op(lambda x, m, b: lora_linears(x, m, b)[1], *args)
    for ours, exact in zip(found, formula(*args), strict=True):
        assert ours.dtype == dtype and relative(ours, exact) < 3 * torch.finfo(dtype).eps


class Count(TorchDispatchMode):
    """How often `quantize_rows` runs."""

    found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found += func is torch.ops.fastlora.quantize_rows.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_common_input_is_rounded_once(layout):
    x, matrices, branches, _ = drawn(layout)
    with Count() as count:
        lora_linears(x.requires_grad_(), matrices, branches)
    assert count.found == 1


def test_layers_of_one_input_equal_single_layers_forward():
    x, matrices, branches, _ = drawn((3, 3, 3))
    ys = lora_linears(x, matrices, branches)[1]
    for y, a, (weight, bias, b, scaling) in zip(ys, matrices, branches, strict=True):
        assert b is not None
        torch.testing.assert_close(lora_linear(x, x @ a.t(), weight, bias, b, scaling), y)


def test_gradient_side_by_side_equals_separate_gradients():
    """As from attention's backward kernel, which returns dq, dk and dv in one tensor."""
    x, matrices, branches, dys = drawn((3, 3, 3))
    branches = [branch._replace(bias=None) for branch in branches]
    wanted = by_op(lambda x, m, b: lora_linears(x, m, b)[1], x, matrices, branches, dys)
    leaf = x.clone().requires_grad_()
    ys, joint = joint_lora_linears(leaf, matrices, branches, None, None)
    assert joint is not None
    (dx,) = torch.autograd.grad(joint, leaf, torch.cat(dys, 1))
    assert all(map(torch.equal, (*ys, dx), wanted[:4]))


def test_gradients_without_some_outputs_and_of_views():
    x, matrices, branches, dys = drawn((3, 0, 2))
    for used in ((0,), (1,), (0, 2)):
        leaf = x.clone().requires_grad_()
        ys = lora_linears(leaf, matrices, branches)[1]
        (dx,) = torch.autograd.grad([ys[i] for i in used], leaf, [dys[i] for i in used])
        kept = [branches[i] for i in used]
        own = [m for m, i in zip(matrices, (0, 2), strict=True) if i in used]
        wanted = formula(x, own, kept, [dys[i] for i in used])[len(used)]
        assert relative(dx, wanted) < 1e-12
    leaf = x.clone().requires_grad_()  # sum() gives a gradient with strides of 0
    (dx,) = torch.autograd.grad(frozen_linear(leaf, branches[1].weight).sum(), leaf)
    ones = torch.ones(6, WIDTHS[1], dtype=torch.float64)
    assert relative(dx, formula(x, [], branches[1:2], [ones])[1]) < 1e-12


@pytest.mark.parametrize("offsets", [None, torch.tensor([2, 2, 6], dtype=torch.int32)])
def test_stacked_adapters_have_the_same_base_products(offsets):
    x, _, branches, dys = drawn((2, 0))
    a, b = new(3, 2, D_IN), new(3, WIDTHS[0], 2)
    stacked = [StackedBranch(branches[0].weight, None, a, b), StackedBranch(branches[1].weight)]
    leaf = x.clone().requires_grad_()
    ys = stacked_linears(leaf[None], stacked, Groups(offsets))
    (dx,) = torch.autograd.grad(ys, leaf, [dy[None] for dy in dys[:2]])
    ends = [2, 4, 6] if offsets is None else offsets.tolist()
    group = torch.tensor([sum(i >= end for end in ends) for i in range(6)])
    low = torch.einsum("mk,mrk->mr", x, a[group])
    plain = [Branch(s.weight) for s in stacked]
    y, other, base = formula(x, [], plain, dys[:2])
    assert relative(ys[0][0], y + torch.einsum("mr,mor->mo", low, b[group])) < 1e-12
    assert relative(ys[1][0], other) < 1e-12
    into = torch.einsum("mo,mor,mrk->mk", dys[0], b[group], a[group])
    assert relative(dx, base + into) < 1e-12


# ── references, transforms, compiled code ─────────────────────────────────────────────────
def test_references_equal_the_ops_forward_and_leave_the_gradient_unrounded():
    x, (a,), (branch,), (dy,) = drawn((4,))
    weight, bias, b, scaling = branch
    assert b is not None
    args = x, x @ a.t(), weight, bias, b, scaling
    torch.testing.assert_close(lora_linear_reference(*args), lora_linear(*args))
    torch.testing.assert_close(
        frozen_linear_reference(x, weight, bias), frozen_linear(x, weight, bias)
    )
    exact = dy @ dequantize(weight, torch.float64)
    loss = lambda x: (frozen_linear(x, weight) * dy).sum()
    torch.testing.assert_close(torch.func.grad(loss)(x), exact)
    tangent = torch.func.jvp(lambda x: frozen_linear(x, weight), (x,), (x,))[1]
    torch.testing.assert_close(tangent, F.linear(x, dequantize(weight, torch.float64)))
    mapped = torch.vmap(lambda x: frozen_linear(x, weight))(x[:, None])
    torch.testing.assert_close(mapped[:, 0], frozen_linear(x, weight))
    per_row = torch.vmap(torch.func.grad(lambda x, dy: (frozen_linear(x, weight) * dy).sum()))
    torch.testing.assert_close(per_row(x[:, None], dy[:, None])[:, 0], exact)
    hessian = torch.func.hessian(lambda x: frozen_linear(x, weight).square().sum())(x[0])
    w = dequantize(weight, torch.float64)
    torch.testing.assert_close(hessian, 2 * w.t() @ w)


def test_custom_ops_pass_opcheck():
    x, (a,), (branch,), (dy,) = drawn((4,), torch.float32)

    def check(op, *args, tests=("test_schema", "test_faketensor")):
        torch.library.opcheck(op.default, args, test_utils=tests)

    ops, weight, rows = torch.ops.fastlora, parts(branch.weight), quantize_rows([x])
    check(ops.quantized_linear, x, weight, branch.bias)
    check(ops.quantized_mm, dy, weight)
    check(ops.sum_of_products, [x @ a.t(), dy], [a, *weight], [1, 2])
    # torch 2.13 cannot compare tensors in e4m3, which its check of the schema does.
    low_rank = x @ a.t(), branch.b, 1.5
    check(ops.fp8_linear, *rows, weight, branch.bias, *low_rank, x.dtype, tests="test_faketensor")
    check(ops.quantize_rows, [x, x], None, tests="test_faketensor")


@pytest.mark.compile
@pytest.mark.parametrize("layout", [(3, 0, 2), (0, 0)])
def test_compiled_gradient_equals_eager(layout, fresh_dynamo):
    args = drawn(layout, torch.float32)
    run = lambda x, m, b: lora_linears(x, m, b)[1]
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(by_op(compiled, *args), by_op(run, *args), strict=True):
        torch.testing.assert_close(ours, eager)
