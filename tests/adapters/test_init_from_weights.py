"""PiSSA, OLoRA and LoftQ as first weights. Oracle: PEFT over its moved base.

PEFT moves the base to W - s B0 A0. fastlora keeps W and subtracts s B0 A0 from the adapter's
product.
"""

import dataclasses
import re

import peft
import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model, get_peft_model_state_dict
from torch.utils._pytree import tree_leaves, tree_map

import fastlora
from fastlora import functional
from fastlora.adapters.create import lora
from fastlora.adapters.edits.merging import merge
from fastlora.formats.peft.names import named_leaves, peft_state_dict
from fastlora.formats.peft.reading import load_adapter
from fastlora.models.init_offset import cast_offset, offsets
from fastlora.models.names import projection_path
from fastlora.runtime.gradients import value_and_grad
from oracles.init_offset import ALL, BOTH, MOVING, same_objects, shaken, start_leaves
from oracles.pairs import adapted
from oracles.peft_cases import FORWARD, SEVEN
from oracles.peft_side import IDS, difference, fast, hf_logits, hugging_face, logits
from oracles.trees import same_bits

HALVES = (torch.float16, torch.bfloat16)


def settings_of(case):
    return BOTH | MOVING[case]


def peft_moved(model, dtype=torch.float32, **settings):
    """PEFT's own model of these settings, over its moved base, with fastlora's A and B."""
    oracle = get_peft_model(
        hugging_face(FORWARD, dtype), PeftConfig(**settings, task_type="CAUSAL_LM")
    )
    ours = peft_state_dict(model.adapter, model.spec.lora)
    peft.set_peft_model_state_dict(oracle, {k: v.detach().clone() for k, v in ours.items()})
    return oracle.eval()


# ── the values are PEFT's ─────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("case", MOVING)
def test_first_factors_are_those_of_peft(case):
    oracle = get_peft_model(hugging_face(FORWARD), PeftConfig(**settings_of(case)))
    theirs = get_peft_model_state_dict(oracle)
    model = lora(fast(FORWARD), **settings_of(case))
    ours = peft_state_dict(model.adapter, model.spec.lora)
    assert ours.keys() == theirs.keys()
    for key, a in ours.items():
        if "lora_A" in key:  # up to the sign of a direction; the product has none
            b = key.replace("lora_A", "lora_B")
            torch.testing.assert_close(ours[b] @ a, theirs[b] @ theirs[key], rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", MOVING)
def test_logits_are_those_of_peft_over_its_moved_base(case):
    model = shaken(lora(fast(FORWARD), **settings_of(case)))
    oracle = peft_moved(model, **settings_of(case))
    assert difference(logits(model), hf_logits(oracle), logits(fast(FORWARD))) <= 1e-5


@pytest.mark.parametrize("case", MOVING)
def test_a_step_is_that_of_peft_over_its_moved_base(case):
    model = shaken(lora(fast(FORWARD), **settings_of(case)))
    oracle = peft_moved(model, **settings_of(case))
    batch = {"input_ids": IDS, "labels": IDS}
    _, grads = value_and_grad(functional.loss)(model.adapter, model.base, model.spec, batch)
    oracle(input_ids=IDS, labels=IDS).loss.backward()
    theirs = {
        name.replace(".default", ""): p.grad
        for name, p in oracle.named_parameters()
        if "lora_" in name
    }
    ours = {k if k.endswith("weight") else f"{k}.weight": g for k, g in named_leaves(grads).items()}
    assert ours.keys() == theirs.keys()
    # Relative to the largest gradient of the tensor: DoRA's go up to 10 here.
    for key, g in ours.items():
        off = (g - theirs[key]).abs().max() / theirs[key].abs().max().clamp(min=1)
        assert off <= 1e-5, key


@pytest.mark.parametrize("use_dora", [False, True])
def test_dropout_drops_inputs_of_the_adapter_only(use_dora):
    """y = (W - s B0 A0) x + s B A drop(x): over a base moved by hand it is an ordinary adapter."""
    settings = dict(r=4, lora_alpha=8, lora_dropout=0.4, use_dora=use_dora)
    model = shaken(lora(fast(FORWARD), init_lora_weights="pissa", **settings))
    layers = []
    for params in model.base["layers"]:
        moved = {}
        for name, start in offsets(params).items():
            rest = {k: x for k, x in params[name].items() if k != "offset"}
            moved[name] = rest | {"weight": rest["weight"] - 2 * start.b @ start.a}
        layers.append(params | moved)
    plain = dataclasses.replace(model, base=model.base | {"layers": tuple(layers)})
    run = lambda m, seed: functional.forward(m.adapter, m.base, m.spec, IDS, seed=seed)
    assert difference(run(model, 5), run(plain, 5), run(model, None)) <= 1e-5
    assert difference(run(model, None), run(plain, None), logits(fast(FORWARD))) <= 1e-5


# ── a fresh adapter computes its base, which does not change ──────────────────────────────


@pytest.mark.parametrize("settings", ALL)
def test_fresh_adapter_equals_base(settings):
    base = fast(FORWARD)
    model = lora(base, **BOTH | settings)
    assert all(x.any() for x in tree_leaves(model.adapter))
    expected = logits(base)
    assert (logits(model) - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("dtype", HALVES)
def test_fresh_adapter_equals_a_16_bit_base_to_its_rounding(dtype):
    base = fast(FORWARD, dtype)
    model = lora(base, r=4, lora_alpha=8, init_lora_weights="pissa")
    assert {x.dtype for x in start_leaves(model)} == {torch.float32}
    expected, eps = logits(base).float(), torch.finfo(dtype).eps
    # Four roundings of the largest logit. PEFT's moved and rounded base errs as much (below).
    assert (logits(model).float() - expected).abs().max() <= 4 * eps * expected.abs().max()
    oracle = hf_logits(
        peft_moved(model, dtype, r=4, lora_alpha=8, init_lora_weights="pissa", target_modules=SEVEN)
    ).float()
    ours, theirs = ((x - expected).norm() for x in (logits(model).float(), oracle))
    assert ours <= 1.5 * theirs


def test_the_base_is_shared_and_comes_back():
    base = fast(FORWARD)
    model = shaken(lora(base, r=4, init_lora_weights="pissa"))
    for plain in (fastlora.disable(model), model.with_adapter(None)):
        assert same_objects(plain.base, base.base)
        assert not start_leaves(plain)
        assert torch.equal(logits(plain), logits(base))
    shared = {id(x) for x in tree_leaves(model.base)}
    assert all(id(x) in shared for x in tree_leaves(base.base))
    without = functional.forward(None, model.base, model.spec, IDS)
    assert torch.equal(without, logits(base))


def test_start_factors_share_no_memory():
    model = lora(fast(FORWARD), r=4, init_lora_weights="olora")
    trained = model.for_training()
    with torch.no_grad():
        for leaf in tree_leaves(trained.adapter):
            leaf.zero_()
    assert all(x.any() for x in start_leaves(model))


def test_start_factors_are_not_counted():
    plain = lora(fast(FORWARD), r=4)
    model = lora(fast(FORWARD), r=4, init_lora_weights="pissa")
    for trainable in (True, False):
        assert model.num_parameters(trainable) == plain.num_parameters(trainable)


def test_a_seed_is_a_value():
    a, b, c = (
        tree_leaves(lora(fast(FORWARD), init_lora_weights="pissa_niter_2", random_state=s).adapter)
        for s in (1, 1, 2)
    )
    assert same_bits(a, b) and not same_bits(a, c)


def test_start_factors_are_cast_with_the_adapter():
    params = lora(fast(FORWARD), r=4, init_lora_weights="pissa").base["layers"][0]
    assert cast_offset(params, torch.float32) is params
    narrow = offsets(cast_offset(params, torch.bfloat16))
    assert {x.dtype for pair in narrow.values() for x in pair} == {torch.bfloat16}


# ── merge, combine, train ─────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("how", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_merge_equals_apply(how, tmp_path):
    model = shaken(lora(fast(FORWARD), r=4, lora_alpha=8, init_lora_weights="pissa", **how))
    merged, base = merge(model), logits(fast(FORWARD))
    assert merged.adapter is None and not start_leaves(merged)
    assert difference(logits(merged), logits(model), base) <= 1e-5
    model.save_pretrained_merged(tmp_path)
    read, _ = fastlora.load(tmp_path, dtype="float32", device="cpu")
    rounded = tree_map(lambda x: x.bfloat16().float(), merged.base)
    assert same_bits(read.base, rounded)


def test_combine_uses_the_change_against_the_base(tmp_path):
    base = fast(FORWARD)
    one = shaken(lora(base, r=4, init_lora_weights="pissa"), seed=1)
    two = shaken(lora(base, r=3, init_lora_weights="olora"), seed=2)
    three = adapted(base, r=2)
    found = fastlora.combine([one, two, three], [0.5, 0.3, 0.2], "cat")
    assert not start_leaves(found)
    assert same_objects(found.base, base.base)
    merged = [merge(m) for m in (one, two, three, found)]
    for i, ts in enumerate(found.spec.lora.targets):
        for t in ts:
            weight = lambda m, i=i, t=t: m.base["layers"][i][t.name]["weight"]
            of_one, of_two, of_three, of_found = (weight(m) - weight(base) for m in merged)
            expected = 0.5 * of_one + 0.3 * of_two + 0.2 * of_three
            torch.testing.assert_close(of_found, expected, rtol=0, atol=1e-5)


def test_a_resumed_run_is_the_same_run(tmp_path):
    """The start factors come from the checkpoint: another random_state would give other factors."""
    # float32: two logits of 9 differ by 0.06 in bfloat16 if one is rounded the other way.
    model, tokenizer = fastlora.load("demo", dtype="float32", device="cpu")
    rows = [{"text": f"number {i} follows number {i - 1}."} for i in range(16)]
    settings = dict(batch_size=2, save_every=2, progress=False, train_on="all", packing=False)
    settings |= dict(learning_rate=1e-3, lr_scheduler="constant", warmup_ratio=0.0)
    begin = lambda state: lora(
        model, r=4, init_lora_weights="pissa_niter_1", random_state=state, recompute="none"
    )
    # Decomposed once: threaded LAPACK does not promise the same bits in two calls.
    first = begin(1)
    whole, _ = fastlora.train(
        first, tokenizer, rows, max_steps=4, **settings, output_dir=tmp_path / "a"
    )
    fastlora.train(first, tokenizer, rows, max_steps=2, **settings, output_dir=tmp_path / "b")
    resumed, _ = fastlora.train(
        begin(2), tokenizer, rows, max_steps=4, **settings, output_dir=tmp_path / "b", resume=True
    )
    assert same_bits(resumed.adapter, whole.adapter)
    assert same_bits(start_leaves(resumed), start_leaves(whole))
    assert not same_bits(start_leaves(begin(2)), start_leaves(whole))
    ids = torch.tensor([[1, 5, 9]])
    saved = load_adapter(model, tmp_path / "b")
    torch.testing.assert_close(saved(ids), resumed(ids), rtol=0, atol=1e-4)


# ── refusals ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(init_lora_weights="pissa_niter_x"), "pissa_niter_x"),
        (dict(init_lora_weights="pissa", r=33), "rank of at most 16"),
        (dict(init_lora_weights="pissa", lora_alpha=-4), "more than 0"),
        (dict(init_lora_weights="pissa", lora_bias=True), "lora_bias=True needs"),
        (dict(loftq_config={"loftq_bits": 4}), "without init_lora_weights='loftq'"),
        (dict(init_lora_weights="loftq", loftq_config={"loftq_bits": 3}), "loftq_bits=3"),
        (dict(init_lora_weights="loftq", loftq_config={"loftq_iter": 0}), "loftq_iter=0"),
        (dict(init_lora_weights="loftq", loftq_config={"bits": 4}), "'bits'"),
        (dict(init_lora_weights="loftq", loftq_config=4), "loftq_config=4"),
        (dict(init_lora_weights="eva"), r"fastlora.initialize(model, batches, 'eva')"),
        (dict(init_lora_weights="corda"), r"fastlora.initialize(model, batches, 'corda')"),
        (dict(init_lora_weights="lora_ga"), r"fastlora.initialize(model, batches, 'lora_ga')"),
    ],
)
def test_impossible_arguments_are_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        lora(fast(FORWARD), **settings)


def test_a_loftq_config_object_of_peft_is_accepted():
    given = peft.LoftQConfig(loftq_bits=8, loftq_iter=2)
    own = {"loftq_bits": 8, "loftq_iter": 2}
    one, two = (
        lora(fast(FORWARD), r=4, init_lora_weights="loftq", loftq_config=c) for c in (given, own)
    )
    assert same_bits(one.adapter, two.adapter)
    path = projection_path(0, "q_proj")
    assert path in "".join(peft_state_dict(one.adapter, one.spec.lora))
