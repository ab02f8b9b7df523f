"""LoRA's A under dropout: the kernels against float64, in lora_linears and in the model.

Without a GPU the kernels run in Triton's interpreter, in fp32 and fp16. bf16 needs a GPU.
"""

import pytest
import torch
from torch.utils._pytree import tree_leaves

import fastlora
from fastlora import functional as FL
from fastlora.ops.dropout import dropout, from_row, keep_mask, key_and_row
from fastlora.ops.linear import masked_lora_kernel
from fastlora.ops.linear.lora_group import Branch, lora_linears, lora_linears_reference
from fastlora.ops.linear.masked_lora import (
    Masks,
    Segments,
    kernel_supports,
    masked_x_a_gradients_reference,
    masked_x_a_reference,
)
from oracles.pairs import adapted
from oracles.trees import relative_error, token_ids

pytest.importorskip("triton", reason="the kernel's tests need triton: requirements-test.txt has it")

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]
# (rows, width, ranks). Sizes below, at and above a tile's; equal and unequal ranks, some above 16.
SHAPES = [
    (5, 7, (1,)),
    (64, 64, (16,)),
    (70, 200, (8,)),
    (300, 130, (8, 8, 8)),
    (70, 96, (3, 20, 1)),
    (1, 64, (2, 2)),
    (600, 40, (5, 1, 4, 2, 3, 16)),
]
OPS = torch.ops.fastlora


def drawn(shape, dtype, p=0.3, unmasked=()):
    """x, every A, their masks (without those at the indices in `unmasked`), dx_a, dx to add to."""
    n, d, ranks = shape
    gen = torch.Generator().manual_seed(0)
    new = lambda *s: torch.randn(*s, generator=gen, dtype=torch.float64).to(DEVICE, dtype)
    keys = torch.arange(9, device=DEVICE) * 12345 + 3 * 2**32 + 2**31  # masks from row 3 on
    slots = tuple(-1 if i in unmasked else 2 + i for i in range(len(ranks)))
    matrices = [0.3 * new(r, d) for r in ranks]
    return new(n, d), matrices, Masks(keys, slots, p, True), new(n, sum(ranks)), new(n, d)


def of_ops(x, matrices, masks, dx_a, dx, needs_a=True):
    """(x_a, dx, dA) of the ops; dx is a new tensor, or None if None is given."""
    a, dx = torch.cat(matrices), None if dx is None else dx.clone()
    keys, segments = masks.keys, Segments(tuple(m.shape[0] for m in matrices), *masks[1:3])
    x_a = OPS.masked_x_a(x, a, keys, *segments)
    if dx is None:
        return x_a, dx, OPS.masked_x_a_backward(x, dx_a, a, keys, *segments)
    return x_a, dx, OPS.masked_x_a_backward_(dx, x, dx_a, a, keys, *segments, needs_a)


def of_reference(x, matrices, masks, dx_a, dx):
    """The results of `of_ops`, by autograd through the reference."""
    x, matrices = x.detach().requires_grad_(), [m.detach().requires_grad_() for m in matrices]
    x_a = masked_x_a_reference(x, matrices, masks)
    more, *da = torch.autograd.grad(x_a, [x, *matrices], dx_a)
    return x_a.detach(), dx + more, torch.cat(da)


def widened(args):
    x, matrices, masks, dx_a, dx = args
    return x.double(), [m.double() for m in matrices], masks, dx_a.double(), dx.double()


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.95])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_err_no_more_than_plain_torch(shape, dtype, p):
    unmasked = (1,) if len(shape[2]) > 2 else ()
    args = drawn(shape, dtype, p, unmasked)
    exact, plain = of_reference(*widened(args)), of_reference(*args)
    for found, other, truth in zip(of_ops(*args), plain, exact, strict=True):
        error = lambda t, truth=truth: (t.double() - truth).norm().item()
        assert found.dtype == dtype and found.shape == other.shape and found.is_contiguous()
        assert error(found) <= error(other) + 4 * torch.finfo(dtype).eps * truth.norm().item()


@pytest.mark.parametrize("p", [0.0, 2**-32, 0.5, 1 - 2**-31])
@pytest.mark.parametrize(("key", "row"), [(0, 0), (2**32 - 2, 1), (2**31, 0), (77, 2**31 - 9)])
def test_masks_equal_keep_mask_to_the_bit(key, row, p):
    """If x is all ones and A the identity, x_a is the scaled mask, and so are dx and dA.

    A key's high word is the number of the mask's first row.
    """
    n, d, share = 70, 48, 1.0 / (1.0 - p)
    key, row = torch.tensor(key, device=DEVICE), torch.tensor(row, device=DEVICE)
    wanted = share * keep_mask(key, n, d, p, key.device, row).float()
    other = share * keep_mask(key + 1, n, d, p, key.device, row).float()
    key = from_row(key, row)
    ones, unit = torch.ones(n, d, device=DEVICE), torch.eye(d, device=DEVICE)
    masks = Masks(torch.stack([key, key + 1]), (0, 1, -1), p, True)
    matrices = [unit, unit, unit]
    dx_a = torch.zeros(n, 3 * d, device=DEVICE)
    dx_a[:, :d] = 1.0
    x_a, dx, _ = of_ops(ones, matrices, masks, dx_a, torch.zeros_like(ones))
    assert torch.equal(x_a[:, :d], wanted) and torch.equal(dx, wanted)
    assert torch.equal(x_a[:, d : 2 * d], other) and torch.equal(x_a[:, 2 * d :], ones)
    rows = torch.eye(n, device=DEVICE)  # as dx_a, it makes dA equal to the masked x
    masks = masks._replace(slots=(0,))
    _, _, da = of_ops(ones, [torch.zeros(n, d, device=DEVICE)], masks, rows, None)
    assert torch.equal(da, wanted)


def test_tensors_need_not_be_contiguous():
    x, matrices, masks, dx_a, dx = drawn((70, 96, (3, 20)), torch.float32)
    straight = of_ops(x, matrices, masks, dx_a, dx)
    far = lambda t: torch.cat([t, t], 1)[:, : t.shape[1]]
    across = lambda t: t.t().contiguous().t()
    for change in (far, across):
        bent = of_ops(change(x), [across(m) for m in matrices], masks, change(dx_a), dx)
        assert all(map(torch.equal, bent, straight))


def test_gradients_that_are_not_needed_are_not_computed():
    x, matrices, masks, dx_a, dx = drawn((70, 96, (3, 20)), torch.float32)
    _, both_dx, both_da = of_ops(x, matrices, masks, dx_a, dx)
    _, none, da = of_ops(x, matrices, masks, dx_a, None)
    assert none is None and torch.equal(da, both_da)
    _, alone, empty = of_ops(x, matrices, masks, dx_a, dx, needs_a=False)
    assert torch.equal(alone, both_dx) and empty.shape == (0, 96)


def test_equal_calls_give_equal_bits():
    args = drawn((600, 130, (8, 8, 8)), torch.float32)
    assert all(map(torch.equal, of_ops(*args), of_ops(*args)))


def test_reference_derivative_equals_autograd():
    args = drawn((9, 14, (3, 1, 2)), torch.float64, unmasked=(1,))
    x, matrices, masks, dx_a, dx = args
    segments, a = Segments((3, 1, 2), *masks[1:3]), torch.cat(matrices)
    found = masked_x_a_gradients_reference(dx_a, x, a, masks.keys, segments)
    torch.testing.assert_close((found[0] + dx, found[1]), of_reference(*args)[1:])


def test_kernels_support_these_dtypes_and_ranks():
    assert kernel_supports(torch.bfloat16, 16, 16, 16) and kernel_supports(torch.float16, 200)
    assert kernel_supports(torch.bfloat16, 64, 3, 1)
    assert not kernel_supports(torch.bfloat16, 65, 64, 1)
    assert kernel_supports(torch.float32, 16, 16, 16, 1)
    assert not kernel_supports(torch.float32, 17, 1, 1)
    assert not kernel_supports(torch.bfloat16, 257) and not kernel_supports(torch.float64, 4)


def test_custom_ops_pass_opcheck():
    x, matrices, masks, dx_a, dx = drawn((9, 14, (3, 2)), torch.float32)
    a, keys = torch.cat(matrices), masks.keys
    tests = ("test_schema", "test_faketensor")
    lists = ([3, 2], [*masks.slots], masks.p)
    check = lambda op, *args: torch.library.opcheck(op.default, args, test_utils=tests)
    check(OPS.masked_x_a, x, a, keys, *lists)
    check(OPS.masked_x_a_backward, x, dx_a, a, keys, *lists)
    for needs_a in (True, False):
        check(OPS.masked_x_a_backward_, dx, x, dx_a, a, keys, *lists, needs_a)


# ── in lora_linears ───────────────────────────────────────────────────────────────────────

LAYOUTS = {"all": (4, 3, 4), "one": (5,), "one frozen": (4, 0, 2), "init offset": (4, 2)}


def linears(layout, dtype=torch.float32, p=0.3, fused=True):
    """x, every A, the branches and masks.

    "init offset" is one branch with two A, of which the second has no mask.
    """
    ranks, unmasked = [r for r in LAYOUTS[layout] if r], (1,) if layout == "init offset" else ()
    x, matrices, masks, _, _ = drawn((10, 12, ranks), dtype, p, unmasked)
    gen = torch.Generator().manual_seed(1)
    new = lambda *s: torch.randn(*s, generator=gen, dtype=torch.float64).to(DEVICE, dtype)
    widths = [sum(ranks)] if layout == "init offset" else LAYOUTS[layout]
    branches = [Branch(new(20 + r, 12), None, new(20 + r, r) if r else None, 1.5) for r in widths]
    return x.view(2, 5, 12), matrices, branches, masks._replace(fused=fused)


def value_and_grads(fn, x, matrices, branches, masks, wanted="xab", only=None):
    """(x_a and ys, gradients of the wanted ones of x, A and B)."""
    leaf = lambda t, name: None if t is None else t.detach().requires_grad_(name in wanted)
    x, matrices = leaf(x, "x"), [leaf(m, "a") for m in matrices]
    branches = [b._replace(b=leaf(b.b, "b")) for b in branches]
    x_a, ys = fn(x, matrices, branches, masks)
    gen = torch.Generator().manual_seed(2)
    new = lambda y: torch.randn(y.shape, generator=gen, dtype=torch.float64).to(y)
    pairs = [(y, new(y)) for y in (x_a, *ys)]
    pairs = [pair for i, pair in enumerate(pairs) if only is None or i in only]
    outs, dys = zip(*(pair for pair in pairs if pair[0].requires_grad), strict=True)
    leaves = [x, *matrices, *(b.b for b in branches if b.b is not None)]
    leaves = [t for t in leaves if t.requires_grad]
    grads = torch.autograd.grad(outs, leaves, dys, allow_unused=True, materialize_grads=True)
    return [y.detach() for y in (x_a, *ys)], grads


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("wanted", ["xab", "ab", "xb", "x", "a"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_lora_linears_equal_their_reference(layout, wanted, fused):
    args = linears(layout, fused=fused)
    found = value_and_grads(lora_linears, *args, wanted)
    torch.testing.assert_close(found, value_and_grads(lora_linears_reference, *args, wanted))


@pytest.mark.parametrize("only", [(0,), (1,), (2,), (0, 3)])
def test_unused_outputs_contribute_no_gradient(only):
    args = linears("one frozen")
    found = value_and_grads(lora_linears, *args, only=only)
    torch.testing.assert_close(found, value_and_grads(lora_linears_reference, *args, only=only))


def test_without_kernels_each_a_multiplies_dropout_of_x():
    x, matrices, branches, masks = linears("one frozen", fused=False)
    x_a, ys = lora_linears(x, matrices, branches, masks)
    keys = [masks.keys[slot] for slot in masks.slots]
    each = zip(keys, matrices, strict=True)
    expected = [dropout(x, 0.3, *key_and_row(key)) @ a.t() for key, a in each]
    torch.testing.assert_close(x_a, torch.cat(expected, -1))
    for y, branch, each in zip(ys, branches, (expected[0], None, expected[1]), strict=True):
        base = x @ branch.weight.t()
        torch.testing.assert_close(y, base if each is None else base + 1.5 * each @ branch.b.t())


def test_no_masked_copy_is_saved_and_one_gradient_of_x_is_allocated():
    x, matrices, branches, masks = linears("all")
    kept, leaves = [], [x.requires_grad_(), *(m.requires_grad_() for m in matrices)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        _, ys = lora_linears(x, matrices, branches, masks)
    wide = [t for t in kept if t.numel() == x.numel()]
    assert {t.data_ptr() for t in wide} == {x.data_ptr()}
    made = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made.extend(t for t in tree_leaves(out) if t.shape == (10, 12))
            return out

    with Watch():
        torch.autograd.grad(ys, leaves, [torch.ones_like(y) for y in ys])
    assert len({t.data_ptr() for t in made} - {x.data_ptr()}) == 1


def test_unsupported_dtype_runs_the_reference():
    args = linears("all", torch.float64)
    found = value_and_grads(lora_linears, *args)
    torch.testing.assert_close(found, value_and_grads(lora_linears_reference, *args))


def test_second_derivative_equals_the_references():
    found = []
    for fn in (lora_linears, lora_linears_reference):
        x, matrices, branches, masks = linears("one frozen")
        leaves = [t.requires_grad_() for t in (x, *matrices)]
        x_a, ys = fn(x, matrices, branches, masks)
        value = sum(y.square().sum() for y in (x_a, *ys))
        grads = torch.autograd.grad(value, leaves, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in grads), leaves))
    assert relative_error(*found) < 1e-5


def test_torch_func_equals_the_reference():
    x, matrices, branches, masks = linears("all")

    def loss(x, keys, fn=lora_linears):
        x_a, ys = fn(x, matrices, branches, masks._replace(keys=keys))
        return x_a.square().sum() + sum(y.square().sum() for y in ys)

    keys = masks.keys
    expected = torch.func.grad(lambda x: loss(x, keys, lora_linears_reference))(x)
    torch.testing.assert_close(torch.func.grad(loss)(x, keys), expected)
    both = torch.stack([keys, keys + 1])
    each = torch.func.vmap(loss, in_dims=(None, 0))(x, both)
    for i in range(2):
        torch.testing.assert_close(each[i], loss(x, both[i]))


@pytest.mark.compile
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_gradient_equals_eager(layout, backend, fresh_dynamo):
    args = linears(layout)
    compiled = torch.compile(lora_linears, fullgraph=True, backend=backend)
    for wanted in ("xab", "ab", "xb"):
        found = value_and_grads(compiled, *args, wanted)
        torch.testing.assert_close(found, value_and_grads(lora_linears, *args, wanted))
    with torch.no_grad():
        torch.testing.assert_close(compiled(*args), lora_linears(*args))


# ── in the model ──────────────────────────────────────────────────────────────────────────

VARIANTS = {
    "all seven": dict(r=3),
    "q, v and up": dict(r=4, target_modules=["q_proj", "v_proj", "up_proj"]),
    "two ranks": dict(r=4, rank_pattern={"k_proj": 7, "down_proj": 2}),
    "biases": dict(r=3, modules_to_save=["norm"], bias="all"),
    "lora_bias": dict(r=3, lora_bias=True),
    "pissa": dict(r=3, init_lora_weights="pissa"),
}
IDS = token_ids(2, 9, vocab_size=96)
BATCH = {"input_ids": IDS.to(DEVICE), "labels": IDS.to(DEVICE)}


def gradients(model, **how):
    spec = model.with_spec(**how).spec
    base = fastlora.value_and_grad(FL.loss)
    return base(model.adapter, model.base, spec, BATCH, seed=5)


@pytest.fixture
def calls(monkeypatch):
    """The number of segments in each launch of the forward kernel.

    We patch the launcher and not the op, because recompute policies look up the op's overload.
    """
    made, fused = [], masked_lora_kernel.masked_x_a_fused

    def launch(x, a, keys, ranks, slots, p):
        made.append(len(ranks))
        return fused(x, a, keys, ranks, slots, p)

    monkeypatch.setattr(masked_lora_kernel, "masked_x_a_fused", launch)
    return made


@pytest.mark.parametrize("recompute", ["none", "selective", "full", "offload", 0.6, 0.3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_equal_those_without_the_kernels(variant, recompute, pair, calls):
    model = adapted(pair("llama_bias").model.to(DEVICE), lora_dropout=0.3, **VARIANTS[variant])
    plain = gradients(model, kernels="torch", recompute="none")
    assert not calls
    fused = gradients(model, kernels="triton", recompute=recompute)
    assert len(calls) >= 2
    # Relative to float64, the gradients with lora_bias err by 2e-5 (torch) and 8e-6 (kernels).
    assert abs(fused[0] - plain[0]) <= 1e-5 and relative_error(fused[1], plain[1]) <= 3e-5


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_every_policy_keeps_x_a(recompute, pair, monkeypatch):
    model = adapted(pair("llama2").model.to(DEVICE), r=3, lora_dropout=0.3)
    made, fused = [], masked_lora_kernel.masked_x_a_fused
    launch = lambda *args: made.append(args) or fused(*args)
    monkeypatch.setattr(masked_lora_kernel, "masked_x_a_fused", launch)
    gradients(model, kernels="triton", recompute=recompute)
    # A layer has four inputs: of q, k and v; of o; of gate and up; of down.
    assert len(made) == 4 * model.spec.config.num_hidden_layers


@pytest.mark.parametrize(
    "settings", [dict(use_dora=True), dict(r=40), dict(lora_dropout=0.0)], ids=str
)
def test_unsupported_settings_run_without_the_kernels(settings, pair, calls):
    """DoRA with dropout needs the masked x for its base product, so it cannot use the kernels."""
    settings = dict(r=3, lora_dropout=0.3, target_modules=["q_proj", "v_proj"]) | settings
    model = adapted(pair("llama2").model.to(DEVICE), **settings)
    fused, plain = gradients(model, kernels="triton"), gradients(model, kernels="torch")
    assert not calls
    assert relative_error(fused[1], plain[1]) <= 3e-5


@pytest.mark.compile
@pytest.mark.parametrize(
    "variant, recompute",
    [
        ("all seven", "none"),
        ("all seven", "selective"),
        ("all seven", "full"),
        # Each other policy takes two minutes in the interpreter. That recomputation gives the same
        # gradients over an initial offset is shown eagerly in models/test_init_offset.py.
        ("pissa", "none"),
    ],
)
def test_gradients_of_compiled_layers_equal_eager(variant, recompute, pair, region_backend):
    if recompute != "selective":  # Inductor's C++ takes as long as the interpreter
        region_backend("aot_eager")
    model = adapted(pair("llama_bias").model.to(DEVICE), lora_dropout=0.3, **VARIANTS[variant])
    eager = gradients(model, kernels="triton", recompute=recompute)
    compiled = gradients(model, kernels="triton", recompute=recompute, compile=True)
    assert abs(compiled[0] - eager[0]) <= 1e-5
    assert relative_error(compiled[1], eager[1]) <= 2e-4
