"""Models over a base in e4m3 on the CPU, where the rounded values are multiplied in x's dtype.

Oracle: torch.func, which runs the references. They round what the ops round forward, and leave
gradients unrounded (ops/linear/frozen.py).
"""

import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._pytree import tree_leaves, tree_map

import fastlora
from fastlora import functional as FL
from fastlora.errors import CheckpointError
from fastlora.model import Model
from fastlora.models import attention
from fastlora.models.params import is_quantized
from fastlora.ops.quant.e4m3 import quantize_matrix
from fastlora.ops.quant.weights import WeightFP8
from oracles.pairs import adapted
from oracles.quantized_bases import BATCH, IDS, SETTINGS, dense_twin, load, weights
from oracles.trees import relative_error, same_bits


@pytest.fixture(scope="module")
def fp8(dense_folder):
    """fp8(**settings): a model over a base in e4m3, with an adapter that is not zero."""
    base = load(dense_folder(), base_precision="fp8")
    return lambda **settings: adapted(base, **{"r": 4} | settings)


def value_and_gradient(model: Model, seed: int | None = None) -> tuple[torch.Tensor, Any]:
    args = model.adapter, model.base, model.spec, BATCH
    return fastlora.value_and_grad(FL.loss)(*args, seed=seed)


def by_references(model: Model, seed: int | None = None) -> tuple[torch.Tensor, Any]:
    loss = lambda adapter: FL.loss(adapter, model.base, model.spec, BATCH, seed=seed)
    gradient, value = torch.func.grad_and_value(loss)(model.adapter)
    return value, gradient


# ── loading ───────────────────────────────────────────────────────────────────────────────
def test_projections_are_quantised_and_nothing_else_changes(dense_folder):
    plain, model = load(dense_folder()), load(dense_folder(), base_precision="fp8")
    assert is_quantized(model.base) and not is_quantized(plain.base)
    pairs = weights(model), weights(plain)
    for name, weight in pairs[0].items():
        assert isinstance(weight, WeightFP8)
        assert same_bits(weight, quantize_matrix(pairs[1][name]))
    for key in ("embed_tokens", "norm", "lm_head"):
        assert same_bits(model.base.get(key), plain.base.get(key))
    assert model.num_parameters() == plain.num_parameters()
    assert model.spec == plain.spec


def test_the_base_takes_a_byte_for_a_weight(dense_folder):
    model = load(dense_folder(dtype=torch.bfloat16), base_precision="fp8")
    for weight in weights(model).values():
        elements, rows = weight.values.numel(), len(weight.scale)
        assert sum(x.nbytes for x in weight) == elements + 4 * rows
    assert model.base["norm"].dtype == torch.bfloat16


@pytest.mark.parametrize("shard", ["host"])
def test_a_base_in_host_memory_gives_the_same_bits(shard, dense_folder, fp8):
    wanted = fp8()
    base = load(dense_folder(), base_precision="fp8", shard=shard)
    model = adapted(base, r=4)
    assert same_bits(value_and_gradient(model), value_and_gradient(wanted))


# ── gradients ─────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("settings", SETTINGS)
def test_losses_are_the_references_and_gradients_differ_by_rounding(settings, fp8):
    model = fp8(**SETTINGS[settings])
    (value, found), (other, wanted) = value_and_gradient(model, 3), by_references(model, 3)
    torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-5)
    error = relative_error(found, wanted)
    assert 1e-4 < error < 0.15, error
    plain = value_and_gradient(dense_twin(model), 3)  # x is rounded, so the loss is another one
    assert 1e-6 < abs(plain[0] - value) / value < 0.02


@pytest.mark.parametrize("policy", ["selective", "full", "offload", 0.4])
def test_recomputation_changes_no_bit(policy, fp8):
    model = fp8(lora_dropout=0.2)
    wanted = value_and_gradient(model.with_spec(recompute="none"), 5)
    assert same_bits(value_and_gradient(model.with_spec(recompute=policy), 5), wanted)


def test_attentions_and_swiglus_kernels_give_the_same_gradients(dense_folder, monkeypatch):
    """Attention's kernel returns dq, dk and dv in one tensor, which is rounded as three are."""
    pytest.importorskip("triton")
    for name in ("kernel_supports", "kernel_is_faster"):  # of heads of 8, in the interpreter
        monkeypatch.setattr(f"fastlora.models.attention.flash.{name}", lambda *_: True)
    monkeypatch.setattr("fastlora.models.decoder.kernel_supports", lambda *_: True)
    model = adapted(load(dense_folder("llama2"), base_precision="fp8"), r=4)
    joint, real = [], attention.joint_lora_linears
    count = lambda *args, **how: joint.append(args) or real(*args, **how)
    monkeypatch.setattr(attention, "joint_lora_linears", count)
    wanted = value_and_gradient(model.with_spec(kernels="torch"))
    found = value_and_gradient(model.with_spec(kernels="triton", recompute="none"))
    assert len(joint) == model.spec.config.num_hidden_layers
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-4, atol=1e-4)
    assert relative_error(found[1], wanted[1]) < 2e-2


@pytest.mark.compile
@pytest.mark.parametrize("policy", ["none", "selective", "full"])
def test_compiled_gradients_equal_eager(policy, fp8, region_backend):
    region_backend("aot_eager")
    model = fp8().with_spec(recompute=policy)
    eager = value_and_gradient(model.with_spec(compile=False))
    compiled = value_and_gradient(model.with_spec(compile=True))  # fullgraph=True
    torch.testing.assert_close(compiled[0], eager[0], rtol=1e-5, atol=1e-5)
    assert relative_error(compiled[1], eager[1]) <= 1e-2  # a changed bit may round the other way


def test_no_rounded_or_dequantised_tensor_is_kept_for_the_backward_pass(fp8):
    model, kept = fp8(), []
    adapter = tree_map(lambda x: x.detach().requires_grad_(), model.adapter)
    pack = lambda x: kept.append(x) or x
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        FL.loss(adapter, model.base, model.with_spec(recompute="none").spec, BATCH)
    shapes = {tuple(w.values.shape) for w in weights(model).values()}
    shapes -= {tuple(x.shape) for x in tree_leaves(adapter)}
    own = {x.data_ptr() for x in tree_leaves(model.base)}
    assert kept and not any(x.dtype == torch.float8_e4m3fn for x in kept)
    assert not [x for x in kept if tuple(x.shape) in shapes and x.data_ptr() not in own]


# ── stacks, examples, generation ──────────────────────────────────────────────────────────
def test_stacked_adapters_and_examples_have_the_single_models_values(fp8):
    model = fp8()
    other = tree_map(lambda x: 2 * x, model.adapter)
    stack, spec = FL.stack([model, model.with_adapter(other)])
    with torch.no_grad():
        found = FL.forward(stack, model.base, spec, IDS, adapter_ids=torch.tensor([1, 0]))
        torch.testing.assert_close(found[1], model(IDS)[1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            found[0], model.with_adapter(other)(IDS)[0], rtol=1e-4, atol=1e-4
        )
    each = lambda adapter: FL.row_losses(adapter, model.base, model.spec, BATCH)[0]
    losses, gradients = fastlora.value_and_grad(each, per_example=True)(model.adapter)
    total = lambda adapter: each(adapter).sum()
    value, gradient = fastlora.value_and_grad(total)(model.adapter)
    torch.testing.assert_close(losses.sum(), value, rtol=1e-5, atol=1e-5)
    assert relative_error(tree_map(lambda x: x.sum(0), gradients), gradient) < 0.03


def test_generated_tokens_are_the_forward_passes_best(fp8):
    model = fp8()
    ids = model.generate(IDS[:, :4], max_new_tokens=5, eos_token_id=())
    with torch.no_grad():
        assert torch.equal(ids[:, 4:], model(ids)[:, 3:-1].argmax(-1))


# ── files ─────────────────────────────────────────────────────────────────────────────────
def test_adapters_are_loaded_over_the_same_base(fp8, tmp_path):
    model = fp8()
    model.save_pretrained(tmp_path)
    again = load(tmp_path, base_precision="fp8")
    assert same_bits(again.base, model.base) and same_bits(again.adapter, model.adapter)
    plain = load(tmp_path)
    assert not is_quantized(plain.base) and same_bits(plain.adapter, model.adapter)


def test_merging_adds_the_adapter_to_the_dequantised_matrices(fp8):
    model = fp8(use_dora=True)
    merged, wanted = fastlora.merge(model), fastlora.merge(dense_twin(model))
    assert same_bits(merged.base, wanted.base) and fastlora.quantize(model) is model


@pytest.mark.parametrize("base", ["original", "dequantized"])
def test_merged_folders_hold_the_original_or_the_rounded_matrices(
    base, fp8, dense_folder, tmp_path
):
    model = fp8()
    report = model.save_pretrained_merged(tmp_path / "out", None, base=base)
    assert report is not None and report.base == base
    twin = dense_twin(model)
    if base == "original":
        twin = replace(twin, base=load(dense_folder()).base)
    wanted = tree_map(lambda x: x.bfloat16(), fastlora.merge(twin).base)  # files are in 16 bits
    assert same_bits(load(tmp_path / "out").base, wanted)


# ── refusals ──────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(base_precision="int8"), "base_precision='int8': expected 'checkpoint' or 'fp8'"),
        (dict(base_precision="fp8", load_in_4bit=True), "choose one of them"),
    ],
)
def test_impossible_arguments_are_refused(given, message, dense_folder):
    with pytest.raises(ValueError, match=message):
        load(dense_folder(), **given)


@pytest.mark.parametrize("shard", [None, "host"])
def test_mixtures_and_quantised_checkpoints_are_refused_before_weights_are_read(
    shard, dense_folder, quantised_folder, monkeypatch
):
    fail = lambda *args, **kwargs: pytest.fail("weights were read")
    monkeypatch.setattr("fastlora.checkpoints.reading.entry_tensors", fail)
    for folder, message in (
        (dense_folder("qwen3_moe"), "qwen3_moe is a mixture of experts"),
        (quantised_folder("int8"), r"projections \(model\.layers\.0.*8 bits already"),
    ):
        with pytest.raises(ValueError, match=message):
            load(folder, base_precision="fp8", shard=shard)


def test_matrices_with_nan_are_named(dense_folder, tmp_path):
    shutil.copytree(dense_folder(), tmp_path / "bad")
    tensors = load_file(tmp_path / "bad" / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 4] = torch.nan
    save_file(tensors, tmp_path / "bad" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{name} holds NaN"):
        load(tmp_path / "bad", base_precision="fp8")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(qat_scheme="int8"), "qat_scheme='int8': this base is already quantised"),
        (dict(modules_to_save=["up_proj"], target_modules=["q_proj"]), "up_proj.* is quantised"),
        (
            dict(init_lora_weights="loftq", loftq_config={"loftq_bits": 4, "loftq_iter": 2}),
            "would quantise the base again",
        ),
    ],
)
def test_settings_that_need_a_base_in_16_bits_are_refused(settings, message, dense_folder):
    base = load(dense_folder(), base_precision="fp8")
    with pytest.raises(ValueError, match=message):
        fastlora.lora(base, r=2, **settings)


def test_loftq_fits_the_rounding_error(dense_folder):
    base, plain = load(dense_folder(), base_precision="fp8"), load(dense_folder())
    model = fastlora.lora(base, r=8, init_lora_weights="loftq")
    errors = [
        sum(float((x - y).square().sum()) for x, y in zip(*pair, strict=True))
        for of in (fastlora.merge(model), dense_twin(base))
        for pair in [[[*weights(m).values()] for m in (of, plain)]]
    ]
    assert errors[0] < 0.7 * errors[1]
