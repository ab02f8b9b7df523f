"""First weights from data: EVA, CorDA and LoRA-GA. Oracle: PEFT on the same batches.

PEFT decomposes with torch.svd_lowrank where it can be wrong by per cents on the flat spectra of
random models. Where that matters it is given torch.linalg.svd instead, or a rank at which the
randomised decomposition is exact.
"""

import dataclasses
import re
import sys
import types

import pytest
import torch
from conftest import adapted, same_bits
from jaxtyping import TypeCheckError
from peft import EvaConfig, LoraGAConfig, get_peft_model, get_peft_model_state_dict
from peft import LoraConfig as PeftConfig
from peft.tuners.lora import eva as peft_eva
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.loraga import preprocess_loraga
from peft.utils.incremental_pca import IncrementalPCA
from test_export import (
    FORWARD,
    SEVEN,
    difference,
    fast,
    hf_logits,
    hugging_face,
    logits,
    peft_read,
)
from test_start_export import same_objects, shaken, start_leaves
from torch.utils._pytree import tree_leaves, tree_map

import fastlora
from fastlora import functional
from fastlora.adapters.create import lora
from fastlora.adapters.init_from_data.dispatch import initialize
from fastlora.adapters.init_from_data.eva import _converged, updated
from fastlora.adapters.init_from_data.layer_inputs import layer_rows, start_passes
from fastlora.adapters.init_from_data.lora_ga import _gradients
from fastlora.formats.peft.names import peft_state_dict
from fastlora.formats.peft.reading import load_adapter
from fastlora.models.names import projection_path
from fastlora.models.params import PROJECTIONS


def ids(*shape, seed=3):
    return torch.randint(0, 96, shape, generator=torch.Generator().manual_seed(seed))


def batches(n=2, rows=4, tokens=20):
    drawn = [ids(rows, tokens, seed=seed) for seed in range(n)]
    return [{"input_ids": x, "labels": x} for x in drawn]


def padded(n=2):
    """Batches with padding on the left, and prompts that are no target."""
    found = []
    for batch in batches(n):
        mask = torch.ones_like(batch["input_ids"])
        mask[0, :7] = mask[1, :2] = 0
        labels = batch["labels"].masked_fill(mask == 0, -100)
        labels[:, :9] = -100
        found.append({"input_ids": batch["input_ids"], "labels": labels, "attention_mask": mask})
    return found


def fresh(**settings):
    return lora(fast(FORWARD), **dict(r=4, lora_alpha=8) | settings)


def peft_config(init, **more):
    return PeftConfig(
        **dict(r=4, lora_alpha=8, target_modules=SEVEN, task_type="CAUSAL_LM") | more,
        init_lora_weights=init,
    )


def up_to_signs(x, dim):
    """With the largest value along a dimension positive."""
    return x * x.gather(dim, x.abs().argmax(dim, keepdim=True)).sign()


# ── corda ─────────────────────────────────────────────────────────────────────────────────


def peft_corda(data, method, monkeypatch, **settings):
    # PEFT imports its dataclass from attrs, which it does not depend on.
    monkeypatch.setitem(sys.modules, "attr", types.SimpleNamespace(dataclass=dataclasses.dataclass))
    from peft.tuners.lora.corda import preprocess_corda

    model = hugging_face(FORWARD)
    config = peft_config("corda", corda_config=CordaConfig(corda_method=method), **settings)

    def run():
        with torch.no_grad():
            for batch in data:
                model(input_ids=batch["input_ids"])

    preprocess_corda(model, config, run_model=run)
    return get_peft_model(model, config).eval()


@pytest.mark.parametrize("method", ["ipm", "kpm"])
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True, "rank_pattern": {"v_proj": 6}}])
def test_corda_is_that_of_peft(method, settings, monkeypatch):
    data = [{"input_ids": ids(1, 20, seed=s)} for s in range(3)]  # PEFT takes one row at a time
    oracle = peft_corda(data, method, monkeypatch, **settings)
    model = initialize(fresh(**settings), data, "corda", corda_method=method)
    theirs, ours = (
        get_peft_model_state_dict(oracle),
        peft_state_dict(model.adapter, model.spec.lora),
    )
    assert ours.keys() == theirs.keys()
    for key, a in ours.items():
        if "lora_A" in key:
            b = key.replace("lora_A", "lora_B")
            expected = theirs[b] @ theirs[key]
            off = (ours[b] @ a - expected).abs().max() / expected.abs().max()
            # An inverse stands in A: what two ways to sum in float32 differ by (1e-7) comes out
            # times the covariance's condition, about 100 here.
            assert off <= 1e-4, key
    # The moved base too: logits after a change that is the same on both sides.
    changed = model.with_adapter(tree_map(lambda x: 1.1 * x, model.adapter))
    for name, p in oracle.named_parameters():
        if "lora_" in name:
            p.data *= 1.1
    assert difference(logits(changed), hf_logits(oracle), logits(fast(FORWARD))) <= 1e-5


def test_corda_does_not_count_padding():
    data = padded(1)
    real = data[0]["attention_mask"].bool()
    one = initialize(fresh(), data, "corda")
    changed = dict(data[0], input_ids=torch.where(real, data[0]["input_ids"], 5))
    assert same_bits(one.adapter, initialize(fresh(), [changed], "corda").adapter)


# ── lora_ga ───────────────────────────────────────────────────────────────────────────────


def exact_svd(matrix, q, niter):
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :q], s[:q], vh[:q].T


def peft_gradients(data, config):
    model = hugging_face(FORWARD)

    def step():
        for batch in data:
            model(**batch).loss.backward()

    preprocess_loraga(model, config, step)
    return model


@pytest.mark.parametrize("data", [batches(), padded()], ids=["whole", "padded"])
def test_gradients_of_the_weights_are_those_of_autograd(data):
    oracle = peft_gradients(data, peft_config("lora_ga", lora_ga_config=LoraGAConfig()))
    found = dict(_gradients(fresh(), data))
    for i in range(2):
        for name in PROJECTIONS:
            expected = oracle.get_submodule(projection_path(i, name))._peft_loraga_grad
            assert (found[i][name] - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"direction": "ArBr"},
        {"direction": "A2rBr"},
        {"scale": "weight_svd"},
        {"scale": "gd_scale"},
        {"scale": "unit"},
        {"stable_gamma": 64},
    ],
)
def test_lora_ga_is_that_of_peft_up_to_signs(how, monkeypatch):
    # With r = 8 our randomised decompositions have all of the (16 or 32) directions.
    monkeypatch.setattr(torch, "svd_lowrank", exact_svd)
    config = peft_config("lora_ga", r=8, lora_ga_config=LoraGAConfig(**how))
    oracle = get_peft_model(peft_gradients(batches(), config), config)
    theirs = get_peft_model_state_dict(oracle)
    model = initialize(fresh(r=8), batches(), "lora_ga", **how)
    ours = peft_state_dict(model.adapter, model.spec.lora)
    assert ours.keys() == theirs.keys()
    for key, found in ours.items():
        expected = theirs[key]
        dim = 1 if "lora_A" in key else 0
        found, expected = up_to_signs(found, dim), up_to_signs(expected, dim)
        # Directions of close singular values turn into each other: 4e-5 where the gradients, which
        # are PEFT's to 1e-6, differ.
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max(), key


def test_random_directions_follow_random_state():
    make = lambda seed: initialize(
        fresh(), batches(), "lora_ga", direction="random", random_state=seed
    )
    one, two, other = (tree_leaves(make(s).adapter) for s in (1, 1, 2))
    assert same_bits(one, two) and not same_bits(one, other)


def test_a_small_step_from_lora_ga_follows_the_gradient():
    """A0 and B0 span singular directions of the gradient: checked against an SVD of its own."""
    model = initialize(fresh(r=2), batches(), "lora_ga")
    gradient = dict(_gradients(model, batches()))[0]["gate_proj"]
    u, _, vh = torch.linalg.svd(gradient)
    record = model.adapter["layers"][0]["gate_proj"]
    torch.testing.assert_close((record.a @ vh[:2].T).abs(), torch.eye(2), rtol=0, atol=2e-2)
    unit = record.b / record.b.norm(dim=0)
    torch.testing.assert_close((u[:, 2:4].T @ unit).abs(), torch.eye(2), rtol=0, atol=2e-2)


# ── eva ───────────────────────────────────────────────────────────────────────────────────


def peft_after_every_batch(data, monkeypatch, **how):
    """PEFT's EVA with exact decompositions, after each batch once."""
    monkeypatch.setattr(IncrementalPCA, "_svd_fn_lowrank", IncrementalPCA._svd_fn_full)
    config = peft_config("eva", eva_config=EvaConfig(**how))
    config.eva_config.tau = -2.0  # a batch after the first is enough to have settled
    model = get_peft_model(hugging_face(FORWARD), config)
    peft_eva.initialize_lora_eva_weights(model, data, show_progress_bar=False)
    return model


@pytest.mark.filterwarnings("ignore:lora with eva")
@pytest.mark.parametrize(
    "how",
    [
        {"rho": 1.0},
        {"rho": 1.5},
        {},
        {"whiten": True},
        {"adjust_scaling_factors": False},
        {"use_label_mask": False},
    ],
)
@pytest.mark.parametrize("data", [batches(), padded()], ids=["whole", "padded"])
def test_eva_is_that_of_peft(data, how, monkeypatch):
    oracle = peft_after_every_batch(data, monkeypatch, **how)
    model = initialize(fresh(), data, "eva", tau=1.0, **how)
    theirs, ours = (
        get_peft_model_state_dict(oracle),
        peft_state_dict(model.adapter, model.spec.lora),
    )
    config = oracle.peft_config["default"]
    assert ours.keys() == theirs.keys()
    for key, found in ours.items():
        expected = theirs[key]
        # Equal shares of q, k and v are served in an order that PEFT leaves to its sort.
        assert abs(found.shape[0] - expected.shape[0]) <= ("lora_A" in key) * 1, key
        if "lora_B" in key:
            assert not found.any() and not expected.any()
        # PEFT whitens in place, so what q, k and v share is divided three times, gate and up twice.
        elif "whiten" not in how or "o_proj" in key or "down_proj" in key:
            n = min(found.shape[0], expected.shape[0])
            torch.testing.assert_close(found[:n], expected[:n], rtol=0, atol=1e-3)
    assert sum(x.shape[0] for k, x in ours.items() if "lora_A" in k) == 14 * 4
    for i, targets in enumerate(model.spec.lora.targets):
        for t in targets:
            rank = config.rank_pattern.get(projection_path(i, t.name), 4)
            alpha = config.alpha_pattern.get(projection_path(i, t.name), 8)
            if t.r == rank:
                assert t.lora_alpha == pytest.approx(alpha)
            assert t.scaling == pytest.approx(t.lora_alpha / t.r)


def test_components_are_those_of_all_rows_at_once():
    gen = torch.Generator().manual_seed(0)
    spread = 3.0 * 0.5 ** torch.arange(12)  # a spectrum that falls, so that little is cut off
    chunks = [torch.randn(n, 12, generator=gen) * spread + 2 for n in (30, 20, 25)]
    found = None
    for rows in chunks:
        found = updated(found, rows, 12)
    whole = updated(None, torch.cat(chunks), 12)
    torch.testing.assert_close(found, whole, rtol=1e-3, atol=1e-3)
    assert found.explained().sum() == pytest.approx(1.0, abs=1e-4)


def test_components_that_have_settled_are_left_alone():
    rows = [torch.randn(50, 8, generator=torch.Generator().manual_seed(s)) for s in range(4)]
    stream = lambda n: iter([{"q_proj": x} for x in rows[:n]])
    two, four = (_converged(stream(n), {"q_proj": 3}, -1.0, 0)["q_proj"] for n in (2, 4))
    assert torch.equal(two.vh, four.vh)
    assert not torch.equal(_converged(stream(4), {"q_proj": 3}, 1.0, 0)["q_proj"].vh, two.vh)


def test_a_projection_left_without_a_rank_loses_its_adapter(tmp_path):
    data = batches(2, rows=8, tokens=30)
    model = initialize(fresh(r=1, lora_alpha=2), data, "eva", rho=9.0)
    named = [t.name for ts in model.spec.lora.targets for t in ts]
    assert len(named) < 14
    assert sum(t.r for ts in model.spec.lora.targets for t in ts) == 14
    trained = adapted_like(model)
    trained.save_pretrained(tmp_path)
    expected = hf_logits(peft_read(FORWARD, tmp_path))
    assert difference(logits(trained), expected, logits(fast(FORWARD))) <= 1e-5


def adapted_like(model):
    gen = torch.Generator().manual_seed(1)
    noise = lambda x: 0.15 * torch.randn(x.shape, generator=gen)
    return model.with_adapter(tree_map(noise, model.adapter))


def export_difference(method, folder, **how):
    """PEFT's logits with an adapter initialised from data, moved and saved here, against ours."""
    base = fast(FORWARD)
    model = shaken(initialize(lora(base, r=4, lora_alpha=8, **how), padded(), method))
    model.save_pretrained(folder)
    return difference(hf_logits(peft_read(FORWARD, folder)), logits(model), logits(base))


# ── all of them ───────────────────────────────────────────────────────────────────────────

METHODS = ("eva", "corda", "lora_ga")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("how", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_the_model_still_equals_its_base_and_exports(method, how, tmp_path):
    base = fast(FORWARD)
    model = initialize(lora(base, r=4, lora_alpha=8, **how), padded(), method)
    assert any(x.any() for x in tree_leaves(model.adapter))
    expected = logits(base)
    assert (logits(model) - expected).abs().max() <= 2e-6 * expected.abs().max()
    assert bool(start_leaves(model)) == (method != "eva")
    assert same_objects(fastlora.disable(model).base, base.base)
    assert model.spec.lora.init_lora_weights == method
    assert export_difference(method, tmp_path, **how) <= 1e-5
    changed = shaken(model)
    assert difference(logits(load_adapter(base, tmp_path)), logits(changed), expected) <= 1e-5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["qwen3_tied", "mistral", "smollm3", "llama_bias"])
def test_every_family_can_be_initialised(method, family):
    base = fast(family)
    model = initialize(lora(base, r=2), batches(), method)
    expected = logits(base)
    assert (logits(model) - expected).abs().max() <= 2e-6 * expected.abs().max()


def test_the_given_model_and_the_global_generator_are_left_alone():
    model = fresh()
    before, state = tree_map(torch.clone, model.adapter), torch.random.get_rng_state()
    for method in METHODS:
        initialize(model, (b for b in batches()), method)
    assert same_bits(model.adapter, before) and not start_leaves(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(x.requires_grad for x in tree_leaves((model.base, model.adapter)))


@pytest.mark.parametrize("family", ["qwen3_tied", "mistral", "smollm3", "llama_bias"])
def test_inputs_are_those_of_transformers(family):
    """Hooks are fine on the oracle."""
    oracle, seen = hugging_face(family), {}
    for name, module in oracle.named_modules():
        if name.rpartition(".")[2] in PROJECTIONS:
            module.register_forward_hook(lambda _, x, y, n=name: seen.update({n: x[0].detach()}))
    oracle(input_ids=ids(2, 20))
    for i, (rows,) in inputs_of(lora(fast(family)), [{"input_ids": ids(2, 20)}]):
        for name, found in rows.items():
            expected = seen[projection_path(i, name)].flatten(0, 1)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_packed_documents_do_not_see_each_other():
    row = ids(1, 20)
    segments = torch.tensor([[0] * 8 + [1] * 12])
    apart = [{"input_ids": row[:, :8]}, {"input_ids": row[:, 8:]}]
    packed = [{"input_ids": row, "segment_ids": segments}]
    gather = lambda data: {
        i: torch.cat([b["down_proj"] for b in rows]) for i, rows in inputs_of(fresh(), data)
    }
    one, two = gather(apart), gather(packed)
    for i in one:
        torch.testing.assert_close(two[i], one[i], rtol=0, atol=1e-5)


def inputs_of(model, data):
    with torch.no_grad():
        for i, rows in layer_rows(model, start_passes(model, data, use_label_mask=True)):
            yield i, list(rows)


def test_a_16_bit_base_is_read_in_float32():
    base = fast(FORWARD, torch.bfloat16)
    for method in METHODS:
        model = initialize(lora(base, r=4), batches(), method)
        assert {x.dtype for x in tree_leaves(model.adapter)} == {torch.float32}


def test_training_starts_from_an_initialised_model():
    model = initialize(fresh(), batches(), "lora_ga")
    value, grads = fastlora.value_and_grad(functional.loss)(
        model.adapter, model.base, model.spec, batches()[0]
    )
    step = tree_map(lambda p, g: p - 1e-2 * g, model.adapter, grads)
    assert model.with_adapter(step).loss(batches()[0]) < value


# ── what cannot be ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("pissa", {}, "method='pissa'"),
        ("eva", {"rho": 0.5}, "rho=0.5"),
        ("eva", {"tau": 2.0}, "tau=2.0"),
        ("eva", {"corda_method": "kpm"}, "means nothing to 'eva'"),
        ("corda", {"corda_method": "both"}, "corda_method='both'"),
        ("corda", {"rho": 3.0}, "means nothing to 'corda'"),
        ("lora_ga", {"direction": "up"}, "direction='up'"),
        ("lora_ga", {"scale": "large"}, "scale='large'"),
        ("lora_ga", {"stable_gamma": 0}, "stable_gamma=0"),
        ("lora_ga", {"random_state": -1}, "random_state=-1"),
    ],
)
def test_wrong_arguments_are_refused_by_name(method, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        initialize(fresh(), batches(), method, **arguments)


@pytest.mark.parametrize(
    ("model", "method", "message"),
    [
        (lambda: fast(FORWARD), "eva", "has no adapter"),
        (lambda: adapted(fast(FORWARD), r=4), "corda", "not fresh"),
        (lambda: fresh(init_lora_weights="pissa"), "lora_ga", "not fresh"),
        (lambda: fresh(lora_bias=True), "eva", "lora_bias"),
        (lambda: fresh(r=20), "eva", "40 components"),
        (lambda: fresh(r=9), "lora_ga", "rank of at most 8"),
        (lambda: fresh(lora_alpha=-2), "corda", "more than 0"),
    ],
)
def test_models_that_cannot_be_initialised_are_refused(model, method, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        initialize(model(), batches(), method)


ROW = torch.zeros(1, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "batches is empty"),
        ([{"labels": ROW}], "missing input_ids"),
        ([{"input_ids": ROW}], "missing labels"),
        ([{"input_ids": ROW, "labels": ROW, "text": ROW}], "unknown entry 'text'"),
        ([{"input_ids": ROW.float(), "labels": ROW}], "int64"),
        ([{"input_ids": ROW + 96, "labels": ROW}], "outside the vocabulary"),
        ([{"input_ids": ROW, "labels": ROW[:, :2]}], "labels must be"),
        ([{"input_ids": ROW, "labels": ROW, "attention_mask": ROW}], "no real token"),
        (
            [{"input_ids": ROW.expand(1, 4).repeat(1, 50), "labels": ROW.repeat(1, 50)}],
            "200 tokens",
        ),
    ],
)
def test_batches_that_do_not_fit_are_refused(data, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        initialize(fresh(), data, "lora_ga")


def test_a_batch_is_a_dict():
    # Where the type hook is on, it speaks before initialize does.
    with pytest.raises((ValueError, TypeCheckError), match=r"is a list|batches"):
        initialize(fresh(), [[1, 2]], "eva")


def test_too_few_tokens_are_refused_with_the_cure():
    with pytest.raises(ValueError, match=r"8 counted tokens.*(\n.*)*larger batches"):
        initialize(fresh(), [{"input_ids": ids(1, 5)}], "eva")
