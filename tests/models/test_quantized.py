"""Forward and backward over a base in 4 or 8 bits.

Oracles: the same model with the dequantised weights held dense, and PEFT over bitsandbytes.
"""

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import fastlora
from fastlora import functional as FL
from fastlora.model import Model
from fastlora.ops.linear import frozen, lora
from fastlora.ops.quant.dequantize import dense
from oracles.pairs import adapted
from oracles.quantized_bases import (
    BATCH,
    FAMILY,
    IDS,
    SETTINGS,
    _module,
    dense_twin,
    load,
    oracle,
    weights,
)
from oracles.trees import randomised, relative_error

pytestmark = pytest.mark.usefixtures("right_bitsandbytes")


def exact_gradients(model: Model) -> Any:
    """The adapter's gradients over the dequantised weights, in float64."""
    twin = dense_twin(model)
    wide = lambda tree: tree_map(lambda x: x.double() if x.is_floating_point() else x, tree)
    args = wide(twin.adapter), wide(twin.base), twin.spec, BATCH
    return fastlora.value_and_grad(FL.loss)(*args)[1]


@pytest.mark.parametrize("policy", ["none", "selective", "full", "offload", 0.4])
@pytest.mark.parametrize("settings", SETTINGS)
def test_loss_and_gradients_equal_those_over_dequantised_weights(settings, policy, dense_folder):
    if settings != "plain" and policy not in ("none", "full"):
        return
    model = adapted(load(dense_folder(), load_in_4bit=True), r=4, **SETTINGS[settings])
    model = model.with_spec(recompute=policy)
    twin = dense_twin(model)
    run = lambda m: fastlora.value_and_grad(FL.loss)(m.adapter, m.base, m.spec, BATCH, seed=3)
    (value, grads), (other, wanted) = run(model), run(twin)
    torch.testing.assert_close(value, other, rtol=1e-6, atol=1e-6)
    assert relative_error(grads, wanted) <= 1e-5


@pytest.mark.parametrize("kind", ["fp4", "int8"])
def test_fp4_and_int8_bases_train_too(kind, quantised_folder):
    model = adapted(load(quantised_folder(kind)), r=4)
    run = lambda m: fastlora.value_and_grad(FL.loss)(m.adapter, m.base, m.spec, BATCH)
    (value, grads), (other, wanted) = run(model), run(dense_twin(model))
    torch.testing.assert_close(value, other, rtol=1e-6, atol=1e-6)
    assert relative_error(grads, wanted) <= 1e-5


def test_gradients_are_pefts_over_bitsandbytes(dense_folder, tmp_path):
    model = adapted(load(dense_folder(), load_in_4bit=True), r=4)
    model.save_pretrained(tmp_path)
    base = oracle(dense_folder(), "nf4 nested", torch.float32)
    theirs = PeftModel.from_pretrained(base, str(tmp_path), is_trainable=True).train()
    loss = theirs(input_ids=IDS, labels=IDS).loss
    loss.backward()
    value, grads = fastlora.value_and_grad(FL.loss)(model.adapter, model.base, model.spec, BATCH)
    torch.testing.assert_close(value, loss.detach(), rtol=1e-5, atol=1e-5)
    exact = exact_gradients(model)
    for i, layer in enumerate(grads["layers"]):
        for name, (a, b) in layer.items():
            own = next(
                m for n, m in theirs.named_modules() if n.endswith(f"layers.{i}.{_module(name)}")
            )
            truth = exact["layers"][i][name]
            pairs = ((a, own.lora_A, truth.a), (b, own.lora_B, truth.b))
            for ours, linears, true in pairs:
                grad = linears["default"].weight.grad
                # On some CPUs PEFT's own gradients are 2e-5 from those in float64.
                room = 1e-5 * max(1.0, true.abs().max()) + (grad - true).abs().max()
                assert (ours - grad).abs().max() <= room


def test_in_bf16_errors_are_at_most_those_of_the_dense_model(dense_folder):
    """The same weights three times: in 4 bits, dense in bfloat16, and dense in float32."""
    model = adapted(load(dense_folder(FAMILY, torch.bfloat16), load_in_4bit=True), r=4)
    twin = dense_twin(model)
    exact = replace(twin, base=tree_map(lambda x: x.float(), twin.base))
    exact = replace(
        exact, spec=replace(exact.spec, config=replace(exact.spec.config, dtype="float32"))
    )
    run = lambda m: fastlora.value_and_grad(FL.loss)(m.adapter, m.base, m.spec, BATCH)[1]
    ours, plain, truth = (tree_leaves(run(m)) for m in (model, twin, exact))
    error = lambda found: sum((f - t).square().sum() for f, t in zip(found, truth, strict=True))
    assert error(ours) <= 1.5**2 * error(plain)


@pytest.mark.parametrize("policy", ["none", "selective", "full", 0.4])
def test_no_dequantised_weight_is_saved_for_the_backward_pass(policy, dense_folder):
    model = adapted(load(dense_folder(), load_in_4bit=True), r=4).with_spec(recompute=policy)
    shapes = {tuple(w.form.shape[:2]) for w in weights(model).values()}
    shapes -= {tuple(x.shape) for x in tree_leaves(model.adapter)}
    assert _saved(model, shapes) == 0
    if policy == "none":  # the test can fail
        assert _saved(dense_twin(model), shapes) > 0


def _saved(model: Model, shapes: set[tuple[int, ...]]) -> int:
    """The number of matrices of these shapes, or transposed, that autograd saves."""
    found = 0

    def pack(x: Tensor) -> Tensor:
        nonlocal found
        size = tuple(x.shape)
        found += x.is_floating_point() and bool({size, size[::-1]} & shapes)
        return x

    adapter = tree_map(lambda x: x.detach().requires_grad_(), model.adapter)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        FL.loss(adapter, model.base, model.spec, BATCH)
    return found


@pytest.fixture
def most_alive(monkeypatch) -> Callable[[], int]:
    """most_alive(): the largest number of dequantised matrices that existed at once so far."""
    alive: list[Any] = []
    most = 0

    def watched(weight: Any, dtype: torch.dtype) -> Tensor:
        nonlocal most
        out = dense(weight, dtype)
        alive.append(weakref.ref(out))
        most = max(most, sum(ref() is not None for ref in alive))
        return out

    for module in (frozen, lora):
        monkeypatch.setattr(module, "dense", watched)
    return lambda: most if alive else -1


@pytest.mark.parametrize("policy", ["none", "selective", "full", "offload", 0.4])
def test_a_dequantised_weight_exists_for_one_product_only(policy, dense_folder, most_alive):
    model = adapted(load(dense_folder(), load_in_4bit=True), r=4).with_spec(recompute=policy)
    fastlora.value_and_grad(FL.loss)(model.adapter, model.base, model.spec, BATCH)
    assert most_alive() == 1
    kept = [frozen.dense(w, torch.float32) for w in weights(model).values()]
    assert most_alive() == len(kept)  # the test can fail


@pytest.mark.compile
@pytest.mark.parametrize("policy", ["none", "full"])
def test_compiled_it_exists_for_one_product_only(policy, dense_folder, most_alive, region_backend):
    region_backend("aot_eager")
    model = adapted(load(dense_folder(), load_in_4bit=True), r=4)
    spec = model.with_spec(recompute=policy, compile=True).spec
    fastlora.value_and_grad(FL.loss)(model.adapter, model.base, spec, BATCH)
    assert most_alive() == 1


def test_torch_func_transforms_work_over_a_quantised_base(dense_folder):
    model = adapted(
        load(dense_folder(), load_in_4bit=True), r=2, target_modules=["q_proj", "down_proj"]
    )
    twin = dense_twin(model)
    loss = lambda m: (
        lambda adapter, ids: FL.loss(adapter, m.base, m.spec, {"input_ids": ids, "labels": ids})
    )
    both = lambda f: (f(model), f(twin))
    grads = both(lambda m: torch.func.grad(loss(m))(m.adapter, IDS))
    assert relative_error(*grads) <= 1e-5
    _, fast = fastlora.value_and_grad(loss(model))(model.adapter, IDS)
    # On some CPUs either way of summing is itself 1e-5 from the gradients in float64.
    room = 1e-5 + relative_error(grads[0], exact_gradients(model))
    assert relative_error(fast, grads[0]) <= room
    per_example = both(
        lambda m: torch.vmap(torch.func.grad(loss(m)), in_dims=(None, 0))(m.adapter, IDS[:, None])
    )
    assert relative_error(*per_example) <= 1e-5
    stack = tree_map(lambda x: torch.stack([x, 2 * x]), model.adapter)
    mapped = both(lambda m: torch.vmap(loss(m), in_dims=(0, None))(stack, IDS))
    torch.testing.assert_close(*mapped)
    tangent = randomised(model.adapter, 5)
    products = both(
        lambda m: torch.func.jvp(
            lambda a: torch.func.grad(loss(m))(a, IDS), (m.adapter,), (tangent,)
        )[1]
    )
    assert relative_error(*products) <= 1e-4


def test_adapter_ids_and_generation_equal_the_dense_models(dense_folder):
    model = adapted(load(dense_folder(), load_in_4bit=True), r=2)
    twin = dense_twin(model)
    stack = tree_map(lambda x: torch.stack([x, 2 * x]), model.adapter)
    run = lambda m: FL.forward(stack, m.base, m.spec, IDS, adapter_ids=torch.tensor([1, 0]))
    torch.testing.assert_close(run(model), run(twin), rtol=1e-5, atol=1e-5)
    ids = [m.generate(IDS[:, :4], max_new_tokens=6, eos_token_id=()) for m in (model, twin)]
    assert torch.equal(*ids)


@pytest.mark.compile
@pytest.mark.parametrize("policy", ["none", "selective", "full", 0.4])
def test_compiled_gradients_equal_eager_and_no_weight_is_kept(policy, dense_folder, region_backend):
    region_backend("aot_eager")
    model = adapted(load(dense_folder(), load_in_4bit=True), r=4).with_spec(recompute=policy)
    run = lambda m: fastlora.value_and_grad(FL.loss)(m.adapter, m.base, m.spec, BATCH)
    eager = run(model.with_spec(compile=False))
    compiled = run(model.with_spec(compile=True))  # fullgraph=True
    torch.testing.assert_close(compiled[0], eager[0], rtol=1e-6, atol=1e-6)
    assert relative_error(compiled[1], eager[1]) <= 1e-5
    shapes = {tuple(w.form.shape[:2]) for w in weights(model).values()}
    shapes -= {tuple(x.shape) for x in tree_leaves(model.adapter)}
    assert _saved(model.with_spec(compile=True), shapes) == 0


@pytest.mark.compile
def test_inductor_gives_the_eager_gradient(dense_folder, fresh_dynamo):
    model = adapted(load(dense_folder(), load_in_4bit=True), r=4)
    run = lambda m: fastlora.value_and_grad(FL.loss)(m.adapter, m.base, m.spec, BATCH)
    eager, compiled = run(model), run(model.with_spec(compile=True))
    assert relative_error(compiled[1], eager[1]) <= 1e-5


@pytest.mark.compile
def test_the_callers_own_torch_compile_works(dense_folder, fresh_dynamo):
    model = adapted(
        load(dense_folder(), load_in_4bit=True), r=2, target_modules=["q_proj", "down_proj"]
    )
    loss = lambda adapter: FL.loss(adapter, model.base, model.spec, BATCH)
    compiled = torch.compile(torch.func.grad(loss), backend="aot_eager", fullgraph=True)
    assert relative_error(compiled(model.adapter), torch.func.grad(loss)(model.adapter)) <= 1e-5
