"""Several adapters as one, and none. Oracle: PEFT's add_weighted_adapter over the same adapters."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves, tree_map

import fastlora
from fastlora import functional
from fastlora.adapters.create import lora
from fastlora.adapters.edits.combining import combine, disable
from fastlora.adapters.targets import resolve_targets
from fastlora.formats.peft.reading import load_adapter
from fastlora.formats.peft.writing import save_adapter
from fastlora.model import Model
from fastlora.models.params import BiasedLoRA
from oracles.combining import (
    COMBINE_CASES,
    EQUAL,
    UNEQUAL,
    adapted_models,
    combine_difference,
    deltas,
    furthest,
    peft_mixed,
    write_folders,
)
from oracles.peft_cases import FORWARD
from oracles.peft_side import (
    IDS,
    difference,
    edit,
    fast,
    hf_logits,
    logits,
    peft_read,
    with_random_adapter,
)


def weighted_sum(models, weights):
    total = {}
    for model, weight in zip(models, weights, strict=True):
        for name, delta in deltas(model).items():
            total[name] = total.get(name, 0) + weight * delta
    return total


# ── PEFT's numbers ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("case", COMBINE_CASES)
def test_combining_equals_peft(case, tmp_path, monkeypatch):
    of_logits, of_matrices = combine_difference(case, tmp_path, monkeypatch)
    assert of_logits <= 1e-5
    # PEFT decomposes in fp32 and errs by up to 1.4e-6 here.
    assert of_matrices <= (1e-5 if COMBINE_CASES[case][2] == "svd" else 1e-6)


@pytest.mark.parametrize("case", COMBINE_CASES)
def test_a_combination_exports_to_peft(case, tmp_path):
    arguments, weights, method, kwargs = COMBINE_CASES[case]
    mixed = combine(adapted_models(*arguments), weights, method, **kwargs)
    assert {t.scaling for targets in mixed.spec.lora.targets for t in targets} == {1.0}
    resolved = resolve_targets(mixed.spec.lora, mixed.spec.config, "not what it resolves to:")
    assert resolved == mixed.spec.lora
    save_adapter(mixed, tmp_path)
    found, expected = hf_logits(peft_read(FORWARD, tmp_path)), logits(mixed)
    assert difference(found, expected, logits(fast(FORWARD))) <= 1e-5
    again = load_adapter(fast(FORWARD), tmp_path)
    assert all(map(torch.equal, tree_leaves(again.adapter), tree_leaves(mixed.adapter)))


# ── sums ──────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=15, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    weights=st.lists(st.floats(-3, 3), min_size=4, max_size=4),
    rslora=st.booleans(),
    method=st.sampled_from(["cat", "svd"]),
)
def test_cat_and_a_large_svd_are_the_exact_weighted_sum(ranks, weights, rslora, method):
    weights = weights[: len(ranks)]
    weights[0] = weights[0] or 1.0
    names = itertools.cycle([["q_proj", "up_proj"], ["up_proj"], ["up_proj", "k_proj"]])
    arguments = [
        dict(r=r, target_modules=n, use_rslora=rslora) for r, n in zip(ranks, names, strict=False)
    ]
    models = adapted_models(*arguments)
    kwargs = dict(svd_rank=sum(ranks)) if method == "svd" else {}
    mixed = combine(models, weights, method, **kwargs)
    assert furthest(deltas(mixed), weighted_sum(models, weights)) <= 1e-6
    in_all = [len(ts) and max(t.r for t in ts) for ts in mixed.spec.lora.targets]
    assert in_all == [sum(ranks)] * len(in_all)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_svd_errs_as_little_as_a_matrix_of_its_rank_can(rank):
    models = adapted_models(*UNEQUAL)
    weights = (0.9, -1.3)
    found, exact = (
        deltas(combine(models, weights, "svd", svd_rank=rank)),
        deltas(combine(models, weights)),
    )
    for name, whole in exact.items():
        least = torch.linalg.svdvals(whole)[rank:].square().sum().sqrt()  # Eckart and Young
        assert (found[name] - whole).norm() <= least + 1e-5


def test_layers_that_the_first_model_lacks_are_kept(tmp_path, monkeypatch):
    names, weights = ["q_proj", "v_proj"], (1.0, 2.0)
    models = adapted_models(
        dict(r=2, target_modules=names, layers_to_transform=0), dict(r=3, target_modules=names)
    )
    exact = weighted_sum(models, weights)
    assert furthest(deltas(combine(models, weights)), exact) <= 1e-6
    write_folders(models, tmp_path)
    # As PEFT itself writes it, which then loses the second adapter's other layer in silence.
    edit(tmp_path / "0", target_modules=names, layers_to_transform=[0])
    theirs = peft_mixed(tmp_path, weights, monkeypatch, "cat").deltas
    assert theirs.keys() == {name for name in exact if ".layers.0." in name}


def test_rslora_does_not_scale_the_result(tmp_path, monkeypatch):
    models, weights = adapted_models(*(e | dict(use_rslora=True) for e in EQUAL)), (0.7, 0.2, 1.5)
    mixed, exact = combine(models, weights), weighted_sum(models, weights)
    assert furthest(deltas(mixed), exact) <= 1e-6
    assert (
        resolve_targets(mixed.spec.lora, mixed.spec.config, "another scaling:") == mixed.spec.lora
    )
    write_folders(models, tmp_path)
    theirs = peft_mixed(tmp_path, weights, monkeypatch, "cat").deltas
    # PEFT divides its alpha of 12 by sqrt(12): alpha = r is a scaling of 1 without rsLoRA only.
    assert furthest(theirs, {k: x * 12**0.5 for k, x in exact.items()}) <= 1e-6


def test_one_model_is_pruned_too():
    # PEFT scales it and ignores density and svd_rank.
    (model,) = adapted_models(EQUAL[0])
    pruned = combine([model], (1.0,), "magnitude_prune", density=0.25)
    for x in tree_leaves(pruned.adapter):
        assert (x != 0).sum() == x.numel() // 4
    cut = combine([model], (1.0,), "svd", svd_rank=2)
    assert {t.r for targets in cut.spec.lora.targets for t in targets} == {2}


def test_a_combination_combines_again():
    models = adapted_models(*UNEQUAL, dict(r=2, target_modules=["q_proj"]))
    twice = combine([combine(models[:2], (0.5, -2.0)), models[2]], (3.0, 0.7))
    assert furthest(deltas(twice), weighted_sum(models, (1.5, -6.0, 0.7))) <= 1e-6


# ── random masks ──────────────────────────────────────────────────────────────────────────


def test_the_seed_decides_the_masks_and_no_global_state_does():
    models, weights = adapted_models(*EQUAL), (1.0, 1.0, 1.0)
    state = torch.get_rng_state()
    one, same, other, fresh, fresher = (
        tree_leaves(combine(models, weights, "dare_linear", density=0.5, seed=s).adapter)
        for s in (1, 1, 2, None, None)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, one, same))
    assert not any(map(torch.equal, one, other))
    assert not any(map(torch.equal, fresh, fresher))


# ── a value over the same base ────────────────────────────────────────────────────────────


def same_tensors(one, other):
    pairs = zip(tree_leaves(one), tree_leaves(other), strict=True)
    return all(x.data_ptr() == y.data_ptr() for x, y in pairs)


@pytest.mark.parametrize("case", COMBINE_CASES)
def test_the_base_is_shared_and_no_adapter_is(case):
    arguments, weights, method, kwargs = COMBINE_CASES[case]
    models = adapted_models(*arguments)
    before = [tree_map(torch.clone, m.adapter) for m in models]
    mixed = combine(models, weights, method, **kwargs)
    assert isinstance(mixed, Model)
    assert same_tensors(mixed.base, models[0].base)
    theirs = {x.untyped_storage().data_ptr() for m in models for x in tree_leaves(m.adapter)}
    for x in tree_leaves(mixed.adapter):
        assert x.untyped_storage().data_ptr() not in theirs
        assert x.dtype == torch.float32 and x.is_contiguous()
    for model, kept in zip(models, before, strict=True):
        assert all(map(torch.equal, tree_leaves(model.adapter), tree_leaves(kept)))


def test_disabling_gives_the_base_exactly():
    base = fast(FORWARD)
    model = with_random_adapter(lora(base, r=4))
    off = disable(model)
    assert off.adapter is None and off.spec.lora is None and model.adapter is not None
    assert same_tensors(off.base, base.base)
    assert torch.equal(logits(off), logits(base))
    assert not torch.equal(logits(model), logits(base))
    assert torch.equal(logits(disable(off)), logits(base))


def test_adapters_take_turns_over_one_base(tmp_path):
    write_folders(adapted_models(EQUAL[0], UNEQUAL[1]), tmp_path)
    base = fast(FORWARD)
    one = load_adapter(base, tmp_path / "0")
    first = logits(one)
    two = load_adapter(one, tmp_path / "1")
    assert difference(logits(two), logits(load_adapter(base, tmp_path / "1")), first) == 0
    again = load_adapter(two, tmp_path / "0")
    assert torch.equal(logits(again), first) and torch.equal(logits(one), first)
    assert all(same_tensors(m.base, base.base) for m in (one, two, again))
    assert not same_tensors(one.adapter, again.adapter)
    combine([one, two, again], (1.0, 1.0, 1.0))  # one base, whichever way each was reached


@pytest.mark.parametrize("method", ["cat", "svd", "linear"])
def test_a_combination_trains(method):
    kwargs = dict(svd_rank=3) if method == "svd" else {}
    tracked = [m.for_training() for m in adapted_models(*EQUAL)]
    mixed = combine(tracked, (0.7, -0.2, 1.5), method, **kwargs)
    assert not any(x.requires_grad for x in tree_leaves(mixed.adapter))
    batch = {"input_ids": IDS, "labels": IDS}
    step = fastlora.value_and_grad(functional.loss)
    before, grads = step(mixed.adapter, mixed.base, mixed.spec, batch)
    assert all(g.abs().max() > 0 for g in tree_leaves(grads))
    stepped = tree_map(lambda x, g: x - 1e-3 * g, mixed.adapter, grads)
    assert mixed.with_adapter(stepped).loss(batch) < before


@pytest.mark.parametrize("method", ["cat", "svd", "linear", "ties"])
def test_half_precision_rounds_once(method):
    kwargs = dict(density=0.5) if method == "ties" else {}
    half = [
        m.with_adapter(tree_map(lambda x: x.bfloat16(), m.adapter))
        for m in adapted_models(*EQUAL[:2])
    ]
    wide = [m.with_adapter(tree_map(lambda x: x.float(), m.adapter)) for m in half]
    found, exact = (combine(ms, (0.7, -0.4), method, **kwargs).adapter for ms in (half, wide))
    for x, y in zip(tree_leaves(found), tree_leaves(exact), strict=True):
        assert x.dtype == torch.bfloat16 and torch.equal(x, y.bfloat16())


def test_the_widest_dtype_is_kept():
    one, two = adapted_models(*EQUAL[:2])
    two = two.with_adapter(tree_map(lambda x: x.double(), two.adapter))
    one = one.with_adapter(tree_map(lambda x: x.half(), one.adapter))
    assert {x.dtype for x in tree_leaves(combine([one, two], (1.0, 1.0)).adapter)} == {
        torch.float64
    }


def test_other_settings_are_taken_from_the_first_model():
    one, two = adapted_models(EQUAL[0] | dict(lora_dropout=0.25), EQUAL[1])
    one = one.with_spec(recompute="full")
    mixed = combine([one, two], (1.0, 1.0))
    assert mixed.spec.lora.lora_dropout == 0.25 and mixed.spec.recompute == "full"
    assert dataclasses.replace(mixed.spec, lora=None) == dataclasses.replace(one.spec, lora=None)
    assert hash(mixed.spec) == hash(combine([one, two], (1.0, 1.0)).spec)


# ── refusals ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "weights, method, kwargs, said",
    [
        ((1.0,), "cat", {}, ["1 weights for 2 models"]),
        ((), "cat", {}, ["0 weights for 2 models"]),
        ((1.0, float("nan")), "cat", {}, [r"weights\[1\]=nan", "finite"]),
        ((float("inf"), float("-inf")), "svd", {}, [r"weights\[0\]=inf", r"weights\[1\]=-inf"]),
        ((0.0, 0), "linear", {}, ["all 0", "disable"]),
        ((1.0, 1.0), "slerp", {}, ["slerp", "cat.*svd.*linear.*ties.*dare_ties.*magnitude_prune"]),
        ((1.0, 1.0), "ties", {}, ["density=None", r"\(0, 1\]"]),
        ((1.0, 1.0), "ties", dict(density=0.0), ["density=0.0", r"\(0, 1\]"]),
        ((1.0, 1.0), "magnitude_prune", dict(density=1.1), ["density=1.1"]),
        ((1.0, 1.0), "dare_ties", dict(density=float("nan")), ["density=nan"]),
        ((1.0, 1.0), "cat", dict(density=0.5), ["density=0.5 means nothing to method='cat'"]),
        ((1.0, 1.0), "svd", dict(svd_rank=0), ["svd_rank=0", "at least 1"]),
        ((1.0, 1.0), "linear", dict(svd_rank=4), ["svd_rank=4 means nothing"]),
        ((1.0, 1.0), "ties", dict(density=0.5, seed=1), ["seed=1 means nothing"]),
        ((1.0, 1.0), "dare_ties", dict(density=0.5, seed=-1), ["seed=-1"]),
        (
            (1.0, 1.0),
            "ties",
            dict(density=0.5, majority_sign_method="mean"),
            ["majority_sign_method='mean'", "total.*frequency"],
        ),
        (
            (float("nan"),),
            "slerp",
            dict(density=2.0, svd_rank=-1),
            ["nan", "1 weights for 2", "slerp", "density=2.0", "svd_rank=-1"],
        ),
    ],
)
def test_all_wrong_arguments_are_named(weights, method, kwargs, said):
    with pytest.raises(ValueError, match=r"fastlora\.combine cannot") as refused:
        combine(adapted_models(*EQUAL[:2]), weights, method, **kwargs)
    for pattern in said:
        refused.match(pattern)


def test_no_models_are_refused():
    with pytest.raises(ValueError, match="models is empty"):
        combine([], [])


def test_all_models_that_do_not_fit_are_named():
    (one,) = adapted_models(EQUAL[0])
    copied = dataclasses.replace(one, base=tree_map(torch.clone, one.base))
    config = dataclasses.replace(one.spec.config, rms_norm_eps=1e-3)
    shaped = dataclasses.replace(one, spec=dataclasses.replace(one.spec, config=config))
    broken = one.with_adapter(tree_map(torch.clone, one.adapter))
    broken.adapter["layers"][1]["v_proj"].b[0, 0] = float("nan")
    with pytest.raises(ValueError, match="cannot do this") as refused:
        combine([one, copied, disable(one), shaped, broken], (1.0,) * 5)
    refused.match(r"models\[1\] has another base")
    refused.match(r"models\[2\] has no adapter")
    refused.match(r"models\[3\] has another base")
    refused.match(r"models\[4\].*NaN.*model\.layers\.1\.self_attn\.v_proj")
    assert str(refused.value).count("models[") == 4 + 2  # the cure names models[0] twice


@pytest.mark.parametrize(
    "method", ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
)
def test_unequal_ranks_are_refused_by_module(method):
    kwargs = {} if method == "linear" else dict(density=0.5)
    with pytest.raises(ValueError, match="equal ones") as refused:
        combine(adapted_models(*UNEQUAL), (1.0, 1.0), method, **kwargs)
    for layer in range(2):
        refused.match(rf"model\.layers\.{layer}\.mlp\.up_proj has ranks \[2, 3\]")
        refused.match(rf"model\.layers\.{layer}\.self_attn\.k_proj has ranks \[4, 3\]")
    assert "q_proj" not in str(refused.value)  # only one model adapts it


def test_adapters_of_more_than_a_and_b_are_refused_by_name():
    (one,) = adapted_models(EQUAL[0])
    layers = one.adapter["layers"]
    plain = layers[0]["v_proj"]
    biased = layers[0] | {"v_proj": BiasedLoRA(*plain, bias=torch.ones(plain.b.shape[0]))}
    model = dataclasses.replace(one, adapter={"layers": (biased, *layers[1:])})
    with pytest.raises(ValueError, match=r"models\[1\] has more than A and B in \['v_proj'\]"):
        combine([one, model], (1.0, 1.0))


def test_a_result_that_overflows_is_refused_by_name():
    with pytest.raises(ValueError, match=r"NaN or infinity into:\n.*layers\.0\.self_attn\.q_proj"):
        combine(adapted_models(*EQUAL[:2]), (1e39, 1.0))
