"""Laws that every initialisation from data obeys, and the arguments that it refuses."""

import re

import pytest
import torch
from jaxtyping import TypeCheckError
from torch.utils._pytree import tree_leaves, tree_map

import fastlora
from fastlora import functional
from fastlora.adapters.create import lora
from fastlora.adapters.init_from_data.dispatch import initialize
from fastlora.adapters.init_from_data.layer_inputs import (
    SHARED_INPUT,
    embed_batches,
    inputs_by_layer,
)
from fastlora.formats.peft.reading import load_adapter
from fastlora.models.names import projection_path
from fastlora.models.params import LINEARS
from oracles.init_from_data import METHODS, batches, export_difference, fresh, ids, padded
from oracles.init_offset import same_objects, shaken, start_leaves
from oracles.pairs import adapted
from oracles.peft_cases import FORWARD
from oracles.peft_side import difference, fast, hugging_face, logits
from oracles.trees import same_bits

# ── all methods ───────────────────────────────────────────────────────────────────────────


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


FAMILIES = ["qwen3_tied", "mistral", "smollm3", "llama_bias", "gemma2", "phi4_mini", "granite"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_initialised(method, family):
    base = fast(family)
    model = initialize(lora(base, r=2), batches(), method)
    expected = logits(base)
    assert (logits(model) - expected).abs().max() <= 2e-6 * expected.abs().max()


def test_the_given_model_and_the_global_generator_are_not_changed():
    model = fresh()
    before, state = tree_map(torch.clone, model.adapter), torch.random.get_rng_state()
    for method in METHODS:
        initialize(model, (b for b in batches()), method)
    assert same_bits(model.adapter, before) and not start_leaves(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(x.requires_grad for x in tree_leaves((model.base, model.adapter)))


@pytest.mark.parametrize("family", [*FAMILIES, "olmo3"])
def test_inputs_are_those_of_transformers(family):
    """Hooks are fine on the oracle."""
    oracle, seen = hugging_face(family), {}
    for name, module in oracle.named_modules():
        if name.rpartition(".")[2] in LINEARS:
            module.register_forward_hook(lambda _, x, y, n=name: seen.update({n: x[0].detach()}))
    oracle(input_ids=ids(2, 20))
    for i, (rows,) in inputs_of(lora(fast(family)), [{"input_ids": ids(2, 20)}]):
        for name, found in rows.items():
            # Inputs are named by the first of the layers that read them.
            of_input = [n for n in LINEARS if SHARED_INPUT.get(n, n) == name]
            path = next(p for n in of_input if (p := projection_path(i, n)) in seen)
            expected = seen[path].flatten(0, 1)
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
        for i, rows in inputs_by_layer(model, embed_batches(model, data, use_label_mask=True)):
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


# ── refusals ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("pissa", {}, "method='pissa'"),
        ("eva", {"rho": 0.5}, "rho=0.5"),
        ("eva", {"tau": 2.0}, "tau=2.0"),
        ("eva", {"corda_method": "kpm"}, "means nothing to method='eva'"),
        ("corda", {"corda_method": "both"}, "corda_method='both'"),
        ("corda", {"rho": 3.0}, "means nothing to method='corda'"),
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
def test_unsupported_models_are_refused(model, method, message):
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
        (
            [{"input_ids": ROW + 96, "labels": ROW}],
            "input_ids holds [96]; expected ids of the vocabulary [0, 96)",
        ),
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
    # With the type hook on, the hook refuses first.
    with pytest.raises((ValueError, TypeCheckError), match=r"is a list|batches"):
        initialize(fresh(), [[1, 2]], "eva")


def test_too_few_tokens_are_refused_with_the_cure():
    with pytest.raises(ValueError, match=r"8 counted tokens.*(\n.*)*larger batches"):
        initialize(fresh(), [{"input_ids": ids(1, 5)}], "eva")
