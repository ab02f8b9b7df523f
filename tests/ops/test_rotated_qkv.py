"""rotated_qkv: values and gradients err no more than the separate operations, relative to float64.

Without a GPU the kernel runs in Triton's interpreter, in fp32 and fp16. bf16 needs a GPU.
"""

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fastlora.ops.attention.flash import flash_attention
from fastlora.ops.attention.rope import apply_rope
from fastlora.ops.attention.rotated_qkv import kernel_supports, rotated_qkv
from fastlora.ops.linear.lora_group import Branch, lora_linears_reference
from fastlora.ops.linear.masked_lora import Masks
from oracles.trees import relative_error

pytest.importorskip("triton", reason="the kernels' tests need triton: requirements-test.txt has it")

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]
D_IN = 24


def drawn(b, t, heads, hd, ranks, rows=1):
    """x, the weight of all three, every A, the Bs, RoPE's tables, the gradient of q, k and v."""
    gen = torch.Generator().manual_seed(sum(ranks) + t)
    new = lambda *n: torch.randn(*n, generator=gen, dtype=torch.float64)
    h, kv = heads
    widths = [h * hd, kv * hd, kv * hd]
    bs = [new(width, r) if r else None for width, r in zip(widths, ranks, strict=True)]
    angles = 6 * torch.rand(rows, t, hd // 2, generator=gen, dtype=torch.float64).repeat(1, 1, 2)
    matrices = [new(r, D_IN) for r in ranks if r]
    tables = (angles.cos(), angles.sin())
    return new(b, t, D_IN), new(sum(widths), D_IN), matrices, bs, tables, new(b, t, sum(widths))


def to(tree, dtype):
    return tree_map(lambda x: None if x is None else x.to(DEVICE, dtype), tree)


def branches_of(weight: Tensor, bs, heads, hd) -> list[Branch]:
    parts = weight.split([n * hd for n in (*heads, heads[1])])
    return [Branch(w, None, b, 1.5 - i) for i, (w, b) in enumerate(zip(parts, bs, strict=True))]


def separate(x, matrices, branches, masks, weight, rope, heads):
    """The specification: (q, k, v, all unrotated columns side by side)."""
    _, ys = lora_linears_reference(x, matrices, branches, masks)
    q, k, v = (y.unflatten(2, (-1, rope[0].shape[2])).transpose(1, 2) for y in ys)
    return apply_rope(q, *rope), apply_rope(k, *rope), v, torch.cat(ys, -1)


def value_and_grads(fn, given, heads, hd, masks, dtype) -> list[Tensor]:
    x, weight, matrices, bs, rope, dy = to(given, dtype)
    leaves = [x, *matrices, *(b for b in bs if b is not None)]
    for leaf in leaves:
        leaf.requires_grad_()
    *qkv, joint = fn(x, matrices, branches_of(weight, bs, heads, hd), masks, weight, rope, heads)
    return [*(y.detach() for y in qkv), *torch.autograd.grad(joint, leaves, dy)]


# (b, t, (heads of q, of k), head size, ranks of q, k and v, rows of RoPE's tables)
CASES = [
    (2, 50, (4, 2), 32, (4, 2, 5), 1),
    (2, 33, (8, 4), 64, (16, 0, 3), 2),
    (1, 20, (3, 1), 32, (0, 20, 0), 1),
]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_err_no_more_than_separate_operations(case, dtype, masked):
    b, t, heads, hd, ranks, rows = case
    given, masks = drawn(b, t, heads, hd, ranks, rows), None
    if masked:
        slots = tuple(range(sum(r > 0 for r in ranks)))
        masks = Masks(torch.arange(7, 7 + len(slots), device=DEVICE), slots, 0.3, True)
    exact = value_and_grads(separate, given, heads, hd, masks, torch.float64)
    plain = value_and_grads(separate, given, heads, hd, masks, dtype)
    fused = value_and_grads(rotated_qkv, given, heads, hd, masks, dtype)
    for found, other, truth in zip(fused, plain, exact, strict=True):
        error = lambda x, truth=truth: (x.double() - truth).norm().item()
        assert found.dtype == dtype and found.shape == other.shape
        slack = 4 * torch.finfo(dtype).eps * truth.norm().item()
        assert error(found) <= 1.3 * error(other) + slack


def test_attention_takes_rotated_queries_and_gives_unrotated_gradients():
    x, weight, matrices, bs, rope, _ = to(drawn(1, 40, (4, 2), 32, (4, 2, 5)), torch.float32)
    x = 0.05 * x  # scores of about 1
    branches = branches_of(weight, bs, (4, 2), 32)
    q, k, v, joint = rotated_qkv(x.requires_grad_(), matrices, branches, None, weight, rope, (4, 2))
    assert not any(y.requires_grad for y in (q, k, v))
    y = flash_attention(q, k, v, rope, None, joint, None, None, True)
    plain = separate(x, matrices, branches, None, weight, rope, (4, 2))
    assert relative_error(y, flash_attention(*plain[:3], None, None)) < 1e-5
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    one = torch.autograd.grad(y, x, dy)[0]
    other = torch.autograd.grad(flash_attention(*plain[:3], None, None), x, dy)[0]
    assert relative_error(one, other) < 1e-5


def test_which_layers_are_supported():
    x, weight, _, bs, *_ = to(drawn(1, 8, (4, 2), 32, (4, 2, 5)), torch.float32)
    branches = branches_of(weight, bs, (4, 2), 32)
    asked = lambda branches, hd=32, masks=None: kernel_supports(
        x.dtype, hd, branches, [4, 2, 5], masks
    )
    assert asked(branches)
    assert not asked([branch._replace(b=None) for branch in branches])
    assert not asked([branches[0]._replace(bias=weight[:, 0]), *branches[1:]])
    assert not asked(branches, hd=16) and not asked(branches, hd=96)
    assert not asked([branches[0]._replace(b=weight.new_ones(128, 65)), *branches[1:]])
    assert not asked(branches, masks=Masks(torch.arange(3), (0, 1, 2), 0.1, False))
    trained = branches[0]._replace(weight=weight.clone().requires_grad_())
    assert not asked([trained, *branches[1:]])
    assert not torch.func.vmap(lambda x: x * asked(branches))(torch.ones(2)).any()
