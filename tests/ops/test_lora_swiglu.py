"""lora_swiglu errs no more than plain torch, relative to float64; the same gradients in the model.

Without a GPU the kernels run in Triton's interpreter, in fp32 and fp16. bf16 needs a GPU.
"""

import pytest
import torch
from torch.utils._pytree import tree_leaves

import fastlora
from fastlora import functional as FL
from fastlora.ops.swiglu.swiglu import kernel_supports, lora_swiglu, lora_swiglu_reference
from oracles.pairs import adapted
from oracles.trees import relative_error, token_ids

pytest.importorskip("triton", reason="the kernel's tests need triton: requirements-test.txt has it")

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]
# (rows, width, ranks of gate, up, down). Sizes below, at and above a tile's; equal and unequal
# ranks, some above 16.
SHAPES = [
    (5, 7, 1, 2, 3),
    (64, 64, 16, 16, 16),
    (300, 130, 8, 8, 8),
    (70, 96, 20, 3, 40),
    (1, 64, 64, 64, 64),
]
SCALINGS = (0.7, 1.9)


def drawn(shape, dtype, gained=False):
    """(inputs, gradients of the two results).

    gate_x_a and up_x_a are slices of one tensor, as in a layer. The last input holds DoRA's gains
    in float32, or is None.
    """
    n, f, r_g, r_u, r_a = shape
    gen = torch.Generator().manual_seed(0)
    new = lambda *s: torch.randn(*s, generator=gen, dtype=torch.float64).to(DEVICE, dtype)
    x_as = new(n, r_g + r_u).split([r_g, r_u], dim=1)
    small = lambda *s: new(*s) * 0.3
    inputs = [new(n, f), new(n, f), *x_as, small(f, r_g), small(f, r_u), small(r_a, f)]
    inputs += [(1 + small(2, f)).float() if gained else None]
    return inputs, (new(n, f), new(n, r_a))


def run(fn, inputs, dh, dh_a, **how):
    """(results, gradients)."""
    leaves = leaves_of(inputs)
    results = fn(*leaves, *SCALINGS, **how)
    gradients = torch.autograd.grad(results, [x for x in leaves if x is not None], (dh, dh_a))
    return [x.detach() for x in results], gradients


def leaves_of(inputs):
    return [None if x is None else x.detach().requires_grad_() for x in inputs]


@pytest.mark.parametrize("gained", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_err_no_more_than_plain_torch(shape, dtype, gained):
    inputs, (dh, dh_a) = drawn(shape, dtype, gained)
    wide = [None if x is None else x.double() for x in inputs]
    exact = run(lora_swiglu_reference, wide, dh.double(), dh_a.double())
    plain = run(lora_swiglu_reference, inputs, dh, dh_a)
    fused = run(lora_swiglu, inputs, dh, dh_a)
    leaves = map(tree_leaves, (fused, plain, exact))
    for found, other, truth in zip(*leaves, strict=True):
        error = lambda x, truth=truth: (x.double() - truth).norm().item()
        assert found.dtype == other.dtype and found.shape == other.shape
        assert found.stride() == other.stride()  # torch's fused AdamW needs equal layouts
        slack = 4 * torch.finfo(dtype).eps * truth.norm().item()
        assert error(found) <= error(other) + slack


@pytest.mark.parametrize("gained", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_geglu_errs_no_more_than_plain_torch(dtype, gained):
    inputs, (dh, dh_a) = drawn((70, 96, 20, 3, 40), dtype, gained)
    wide = [None if x is None else x.double() for x in inputs]
    gelu = dict(gelu=True)
    exact = run(lora_swiglu_reference, wide, dh.double(), dh_a.double(), **gelu)
    plain, fused = (
        run(fn, inputs, dh, dh_a, **gelu) for fn in (lora_swiglu_reference, lora_swiglu)
    )
    for found, other, truth in zip(*map(tree_leaves, (fused, plain, exact)), strict=True):
        error = lambda x, truth=truth: (x.double() - truth).norm().item()
        assert found.dtype == other.dtype and found.shape == other.shape
        assert error(found) <= error(other) + 4 * torch.finfo(dtype).eps * truth.norm().item()
    silu = run(lora_swiglu, inputs, dh, dh_a)
    assert (silu[0][0] - fused[0][0]).abs().max() > 0.1


def test_without_a_of_the_down_projection_only_h_is_returned():
    inputs, (dh, _) = drawn((9, 40, 4, 4, 4), torch.float32)
    *rest, _, _ = inputs
    leaves = leaves_of(rest)
    h, h_a = lora_swiglu(*leaves, None, None, *SCALINGS)
    assert h_a is None
    found = torch.autograd.grad(h, leaves, dh)
    again = leaves_of(rest)
    wanted = torch.autograd.grad(lora_swiglu_reference(*again, None, None, *SCALINGS)[0], again, dh)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_gradients_are_right_if_one_result_is_unused():
    inputs, (dh, dh_a) = drawn((9, 40, 4, 4, 4), torch.float32, gained=True)
    for i, d in enumerate((dh, dh_a)):
        pairs = []
        for fn in (lora_swiglu, lora_swiglu_reference):
            leaves = leaves_of(inputs)
            result = fn(*leaves, *SCALINGS)[i]
            pairs.append(
                torch.autograd.grad(result, leaves, d, materialize_grads=True, allow_unused=True)
            )
        torch.testing.assert_close(*pairs, rtol=1e-4, atol=1e-4)


def test_equal_calls_give_equal_bits():
    inputs, (dh, dh_a) = drawn((300, 130, 8, 8, 8), torch.float32, gained=True)
    one, two = (tree_leaves(run(lora_swiglu, inputs, dh, dh_a)) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(one, two, strict=True))


def test_g_and_u_are_the_only_wide_tensors_saved():
    inputs, _ = drawn((30, 40, 4, 4, 4), torch.float32)
    leaves = leaves_of(inputs)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        lora_swiglu(*leaves, *SCALINGS)
    wide = [x for x in kept if x.shape == (30, 40)]
    assert {x.data_ptr() for x in wide} == {leaves[0].data_ptr(), leaves[1].data_ptr()}


def test_second_derivative_raises():
    inputs, (dh, dh_a) = drawn((5, 7, 1, 2, 3), torch.float32)
    leaves = leaves_of(inputs)
    with pytest.raises(RuntimeError, match=r"no second derivative.*torch\.func"):
        results = lora_swiglu(*leaves, *SCALINGS)
        torch.autograd.grad(results, leaves[:-1], (dh, dh_a), create_graph=True)


def test_kernel_supports_these_dtypes_and_ranks():
    assert kernel_supports(torch.bfloat16, 1, 16) and kernel_supports(torch.float32, 16)
    assert not kernel_supports(torch.bfloat16, 16, 17) and not kernel_supports(torch.float64, 4)


# ── in the model ──────────────────────────────────────────────────────────────────────────

VARIANTS = {
    "all seven": dict(r=3),
    "gate and up": dict(r=4, target_modules=["gate_proj", "up_proj"]),
    "two ranks": dict(
        r=4, rank_pattern={"up_proj": 7, "down_proj": 2}, alpha_pattern={"gate_proj": 3}
    ),
    "dropout": dict(r=3, lora_dropout=0.3),
    "biases": dict(r=3, modules_to_save=["norm"], bias="all"),
    "pissa": dict(r=3, init_lora_weights="pissa"),
    "dora": dict(r=3, use_dora=True),
    "dora, gate and up": dict(r=3, use_dora=True, target_modules=["gate_proj", "up_proj"]),
}
IDS = token_ids(2, 9, vocab_size=96)
BATCH = {"input_ids": IDS, "labels": IDS}


def gradients(model, **how):
    spec = model.with_spec(**how).spec
    base = fastlora.value_and_grad(FL.loss)
    return base(model.adapter, model.base, spec, BATCH, seed=5)


def watched(monkeypatch):
    calls = []
    original = lora_swiglu

    def call(*args, **how):
        calls.append(args[0].shape)
        return original(*args, **how)

    monkeypatch.setattr("fastlora.models.mlp.lora_swiglu", call)
    return calls


@pytest.mark.parametrize("recompute", ["none", "selective", "full", 0.4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_equal_those_without_the_kernel(variant, recompute, pair, monkeypatch):
    family = "llama2" if "dora" in variant else "llama_bias"  # DoRA with a bias has no kernel
    model = adapted(pair(family).model.to(DEVICE), **VARIANTS[variant])
    calls = watched(monkeypatch)
    plain = gradients(model, kernels="torch", recompute="none")
    assert not calls
    fused = gradients(model, kernels="triton", recompute=recompute)
    assert len(calls) >= 2
    assert abs(fused[0] - plain[0]) <= 1e-5 and relative_error(fused[1], plain[1]) <= 2e-4


def test_gradients_of_geglu_equal_those_without_the_kernel(pair, monkeypatch):
    model = adapted(pair("gemma3").model.to(DEVICE), r=3)
    calls = watched(monkeypatch)
    plain = gradients(model, kernels="torch", recompute="none")
    assert not calls
    fused = gradients(model, kernels="triton", recompute="full")
    assert len(calls) >= 2
    assert abs(fused[0] - plain[0]) <= 1e-5 and relative_error(fused[1], plain[1]) <= 2e-4


@pytest.mark.parametrize(
    "settings",
    [
        dict(r=3, use_dora=True),  # the base has biases
        dict(r=3, lora_bias=True),
        dict(r=3, target_modules=["gate_proj", "down_proj"]),
        dict(r=17),
        dict(r=9, init_lora_weights="pissa"),
        dict(r=3, qat_scheme="fp8-fp8"),
    ],
    ids=str,
)
def test_unsupported_settings_run_without_the_kernel(settings, pair, monkeypatch):
    model = adapted(pair("llama_bias").model.to(DEVICE), **settings)
    calls = watched(monkeypatch)
    fused, plain = gradients(model, kernels="triton"), gradients(model, kernels="torch")
    assert not calls
    assert relative_error(fused[1], plain[1]) <= 2e-4


def test_dora_with_dropout_runs_without_the_kernel(pair, monkeypatch):
    """DoRA with dropout multiplies the base with both x and the masked x."""
    model = adapted(pair("llama2").model.to(DEVICE), r=3, use_dora=True, lora_dropout=0.3)
    calls = watched(monkeypatch)
    fused, plain = gradients(model, kernels="triton"), gradients(model, kernels="torch")
    assert not calls and relative_error(fused[1], plain[1]) <= 2e-4


@pytest.mark.compile
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize(("family", "variant"), [("llama_bias", "all seven"), ("llama2", "dora")])
def test_gradients_of_compiled_layers_equal_eager(family, variant, recompute, pair, region_backend):
    if recompute != "selective":  # Inductor's C++ takes most of the time
        region_backend("aot_eager")
    model = adapted(pair(family).model.to(DEVICE), **VARIANTS[variant])
    eager = gradients(model, kernels="triton", recompute=recompute)
    compiled = gradients(model, kernels="triton", recompute=recompute, compile=True)
    assert abs(compiled[0] - eager[0]) <= 1e-5
    assert relative_error(compiled[1], eager[1]) <= 2e-4
