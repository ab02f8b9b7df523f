"""lora(qat_scheme=...): whole models against torchao's fake quantised transformers model."""

import sys
from dataclasses import replace

import pytest
import quantize
import torch
from torch.utils._pytree import tree_leaves, tree_map
from transformers import AutoModelForCausalLM

import fastlora
from fastlora import functional as FL
from fastlora.models.layer_spec import layer_spec
from fastlora.models.projections import project
from fastlora.ops.quant.fake_quantize import SCHEMES
from oracles.pairs import read_pair
from oracles.qat import IDS, WIDE, torchao_difference, trained, transformers_with
from oracles.torchao_side import CONFIGS, INT8, prepared_linear, quantize_
from oracles.trees import relative_error, same_bits

BATCH = {"input_ids": IDS, "labels": IDS}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Llama with biases, widths that groups of 128 divide; two of seven projections unadapted."""
    return read_pair("llama_bias", tmp_path_factory.mktemp("wide"), **WIDE).model


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return read_pair("llama3.2", tmp_path_factory.mktemp("tied"), **WIDE).model


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("which", ["wide", "tied"])
def test_logits_are_those_of_the_merged_model_under_torchao(which, scheme, request):
    """One flipped rounding between the two implementations may move a logit by a step: the law is
    the mean, and the distance to the unquantised model shows that it says something."""
    assert torchao_difference(request.getfixturevalue(which), scheme) < 1e-3


@pytest.mark.parametrize("variant", [{}, {"use_dora": True}, {"lora_bias": True}])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_projection_is_torchaos_linear_on_the_merge(scheme, variant, wide):
    model = trained(wide, scheme, **variant)
    merged, spec = fastlora.merge(model), layer_spec(model.spec, 0)
    for name in ("q_proj", "v_proj", "down_proj"):  # v_proj is not adapted
        linear = merged.base["layers"][0][name]
        x = torch.randn(2, 5, linear["weight"].shape[1], generator=torch.Generator().manual_seed(1))
        base, adapter = model.base["layers"][0], model.adapter["layers"][0]
        (y,) = project(x, (name,), base, adapter, spec, None)
        assert same_bits(y, prepared_linear(linear["weight"], linear["bias"], scheme)(x))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("variant", [{}, {"use_dora": True}, {"lora_bias": True}])
def test_gradients_are_the_same_to_the_bit_under_every_policy(variant, scheme, wide):
    model = trained(wide, scheme, **variant)
    loss = lambda adapter, spec: FL.loss(adapter, model.base, spec, BATCH)
    results = []
    for policy in ("none", "selective", "full", 0.3):
        spec = replace(model.spec, recompute=policy)
        results.append(fastlora.value_and_grad(loss)(model.adapter, spec))
    assert all(same_bits(r, results[0]) for r in results)
    plain = torch.func.grad(lambda adapter: loss(adapter, model.spec))(model.adapter)
    # Where a rounding sum moves one value over a step, gradients move a little.
    assert relative_error(results[0][1], plain) < 0.05


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
def test_no_policy_keeps_a_tensor_of_the_weights_size(policy, wide):
    model = trained(wide, "fp8-int4", recompute=policy)
    smallest = 64 * 128  # k_proj
    given = {t.untyped_storage().data_ptr() for t in tree_leaves(model.base)}
    kept, adapter = [], tree_map(lambda t: t.detach().requires_grad_(), model.adapter)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        FL.loss(adapter, model.base, model.spec, {"input_ids": IDS[:1], "labels": IDS[:1]})
    new = [t for t in kept if t.untyped_storage().data_ptr() not in given]
    assert new and max(t.numel() for t in new) < smallest


@pytest.mark.compile
@pytest.mark.parametrize("scheme", SCHEMES)
def test_compiled_layers_give_eager_gradients(scheme, wide, fresh_dynamo):
    """The projections are equal to the bit; norms and SwiGLU round elsewhere, which may move an
    input over a step. Weight-only schemes have no such steps: 2e-5 on one Xeon with AMX,
    below 1e-5 on the CPUs before it."""
    model = trained(wide, scheme)
    loss = lambda adapter, spec: FL.loss(adapter, model.base, spec, BATCH)
    eager = fastlora.value_and_grad(loss)(model.adapter, model.spec)
    spec = replace(model.spec, compile=True)
    compiled = fastlora.value_and_grad(loss)(model.adapter, spec)
    allowed = 5e-5 if SCHEMES[scheme].activation is None else 0.05
    assert relative_error(compiled, eager) < allowed


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_step_lowers_the_quantised_loss(scheme, wide):
    model = fastlora.lora(wide, r=4, qat_scheme=scheme)
    loss = lambda adapter: FL.loss(adapter, model.base, model.spec, BATCH)
    value, grads = fastlora.value_and_grad(loss)(model.adapter)
    norm = sum(g.square().sum() for g in tree_leaves(grads)).sqrt()
    stepped = tree_map(lambda p, g: p - 0.5 * g / norm, model.adapter, grads)
    assert loss(stepped) < value - 0.01


@pytest.mark.parametrize("scheme", SCHEMES)
def test_generate_decodes_the_quantised_model(scheme, wide):
    """Token by token against the cache: each next token is the quantised forward's choice."""
    model = trained(wide, scheme)
    ids = model.generate(IDS[:1], max_new_tokens=4)
    for t in range(IDS.shape[1], ids.shape[1]):
        logits = model(ids[:, :t])[0, -1]
        assert logits[ids[0, t]] > logits.max() - 0.02 * logits.abs().max()


def test_disabled_and_merged_models_are_not_quantised(wide):
    model = trained(wide, "int4")
    assert same_bits(fastlora.disable(model)(IDS), wide(IDS))
    lora = replace(model.spec.lora, qat_scheme=None)
    plain = replace(model, spec=replace(model.spec, lora=lora))
    torch.testing.assert_close(fastlora.merge(model)(IDS), plain(IDS), rtol=1e-4, atol=1e-4)
    assert relative_error(model(IDS), plain(IDS)) > 1e-2


def test_the_folder_is_a_plain_adapter(wide, tmp_path):
    model = trained(wide, "int8")
    model.save_pretrained(tmp_path / "a")
    assert "qat" not in (tmp_path / "a" / "adapter_config.json").read_text()
    loaded = fastlora.load_adapter(wide, tmp_path / "a")
    assert same_bits(loaded.adapter, model.adapter) and loaded.spec.qat_scheme is None


# ── the conversion at the end ─────────────────────────────────────────────────────────────


@pytest.mark.parametrize("scheme", ["int8", "int8-int4"])  # the others need a GPU's kernels
def test_conversion_by_torchao_gives_the_trained_model(scheme, wide):
    """quantize_ with real integers on the merged model, against the fake quantised forward."""
    model = trained(wide, scheme)
    oracle = transformers_with(fastlora.merge(model))
    if scheme == "int8-int4":
        quantize_(oracle, INT8, filter_fn=lambda m, _: isinstance(m, torch.nn.Embedding))
    quantize_(oracle, CONFIGS[scheme])
    with torch.no_grad():
        expected = oracle(IDS).logits
    error = (model(IDS) - expected).abs().mean() / expected.abs().mean()
    assert error < 2e-3


@pytest.mark.parametrize("scheme", ["int8", "int8-int4"])
@pytest.mark.parametrize("family", ["llama_bias", "llama3.2"])
def test_the_folder_of_the_script_computes_the_trained_model(family, scheme, tmp_path):
    """bfloat16, tied and untied: adapter, merged folder, integers on disk, read by transformers."""
    base = read_pair(family, tmp_path / "base", torch.bfloat16, **WIDE).model
    model = trained(base, scheme)
    model.save_pretrained_merged(tmp_path / "merged")
    (tmp_path / "merged" / "tokenizer.json").write_text("{}")
    quantize.quantise(tmp_path / "merged", tmp_path / "out", scheme, "cpu")
    assert (tmp_path / "out" / "tokenizer.json").exists()
    quantised = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert type(quantised.lm_head.weight).__name__ == "IntxUnpackedToInt8Tensor"
    with torch.no_grad():
        assert same_bits(model(IDS), quantised(IDS).logits)


@pytest.fixture
def merged(tmp_path):
    """A folder in 16 bits that scripts/quantize.py takes."""
    model = read_pair("llama3.2", tmp_path / "base", torch.bfloat16, **WIDE).model
    model.save_pretrained_merged(tmp_path / "merged")
    return tmp_path / "merged"


def call(monkeypatch, *words: object) -> object:
    """The exit status of scripts/quantize.py; None after a run without an error."""
    monkeypatch.setattr(sys, "argv", ["quantize.py", *map(str, words)])
    try:
        quantize.main()
    except SystemExit as end:
        return end.code


@pytest.mark.parametrize(
    ("source", "output", "options", "message"),
    [
        ("merged", "merged", (), "is the folder to quantise"),
        ("merged", "merged/in", (), "is the folder to quantise, or in it"),
        ("mergd", "out", (), "no such folder"),
        ("adapter", "out", (), "is an adapter's folder"),
        ("in_4bit", "out", (), "is already quantised"),
        ("empty", "out", (), "config.json"),
        ("merged", "adapter", (), "is not empty"),
        ("merged", "merged/config.json/out", (), "is the folder to quantise, or in it"),
        ("merged", "adapter/adapter_config.json", (), "is a file; choose another name"),
        ("merged", "out", ("--scheme", "int4"), "need --device cuda"),
        ("merged", "out", ("--scheme", "fp8-fp8"), "need --device cuda"),
        ("merged", "out", ("--device", "cud"), "device='cud'"),
    ],
)
def test_the_script_refuses_before_any_work_and_changes_nothing(
    source, output, options, message, merged, tmp_path, monkeypatch, capsys
):
    (tmp_path / "empty").mkdir()
    if "adapter" in (source, output.split("/")[0]):
        fastlora.lora(fastlora.load(merged)[0], r=2).save_pretrained(tmp_path / "adapter")
    if source == "in_4bit":
        model, _ = fastlora.load(merged, device="cpu")
        model.save_pretrained_merged(tmp_path / "in_4bit", save_method="merged_4bit")
    contents = lambda: {p: p.is_file() and p.read_bytes() for p in sorted(tmp_path.rglob("*"))}
    before = contents()
    given = (tmp_path / source, tmp_path / output, "--scheme", "int8", *options)
    assert call(monkeypatch, *given) == 2
    assert message in capsys.readouterr().err
    assert contents() == before


def test_the_script_makes_missing_parents_and_copies_folders(merged, tmp_path, monkeypatch):
    (merged / "additional_chat_templates").mkdir()
    out = tmp_path / "no" / "such" / "out"
    assert call(monkeypatch, merged, out, "--scheme", "int8") is None
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "model.safetensors", "additional_chat_templates"} <= names
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


# ── refusals ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("scheme", ["int3", "INT4", ""])
def test_an_unknown_scheme_is_refused_with_the_known_ones(scheme, wide):
    with pytest.raises(
        ValueError, match=r"qat_scheme=.*expected None or 'int4' or 'int8' or 'fp8-int4'"
    ):
        fastlora.lora(wide, qat_scheme=scheme)


def test_groups_that_do_not_divide_are_refused_with_every_layer(pair):
    """d is 32, f 56, and o_proj takes 48: the others and the head fit groups of 32."""
    model = pair("llama_head_dim").model
    with pytest.raises(ValueError) as error:
        fastlora.lora(model, qat_scheme="int8-int4", lora_dropout=0.1)
    assert "groups of 32" in str(error.value)
    assert "{'o_proj': 48, 'down_proj': 56}" in str(error.value)
    assert "lora_dropout=0.1" in str(error.value)
    with pytest.raises(ValueError, match=r"groups of 128.*'q_proj': 32.*'lm_head': 32"):
        fastlora.lora(model, qat_scheme="int4")
    fastlora.lora(model, qat_scheme="fp8-fp8")
