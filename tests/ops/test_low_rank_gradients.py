"""low_rank_gradients: the kernel against float64, alone, in lora_linear and in lora_linears.

Without a GPU the kernel runs in Triton's interpreter, in fp32 and fp16. bf16 needs a GPU.
"""

from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from fastlora.ops.linear import low_rank_gradients as module
from fastlora.ops.linear.lora import lora_linear
from fastlora.ops.linear.lora_group import Branch, joint_lora_linears, lora_linears
from fastlora.ops.linear.low_rank_gradients import (
    kernel_supports,
    low_rank_gradients,
    low_rank_gradients_reference,
)

pytest.importorskip("triton", reason="the kernel's tests need triton: requirements-test.txt has it")

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
HALF = torch.bfloat16 if CUDA else torch.float16
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]
# (rows, widths, ranks). Sizes below, at and above a tile's; equal and unequal ranks, one above 16.
SHAPES = [
    (5, (7,), (1,)),
    (64, (256,), (16,)),
    (300, (520, 130, 64), (16, 16, 16)),
    (70, (96, 300), (3, 20)),
    (1, (8, 8, 8), (2, 1, 4)),
]


def drawn(n, widths, ranks, dtype, gap=0):
    """dy with `gap` columns before each layer's, every B, x_a, the starts and the scalings."""
    gen = torch.Generator().manual_seed(0)
    new = lambda *s: torch.randn(*s, generator=gen, dtype=torch.float64).to(DEVICE, dtype)
    bs = [new(w, r) for w, r in zip(widths, ranks, strict=True)]
    starts = [sum(widths[:i]) + gap * (i + 1) for i in range(len(widths))]
    dy = new(n, sum(widths) + gap * len(widths))
    return dy, bs, new(n, sum(ranks)), starts, [0.5 + i for i in range(len(widths))]


def flat(result) -> list[Tensor]:
    return [result[0], *result[1]]


def relative(x: Tensor, exact: Tensor) -> float:
    return float((x.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("gap", [0, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_errs_no_more_than_plain_torch(shape, dtype, gap):
    dy, bs, x_a, *rest = drawn(*shape, dtype, gap)
    exact = low_rank_gradients_reference(dy.double(), [b.double() for b in bs], x_a.double(), *rest)
    plain = flat(low_rank_gradients_reference(dy, bs, x_a, *rest))
    found = flat(low_rank_gradients(dy, bs, x_a, *rest))
    for f, p, e in zip(found, plain, flat(exact), strict=True):
        assert f.dtype == dtype and f.shape == p.shape and f.is_contiguous()
        assert relative(f, e) <= relative(p, e) + 4 * torch.finfo(dtype).eps


def test_tensors_need_not_be_contiguous_and_more_columns_are_not_read():
    dy, bs, x_a, *rest = drawn(70, (96, 40), (3, 5), torch.float32)
    straight = flat(low_rank_gradients(dy, bs, x_a, *rest))
    for change in (lambda t: torch.cat([t, t], 1), lambda t: t.t().contiguous().t()):
        of = change(dy), [change(b)[:, : b.shape[1]] for b in bs], change(x_a)
        assert all(map(torch.equal, flat(low_rank_gradients(*of, *rest)), straight))


def test_custom_op_passes_opcheck():
    dy, bs, x_a, *rest = drawn(9, (20, 8), (3, 5), torch.float32)
    torch.library.opcheck(torch.ops.fastlora.low_rank_gradients, (dy, bs, x_a, *rest))


def test_rank_dtype_and_number_of_layers_decide():
    assert kernel_supports(torch.bfloat16, 16, 1, 8) and kernel_supports(torch.float16, 4)
    assert not kernel_supports(torch.float32, 4) and not kernel_supports(torch.bfloat16, 17)
    assert not kernel_supports(torch.bfloat16) and not kernel_supports(torch.bfloat16, *[4] * 4)


def layers(dtype=HALF, layout=(4, 3, 16)):
    """(x, every A, the branches, dy of each): as of q, k and v. Rank 0: a layer without LoRA."""
    gen = torch.Generator().manual_seed(1)
    new = lambda *s: torch.randn(*s, generator=gen, dtype=torch.float64).to(DEVICE, dtype)
    fused = new(64, 24) / 5
    weights = fused.split((32, 16, 16))
    pairs = zip(weights, layout, strict=True)
    branches = [Branch(w, None, new(len(w), r) if r else None, 1.5) for w, r in pairs]
    x, matrices = new(2, 9, 24), [new(r, 24) / 5 for r in layout if r]
    return x, matrices, branches, fused, [new(2, 9, len(w)) for w in weights]


def gradients(way, fused, layout=(4, 3, 16)) -> list[Tensor]:
    """Gradients of x, every A and every B, by one of four ways to run the layers."""
    x, matrices, branches, weight, dys = layers(layout=layout)
    x, matrices = x.requires_grad_(), [m.requires_grad_() for m in matrices]
    leaves = [b.b.requires_grad_() for b in branches if b.b is not None]
    if way == "single":
        w, _, b, scaling = branches[0]
        y = lora_linear(x, x @ matrices[0].t(), w, None, b, scaling, fused=fused)
        return [*torch.autograd.grad(y, [x, matrices[0], b], dys[0])]
    if way == "joint":
        _, y = joint_lora_linears(x, matrices, branches, None, weight, fused=fused)
        ys, dys = [y], [torch.cat(dys, -1)]
    else:
        weight = weight if way == "one weight" else None
        _, ys = lora_linears(x, matrices, branches, None, weight, fused=fused)
    return [*torch.autograd.grad(ys, [x, *matrices, *leaves], dys)]


WAYS = {"single": 1, "joint": 1, "one weight": 1, "apart": 0}


@pytest.mark.parametrize("layout", [(4, 3, 16), (16, 0, 8), (0, 5, 0)], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_layers_give_the_same_gradients_with_and_without_the_kernel(way, layout):
    if way == "single" and not layout[0]:
        layout = layout[1:] + layout[:1]
    real, calls = module.low_rank_gradients, []

    def watched(*args):
        calls.append(len(args[1]))
        return real(*args)

    plain = gradients(way, False, layout)
    with patch.object(module, "low_rank_gradients", watched):
        fused = gradients(way, True, layout)
    ranks = [r for r in layout if r]
    # Separate gradients of several layers stay products: side by side they would be a copy.
    one = WAYS[way] or len(ranks) == 1
    assert calls == ([1 if way == "single" else len(ranks)] if one else [])
    for f, p in zip(fused, plain, strict=True):
        assert relative(f, p.double()) < 8 * torch.finfo(HALF).eps


@pytest.mark.compile
@pytest.mark.parametrize("way", ["single", "joint", "one weight"])
def test_compiled_gradients_equal_eager_ones(way, fresh_dynamo):
    def loss(x, matrices, branches, weight, dys):
        if way == "single":
            w, _, b, scaling = branches[0]
            ys = [lora_linear(x, x @ matrices[0].t(), w, None, b, scaling, fused=True)]
        elif way == "joint":
            ys = [joint_lora_linears(x, matrices, branches, None, weight, fused=True)[1]]
            dys = [torch.cat(dys, -1)]
        else:
            _, ys = lora_linears(x, matrices, branches, None, weight, fused=True)
        return sum((y * d).float().sum() for y, d in zip(ys, dys, strict=False))

    def run(fn):
        args = layers()
        leaves = [args[0], *args[1], *(b.b for b in args[2])]
        for leaf in leaves:
            leaf.requires_grad_()
        return torch.autograd.grad(fn(*args), leaves, allow_unused=True, materialize_grads=True)

    found = run(torch.compile(loss, fullgraph=True, backend="aot_eager"))
    for f, w in zip(found, run(loss), strict=True):  # some leaves are not used
        assert (f - w).double().norm() <= 8 * torch.finfo(HALF).eps * w.double().norm()


def test_second_derivatives_run_plain_products():
    x, matrices, branches, *_ = layers(torch.float32)
    x.requires_grad_()
    b = branches[0].b.requires_grad_()
    y = lora_linear(x, x @ matrices[0].t(), branches[0].weight, None, b, 1.5, fused=True)
    (g,) = torch.autograd.grad((y * y).sum(), x, create_graph=True)
    assert torch.autograd.grad(g.sum(), b)[0].abs().sum() > 0
